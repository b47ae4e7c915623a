"""shards.py: whatever the encoding and wherever files are cut, the texts and their lines are those of the file."""

import io

import pytest
import tiny
import trained

from ner import shards as module
from ner.errors import UserError
from ner.texts import read_texts

LINES = ["".join(chars) for chars, _ in tiny.sentences(400, seed=6)]
LINES[7:7] = ["", trained.TEXT * 200]


def test_shards_of_lines_are_the_file(tmp_path, monkeypatch):
    """Whatever the encoding and wherever it is cut, shard by shard the texts and their lines are those of the file."""
    monkeypatch.setattr(module, "SHARD_BYTES", 2000)
    monkeypatch.setattr(module, "READ_BYTES", 700)
    for data in ("\n".join(LINES).encode(), "\r\n".join(["\ufeffabc", *LINES, ""]).encode("utf-8"),
                 "\n".join(["abc", *LINES]).encode("gb18030"), b"\n\n", b"x"):  # fmt: skip
        (tmp_path / "in.txt").write_bytes(data)
        shards = module.plan(str(tmp_path / "in.txt"), "jsonl")
        expected = list(read_texts(io.BytesIO(data), "in"))
        assert [text for shard in shards for text in module.texts_of(shard)] == expected
        for shard in shards:
            assert next(iter(module.texts_of(shard))) == expected[shard.first_line - 1]
        assert len(shards) > 5 or len(data) < 10
    assert len({shard.output for shard in shards}) == len(shards)


def test_what_is_wrong_with_the_input(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        module.plan(str(tmp_path / "*.txt"), "jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: expected a JSON object with a text"):
        list(module.texts_of(module.plan(str(tmp_path / "a.jsonl"), "jsonl")[0]))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        module.plan(str(tmp_path / "b.parquet"), "jsonl")
