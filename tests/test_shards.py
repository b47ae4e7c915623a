"""shards.py: whatever the encoding and wherever files are cut, the texts and their lines are those of the file."""

import gzip
import io
import os
import subprocess
import sys

import pytest
import tiny
import trained

from ner import config
from ner import shards as module
from ner.errors import UserError
from ner.texts import read_texts

LINES = ["".join(chars) for chars, _ in tiny.sentences(400, seed=6)]
LINES[7:7] = ["", trained.TEXT * 200]


def test_shards_of_lines_are_the_file(tmp_path, monkeypatch):
    """Whatever the encoding and wherever it is cut, shard by shard the texts and their lines are those of the file."""
    monkeypatch.setattr(module, "SMALLEST", 2000)
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
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(UserError, match="no such file"):
        module.plan(str(tmp_path / "*.txt"), "jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: expected a JSON object with a text"):
        list(module.texts_of(module.plan(str(tmp_path / "a.jsonl"), "jsonl")[0]))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"abc\n"))
    with pytest.raises(UserError, match=r"a.txt.gz:1: a NUL character|neither UTF-8 nor GB18030"):
        [list(module.texts_of(shard)) for shard in module.plan(str(tmp_path / "a.txt.gz"), "jsonl")]
    with pytest.raises(UserError, match="no file system that pyarrow knows"):
        module.plan("s4://bucket/*.txt", "jsonl")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(UserError, match="the column text holds int64; expected strings"):
        module.plan(str(tmp_path / "numbers.parquet"), "jsonl")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        module.plan(str(tmp_path / "b.parquet"), "jsonl")


@pytest.mark.parametrize("pattern, files", [
    ("texts/*.txt", ["texts/a.txt", "texts/b[1].txt"]),
    ("texts/**/*.txt", ["texts/a.txt", "texts/b[1].txt", "texts/sub/c.txt"]),
    ("texts/[!b]*.txt", ["texts/a.txt"]), ("texts/?.txt", ["texts/a.txt"]), ("texts/b[1].txt", ["texts/b[1].txt"]),
])  # fmt: skip
def test_patterns_name_the_same_files_on_disk_and_on_object_storage(tmp_path, pattern, files):
    """Object storage is stood for by fsspec's memory, which pyarrow reaches by a URL as it does s3://."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("texts/a.txt", "texts/b[1].txt", "texts/sub/c.txt", "texts/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("北京\n上海\n", "utf-8")
        memory.pipe(f"{tmp_path}/{name}", "北京\n上海\n".encode())
    url = f"fsspec+memory:/{tmp_path}"
    if pattern != "texts/b[1].txt":  # on object storage a pattern, whose one match is b1.txt
        shards = module.plan(f"{url}/{pattern}", "jsonl")
        assert [shard.file for shard in shards] == [f"{url}/{name}" for name in files]
        assert list(module.texts_of(shards[0])) == ["北京", "上海"]
    assert [shard.file for shard in module.plan(f"{tmp_path}/{pattern}", "jsonl")] == [str(tmp_path / f) for f in files]
    memory.rm(str(tmp_path), recursive=True)


def test_parquet_on_object_storage(tmp_path):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": LINES[:60]}), tmp_path / "a.parquet", row_group_size=25)
    memory.pipe("/bucket/a.parquet", (tmp_path / "a.parquet").read_bytes())
    shards = module.plan("fsspec+memory://bucket/*.parquet", "parquet")
    assert [(shard.start, shard.first_line) for shard in shards] == [(0, 1), (1, 26), (2, 51)]
    assert [text for shard in shards for text in module.texts_of(shard)] == LINES[:60]
    memory.rm("/bucket", recursive=True)


def test_bytes_that_do_not_fit_are_told_of(tmp_path):
    (tmp_path / "a.txt").write_bytes("北京\n上".encode() + b"\xff\n" + "天津\n".encode() * 20)
    (shard,), damaged = module.plan(str(tmp_path / "a.txt"), "jsonl"), []
    assert list(module.texts_of(shard, damaged))[:3] == ["北京", "上\ufffd", "天津"] and damaged == [2]


def test_large_files_are_cut_into_about_as_many_shards_as_small_ones_into_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1000)
    monkeypatch.setattr(module, "LARGEST", 3000)
    monkeypatch.setattr(module, "SHARDS", 10)
    monkeypatch.setattr(module, "READ_BYTES", 100)
    for lines, expected in ((50, 5), (200, 10), (900, 30)):  # of 100 bytes each
        (tmp_path / "a.txt").write_text(("x" * 99 + "\n") * lines)
        assert len(module.plan(str(tmp_path / "a.txt"), "jsonl")) == expected


MEMORY = 56 << 20  # beyond what the process has when it begins
IN_LITTLE_MEMORY = """
import resource, sys
import pyarrow.fs, pyarrow.parquet
from ner import shards
from ner.texts import chunks
shards.SMALLEST = shards.LARGEST = 1 << 40
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
if sys.argv[3] == "whole":
    open(sys.argv[1], "rb").read()
shard, *others = shards.plan(sys.argv[1], "jsonl")
assert not others
print(sum(len(text) for chunk in chunks(shards.texts_of(shard)) for text in chunk))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is limited by way of Linux's /proc")
@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_shard_larger_than_memory_streams(tmp_path, ending, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file, text, count = tmp_path / f"a.{ending}", "王芳在北京。" * 300, 16 << 10
    if ending == "parquet":  # of distinct texts, else its dictionary makes it small
        texts = pyarrow.array([f"{number}{text}" for number in range(count)])
        parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=count, compression="none")
    else:
        with file.open("w", encoding="utf-8") as stream:
            for number in range(count):
                stream.write(f"{number}{text}\n" if ending == "txt" else f'{{"text": "{number}{text}"}}\n')
    assert file.stat().st_size > 1.5 * MEMORY

    def run(how):
        command = [sys.executable, "-c", IN_LITTLE_MEMORY, str(file), str(MEMORY), how]
        environment = {**os.environ, "PYTHONPATH": str(config.ROOT), "ARROW_DEFAULT_MEMORY_POOL": "system"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert "MemoryError" in run("whole").stderr  # the limit is one
    done = run("stream")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(len(str(number)) for number in range(count)) + count * len(text)
