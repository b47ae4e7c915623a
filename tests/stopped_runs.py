"""Runs that are stopped and go on, and what they must come to."""

import contextlib

import runs
from runs import untimed_metrics
from safetensors.torch import load_file

from ner import checkpoint

EPOCHS = 4
OFTEN = {"epochs": EPOCHS, "checkpoint_minutes": 0.0001}  # a checkpoint after each step


def assert_same(run, other):
    """Fail unless two runs with tuning full have the same metrics, test scores and tensors, bit for bit."""
    assert untimed_metrics(run) == untimed_metrics(other)
    assert (run / "test.json").read_bytes() == (other / "test.json").read_bytes()
    for name in ("model/model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype and ours[key].equal(theirs[key]), key


def began(run):
    """How often an epoch began in this folder, by its log."""
    with contextlib.suppress(OSError):
        return runs.log(run).count(" begin\n")
    return 0


def writing(run):
    """Whether a checkpoint is being written at this moment."""
    with contextlib.suppress(OSError):
        return any(path.name != checkpoint.FILE.name for path in (run / "checkpoint").iterdir())
    return False
