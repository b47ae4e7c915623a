"""ray_tagging.py: a local Ray of two workers finds what one process finds, one of them killed in the middle."""

import json
import os
import socket
import subprocess
import sys

import pytest
import trained
from test_shards import LINES

import predict
from ner import ray_tagging
from ner import shards as shard_module
from ner.config import ROOT

# A worker dies by SIGKILL once, when it has written a part of the shard that the marker names.
COMMAND = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import predict
from ner import ray_tagging, shards, texts
from ner.ray_tagging import ShardTagger
marker = Path(sys.argv[2])
shards.SMALLEST, shards.READ_BYTES = 8000, 1000

class Killed(ShardTagger):
    def _rows(self, shard, damaged):
        texts.CHUNK_TEXTS = 20
        for number, rows in enumerate(super()._rows(shard, damaged)):
            if number == 1 and shard.output == "part-000002.jsonl" and not marker.exists():
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield rows

ray_tagging.ShardTagger = Killed
predict.main(sys.argv[3:])
"""


def refused(arguments, capsys) -> str:
    """Return the one line with which predict.py refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        predict.main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.txt").write_text("a\n")
    command = ["--ray", "--run", str(trained.exported()), "--input", str(tmp_path / "in.txt"), "--output"]
    assert 'pip install "ray[data]"' in refused([*command, str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--input", "x", "--json"], "--ray needs --input"), (["--input", "x"], "--ray needs --input"),
    (["text"], "--ray needs --input"),
    (["--input", "x", "--output", "y", "--format", "html"], "jsonl or parquet"),
    (["--input", "x", "--output", "y", "--uncertain", "3"], "without --uncertain"),
    (["--input", "x", "--output", "s3://bucket/tagged"], "expected a folder on a disk that all machines share"),
])  # fmt: skip
def test_what_it_does_not_do_is_refused(arguments, message, capsys):
    assert message in refused(["--ray", "local", *arguments], capsys)


def test_a_cluster_seen_from_outside_is_refused(capsys):
    """Ray Client, which such an address means, ends in a traceback within Ray Data."""
    arguments = ["--ray", "ray://head:10001", "--input", "x", "--output", "y"]
    assert "run it on a machine of the cluster" in refused(arguments, capsys)


def test_an_address_where_nothing_listens_is_one_line_at_once(tmp_path, capsys):
    pytest.importorskip("ray", reason="Ray is optional and not installed")
    (tmp_path / "in.txt").write_text("a\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["--ray", address, "--run", str(trained.exported()), "--input", str(tmp_path / "in.txt"), "--output"]
    said = refused([*command, str(tmp_path / "out")], capsys)
    assert f"--ray {address}: no Ray cluster can be reached there (Connection refused)" in said
    (tmp_path / "file").touch()
    assert "is a file" in refused([*command, str(tmp_path / "file")], capsys)


@pytest.mark.parametrize(("variable", "address"), [("", "local"), ("head:6379", "head:6379")])
def test_without_an_address_it_joins_no_cluster_but_the_one_of_the_environment(monkeypatch, variable, address):
    ray = pytest.importorskip("ray", reason="Ray is optional and not installed")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(ray_tagging, "_check_reachable", lambda address: None)
    joined = []
    monkeypatch.setattr(ray, "init", lambda address, **_: joined.append(address))
    ray_tagging._connect(ray, "", ray_tagging.Settings("run", "auto", "auto", 8, 1))
    assert joined == [address]


def test_a_line_that_is_no_text_is_named_with_its_file(tmp_path):
    pytest.importorskip("ray", reason="Ray is optional and not installed")
    file, output = tmp_path / "in.jsonl", tmp_path / "out"
    file.write_text('{"text": "a"}\n{"txt": "b"}\n')
    command = [sys.executable, str(ROOT / "predict.py"), "--run", str(trained.exported()), "--ray", "local"]
    command += ["--workers", "1", "--input", str(file), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"error: a shard could not be tagged: {file}:2: expected a JSON object with a text, such as "
        f'{{"text": "…"}}; whole shards stay in {output}'
    )


def entities_of(rows):
    return [[(e["text"], e["type"], e["start"], e["end"]) for e in row["entities"]] for row in rows]


def test_two_workers_find_what_one_process_finds_though_one_is_killed(tmp_path):
    pytest.importorskip("ray", reason="Ray is optional and not installed")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:50]), "utf-8")
    parquet.write_table(pyarrow.table({"text": LINES[:60]}), tmp_path / "c.parquet", row_group_size=25)
    output, marker = tmp_path / "out", tmp_path / "killed"
    command = [sys.executable, "-c", COMMAND, str(ROOT), str(marker), "--run", str(trained.exported())]
    command += ["--ray", "local", "--workers", "2", "--input", str(tmp_path / "*.*"), "--output", str(output)]

    def tag():
        environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    said = tag().stdout.splitlines()[-1]  # Ray says before it that a worker died
    assert marker.exists() and said == f"{len(LINES) + 50 + 60} texts tagged into {output}"
    parts = sorted(output.glob("part-*.jsonl"))
    assert {path.name for path in output.iterdir()} == {"shards.json"} | {part.name for part in parts}
    rows = [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]
    expected = predict.load(trained.exported())
    for name, lines in (("a.txt", LINES), ("b.jsonl", LINES[:50]), ("c.parquet", LINES[:60])):
        mine = [row for row in rows if row["file"].endswith(name)]
        assert [(row["line"], row["text"]) for row in mine] == list(enumerate(lines, 1))  # none lost, none twice
        assert entities_of(mine) == [trained.plain(entities) for entities in expected.predict(lines)]
    assert len(parts) > 5
    kept = {part: part.stat().st_mtime_ns for part in parts[1:]}
    first = parts[0].read_bytes()
    parts[0].unlink()
    said = tag().stderr
    assert parts[0].read_bytes() == first and {part: part.stat().st_mtime_ns for part in kept} == kept
    assert f"{len(parts) - 1} of {len(parts)} shards" in said


