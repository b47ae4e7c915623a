"""tokens.py gives the ids that transformers gives, for each kind of tokenizer, and says what is wrong with a file."""

import json

import pytest
from trained import KINDS, ODD, TEXT

from ner.config import ROOT
from ner.encoder import read_tokenizer
from ner.errors import UserError
from ner.tokens import FastTokenizer
from ner.windows import Windower

SAVED = ROOT / "tests" / "saved_runs"
UNITS = [*TEXT, *(text for text in ODD if text.isprintable()), "NF-kappa", "1998", "a" * 40]


def check_same(folder, unit):
    expected, fast = read_tokenizer(str(folder), str(folder), unit), FastTokenizer(folder)
    for text in UNITS:
        assert fast(text)["input_ids"] == expected(text)["input_ids"]
    texts = fast(UNITS, add_special_tokens=False)["input_ids"]
    assert texts == expected(UNITS, add_special_tokens=False)["input_ids"]
    assert sorted(fast.all_special_ids) == sorted(set(expected.all_special_ids))
    assert (fast.unk_token_id, fast.pad_token_id) == (expected.unk_token_id, expected.pad_token_id)
    one, other = (Windower(tokenizer, unit, True, 16) for tokenizer in (fast, expected))
    assert one.windows([UNITS]) == other.windows([UNITS])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind, tmp_path):
    unit, make = KINDS[kind]
    make(tmp_path / "made")
    read_tokenizer(str(tmp_path / "made"), "made", unit).save_pretrained(tmp_path / "saved")  # as a run saves it
    check_same(tmp_path / "saved", unit)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_ids_of_saved_runs(name):
    check_same(SAVED / name / "model", "character")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    KINDS["wordpiece"][1](tmp_path)
    fast = FastTokenizer(tmp_path)
    fast.tokenizer.enable_truncation(3)
    fast.tokenizer.enable_padding(length=50)
    fast.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(FastTokenizer(tmp_path)("北京上海")["input_ids"]) == 6


@pytest.mark.parametrize("file, text, message", [
    ("tokenizer.json", "{", "tokenizer.json: the tokenizer cannot be loaded"),
    ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be used"),
    ("tokenizer_config.json", json.dumps({"unk_token": 3}), "tokenizer_config.json: cannot be used"),
])  # fmt: skip
def test_damaged_files(tmp_path, file, text, message):
    KINDS["wordpiece"][1](tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        FastTokenizer(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=file):
        FastTokenizer(tmp_path)
