"""A checkpoint's file: versions, what lies beside it, what cannot be read."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import runs
from runs import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import main
from ner import checkpoint
from ner.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of two epochs."""
    output = tmp_path_factory.mktemp("checkpoint")
    main.main(runs.argv(output))
    return output / "run"


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def rewrite(run, change) -> None:
    """Write the checkpoint anew with change(metadata)."""
    path = run / checkpoint.FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(load_file(path), path, metadata)


def test_a_newer_format_is_said_to_be_newer(run, capsys):
    rewrite(run, lambda metadata: metadata.update(format=str(checkpoint.FORMAT + 1)))
    text = refused(capsys, "--resume", run)
    assert text.startswith(f"error: {run / checkpoint.FILE}: ") and "newer version" in text


def test_a_checkpoint_without_a_version_is_of_the_first_one(run):
    def as_before(metadata):
        del metadata["format"]
        progress = json.loads(metadata["progress"])
        del progress["good_steps"], progress["encoder"]
        metadata["progress"] = json.dumps(progress)

    rewrite(run, as_before)
    assert checkpoint.load(run)[1].epoch == 2
    assert checkpoint.load(runs.ROOT / "tests/saved_runs/lora")[1].epoch == 3, "a run of before"


def test_what_lies_beside_a_checkpoint_stays(run):
    folder = run / "checkpoint"
    (folder / "copy of mine.safetensors").write_text("mine")
    (folder / "below").mkdir()
    (folder / ".nfs0001").write_text("open elsewhere")
    main.main(["--resume", str(run), "--epochs", "3"])
    assert {path.name for path in folder.iterdir()} == {
        "state.safetensors", "copy of mine.safetensors", "below", ".nfs0001",
    }  # fmt: skip
    assert checkpoint.load(run)[1].epoch == 3


def test_unreadable_is_not_called_damaged(run, capsys, monkeypatch):
    path = run / checkpoint.FILE

    def opened(self, *rest, real=Path.open, **keys):  # root may read whatever the mode says
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *rest, **keys)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.chdir(run.parent)
    text = refused(capsys, "--resume", "run")
    assert f"error: {path}: cannot be read" in text and "damaged" not in text


@pytest.mark.parametrize("text", ["", '{"epoch": 1, "tr', None], ids=["empty", "cut", "missing"])
def test_metrics_are_written_again_from_the_checkpoint(whole, run, text):
    """Killed between checkpoint and metrics.jsonl, or damaged since: nothing of it is lost."""
    (run / "metrics.jsonl").unlink()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    main.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((run / "finished.json").read_text())["epochs"] == 2


@pytest.mark.parametrize("f1", ["0.5", None, [1]])
def test_scores_that_are_no_numbers_are_damage(run, f1):
    def change(metadata):
        progress = json.loads(metadata["progress"])
        for line in progress["history"]:
            line["dev"]["micro"]["f1"] = f1
        metadata["progress"] = json.dumps(progress)

    rewrite(run, change)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(run)


def test_the_loss_scale_is_in_it(tmp_path):
    main.main(runs.argv(tmp_path, precision="fp16", epochs=1))
    progress = checkpoint.load(tmp_path / "run")[1]
    assert progress.scale <= 2.0**16 and 0 <= progress.good_steps <= 13
    if progress.scale == 2.0**16:
        assert progress.good_steps == 13