def tagged_here(tmp_path, file, form):
    """Tag a file of one shard as an actor does, without Ray; return the file of results and what was said."""
    (shard,) = shard_module.plan(str(file), form)
    settings = ray_tagging.Settings(str(trained.exported()), "onnx", "auto", 8, 1)
    row = ray_tagging.ShardTagger(settings, str(tmp_path), form)({name: [value] for name, value in vars(shard).items()})
    return tmp_path / shard.output, row


ODD = [trained.TEXT, "", "😀王芳\u3000去北京\ud800", "a\nb"]


def test_results_hold_any_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ODD), "utf-8")
    expected = [trained.plain(entities) for entities in predict.load(trained.exported(), engine="onnx").predict(ODD)]
    lines, row = tagged_here(tmp_path, file, "jsonl")
    rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == ODD and entities_of(rows) == expected
    assert row == {"texts": [len(ODD)], "damaged": [""]}
    table, _ = tagged_here(tmp_path, file, "parquet")
    rows = parquet.read_table(table).to_pylist()
    assert [row["text"] for row in rows] == [text.replace("\ud800", "\ufffd") for text in ODD]
    assert entities_of(rows) == expected and [(row["file"], row["line"]) for row in rows] == [
        (str(file), number) for number in range(1, len(ODD) + 1)
    ]
    assert parquet.read_schema(table).field("line").type == pyarrow.int64()


def test_damaged_bytes_are_told_of(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "in.txt").write_bytes("北京\n".encode() * 9 + b"\xff\n")
    _, row = tagged_here(tmp_path, tmp_path / "in.txt", "jsonl")
    assert row["damaged"] == [
        f"{tmp_path / 'in.txt'}:10: not utf-8; what does not fit became \ufffd in 1 lines of part-000000.jsonl"
    ]


@pytest.mark.parametrize("change", ["another run", "another file", "a foreign folder", "a damaged plan"])
def test_results_of_something_else_are_not_mixed_in(tmp_path, change):
    pytest.importorskip("pyarrow")
    from ner.errors import UserError

    (tmp_path / "in.txt").write_text("北京\n", "utf-8")
    settings = ray_tagging.Settings("run", "auto", "auto", 8, 1)
    shards, output = shard_module.plan(str(tmp_path / "*.txt"), "jsonl"), tmp_path / "out"
    assert ray_tagging._planned(shards, output, settings) == shards == ray_tagging._planned(shards, output, settings)
    if change == "another run":
        settings = ray_tagging.Settings("other", "auto", "auto", 8, 1)
    elif change == "another file":
        (tmp_path / "in.txt").write_text("北京上海\n", "utf-8")
    else:
        plan = output / ray_tagging.PLAN
        plan.write_text("{") if change == "a damaged plan" else plan.rename(output / "other.json")
    with pytest.raises(UserError, match="name a new folder"):
        ray_tagging._planned(shard_module.plan(str(tmp_path / "*.txt"), "jsonl"), output, settings)
