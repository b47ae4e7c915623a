"""What predict.py refuses: one line and code 2 for arguments, outputs, models and exports that are wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trained
from trained import TEXT

import predict

ROOT = Path(predict.__file__).parent


@pytest.fixture(scope="module")
def run():
    return trained.exported()


def test_wrong_arguments_cost_no_torch(run, tmp_path):
    """Each ends with code 2 (--help: 0) and one clear line before torch is imported."""
    (tmp_path / "same").write_text("x")
    cases = [
        (["--help"], ""),
        (["--input", "none.txt"], "none.txt: no such file"),
        (["--input", str(tmp_path)], "a folder; give a file"),
        (["a", "--input", "b"], "not both"),
        (["--json", "--format", "bio", "a"], "contradict"),
        (["--run", "none", "a"], "none: no such folder"),
        (["--batch_size", "0", "a"], "at least 1"),
        (["--threads", "0", "a"], "at least 1"),
        (["--uncertain", "0", "a"], "at least 1"),
        (["--engine", "onnx", "--precision", "bf16", "a"], "--precision"),
        (["--format", "xml", "a"], "invalid choice"),
        (["--input", str(tmp_path / "same"), "--output", str(tmp_path / "same")], "same file"),
    ]
    code = (
        "import sys, io, json, contextlib, predict\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
        "        try: predict.main(arguments)\n"
        "        except SystemExit as stop: code = stop.code\n"
        "    print(json.dumps([code, said.getvalue(), 'torch' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([arguments for arguments, _ in cases])],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases)
    for (arguments, message), (code, said, torch_imported) in zip(cases, answers, strict=True):
        assert message in said and code == (0 if arguments == ["--help"] else 2) and not torch_imported, arguments
        assert "Traceback" not in said
        if message and "invalid choice" not in message:
            assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda m: os.truncate(m / "model.safetensors", 999), "model.safetensors"),
        (lambda m: (m / "ner.json").unlink(), "ner.json"),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
        (lambda m: (m / "ner.json").write_text((m / "ner.json").read_text().replace('"B-LOC"', '"B-X"')), "labels"),
    ],
)
def test_damaged_model(run, tmp_path, capsys, harm, message):
    shutil.copytree(run, tmp_path / "run")
    harm(tmp_path / "run" / "model")
    with pytest.raises(SystemExit) as stop:
        predict.main(["--engine", "torch", "--run", str(tmp_path / "run"), TEXT])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "output, message",
    [
        ("folder", "folder: a folder; give the name of a file to write"),
        ("none/out", "out: cannot be written (No such file or directory)"),
        ("/dev/full", "/dev/full: cannot be written (No space left on device)"),
    ],
)
def test_output_that_cannot_be_written(run, tmp_path, monkeypatch, capsys, output, message):
    if output == "/dev/full" and not os.path.exists(output):
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(predict, "load", lambda *_: trained.Stub())
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(run), TEXT, "--output", str(tmp_path / output)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_output_is_replaced_only_when_all_is_tagged(run, tmp_path, capsys):
    """A binary input is rejected with the old output untouched and nothing left beside it."""
    (tmp_path / "in").write_bytes((TEXT + "\n").encode() * 5000 + b"PK\x03\x04\x00\n")
    (tmp_path / "keep.jsonl").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "keep.jsonl")])
    assert stop.value.code == 2 and "in:5001: a NUL character" in capsys.readouterr().err
    assert (tmp_path / "keep.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "keep.jsonl"]


def test_one_process_only(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(run), TEXT])
    assert stop.value.code == 2 and "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda m: os.truncate(m / "model_int8.onnx", 5000), "model_int8.onnx: ONNX Runtime cannot load it"),
        (lambda m: os.truncate(m / "model_int8.onnx", 0), "model_int8.onnx: cannot be read"),
        (lambda m: (m / "model_int8.onnx").unlink(), "--engine onnx needs model_int8.onnx"),
        (
            lambda m: (m / "ner.json").write_text((m / "ner.json").read_text().replace('"B-LOC",', "")),
            "its labels and those of ner.json differ",
        ),
        (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json: the tokenizer cannot be loaded"),
        (lambda m: (m / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: cannot be used"),
    ],
)
def test_damaged_export(run, tmp_path, capsys, harm, message):
    """One line and code 2; never another engine where onnx was asked for."""
    shutil.copytree(run, tmp_path / "run")
    harm(tmp_path / "run" / "model")
    with pytest.raises(SystemExit) as stop:
        predict.main(["--engine", "onnx", "--run", str(tmp_path / "run"), TEXT])
    said = capsys.readouterr()
    assert stop.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out
