"""ray_tagging.py: a local Ray of two workers finds what one process finds, and goes on where it was stopped."""

import json
import os
import subprocess
import sys

import pytest
import trained
from test_shards import LINES

import predict
from ner.config import ROOT


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.txt").write_text("a\n")
    command = ["--ray", "--run", str(trained.exported()), "--input", str(tmp_path / "in.txt"), "--output"]
    with pytest.raises(SystemExit) as stop:
        predict.main([*command, str(tmp_path / "out")])
    assert stop.value.code == 2 and 'pip install "ray[data]"' in capsys.readouterr().err
    for arguments, message in (
        (["--input", "x", "--json"], "--ray needs --input"),
        (["--input", "x", "--output", "y", "--format", "html"], "jsonl or parquet"),
        (["--input", "x", "--output", "y", "--uncertain", "3"], "without --uncertain"),
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main(["--ray", "local", *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_two_workers_find_what_one_process_finds(tmp_path):
    pytest.importorskip("ray", reason="Ray is optional and not installed")
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("\n".join(LINES), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:50]), "utf-8")
    parquet.write_table(pyarrow.table({"text": LINES[:60]}), tmp_path / "c.parquet", row_group_size=25)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]; from ner import shards; import predict\n"
        "shards.SHARD_BYTES = 8000\n"
        "predict.main(sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), "--run", str(trained.exported()), "--ray", "local"]
    command += ["--workers", "2", "--input", str(tmp_path / "*.*"), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

    def tag(*more):
        done = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    tag()
    parts = sorted((tmp_path / "out").glob("part-*.jsonl"))
    rows = [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]
    expected = predict.load(trained.exported())
    for name, lines in (("a.txt", LINES), ("b.jsonl", LINES[:50]), ("c.parquet", LINES[:60])):
        mine = [row for row in rows if row["file"].endswith(name)]
        assert [(row["line"], row["text"]) for row in mine] == list(enumerate(lines, 1))
        for row, entities in zip(mine, expected.predict(lines), strict=True):
            assert [(e["text"], e["type"], e["start"], e["end"]) for e in row["entities"]] == trained.plain(entities)
    assert len(parts) > 5
    kept = {part: part.stat().st_mtime_ns for part in parts[1:]}
    first = parts[0].read_bytes()
    parts[0].unlink()
    said = tag().stderr
    assert parts[0].read_bytes() == first and {part: part.stat().st_mtime_ns for part in kept} == kept
    assert f"{len(parts) - 1} of {len(parts)} shards" in said
