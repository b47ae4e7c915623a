"""The embedded encoder as it lies in data/encoder: its size, its vocabulary, and a short real run on it."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import AutoModelForTokenClassification, AutoTokenizer

from ner import config, formats

FOLDER = config.ROOT / "data/encoder"
NER_DATA = config.ROOT.parent / "shared/ner_data"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_small_standard_and_in_half_precision():
    files = [FOLDER / name for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]
    assert sum(file.stat().st_size for file in files) < 35e6
    with safe_open(files[1], "pt") as weights:
        names = weights.keys()
        assert {str(weights.get_tensor(name).dtype) for name in names} == {"torch.float16"}
    model = AutoModelForTokenClassification.from_pretrained(FOLDER, num_labels=3)
    assert model.config.model_type == "bert" and model.num_labels == 3


def test_gb2312_ascii_and_full_width_forms_are_known(tokenizer):
    known = [
        bytes([high, low]).decode("gb2312")
        for high in range(0xB0, 0xF8)
        for low in range(0xA1, 0xFF)
        if (high, low) < (0xD7, 0xFA) or high > 0xD7
    ]
    assert len(known) == 6763
    known += (
        [chr(c) for c in range(0x20, 0x7F)]
        + [chr(c) for c in range(0xFF01, 0xFF5F)]
        + list("，。、；：？！“”‘’（）《》—…·％℃")
    )
    ids = tokenizer(known, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(known) and tokenizer.unk_token_id not in ids and len(set(ids)) == len(set(known))


@pytest.mark.parametrize(
    "text", ["1998年3月，江泽民在北京会见了比尔·盖茨。", "Ａ a\t\u3000\u200b😀e\u0301\n한글", "x" * 300]
)
def test_one_token_a_character_with_exact_offsets(tokenizer, text):
    raw = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert raw["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert raw["input_ids"] == tokenizer(list(text), is_split_into_words=True, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(not NER_DATA.exists(), reason="the real corpus (../shared/ner_data) is not here")
def test_real_sentences_are_learned_and_found(tmp_path):
    """150 real sentences, three epochs on the default encoder: far from its best, and far from nothing."""
    corpus = formats.read(str(NER_DATA / "train")).sentences
    for name, part in {"train": corpus[:150], "dev": corpus[150:190]}.items():
        lines = ["".join(f"{c} {t}\n" for c, t in zip(s.chars, s.tags, strict=True)) for s in part]
        (tmp_path / name).write_text("\n".join(lines), "utf-8")
    command = [
        sys.executable,
        "main.py",
        "--train",
        str(tmp_path / "train"),
        "--dev",
        str(tmp_path / "dev"),
        "--test",
        "null",
        "--epochs",
        "3",
        "--learning_rate",
        "2e-3",
        "--output",
        str(tmp_path),
        "--run",
        "short",
    ]
    done = subprocess.run(
        command, cwd=config.ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "short/metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["dev"]["micro"]["f1"] > 0.4
    text = "1998年3月，江泽民在北京会见了比尔·盖茨。"
    done = subprocess.run(
        [sys.executable, "predict.py", "--run", str(tmp_path / "short"), "--json", text],
        cwd=config.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for entity in json.loads(done.stdout)["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
