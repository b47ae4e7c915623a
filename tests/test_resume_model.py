"""The model of the best epoch on resume: written again where it is not there, not whole or not of that epoch."""

import json
import shutil

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from stopped_runs import assert_same

import main
from ner import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_between_checkpoint_and_model_the_best_model_is_written_again(tmp_path, monkeypatch):
    from ner import saved_model

    def killed(*_):
        raise SystemExit(9)

    main.main(runs.argv(tmp_path, run="whole", epochs=1))
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(saved_model, "save", killed)
        main.main(runs.argv(tmp_path, epochs=1))
    assert checkpoint.load(tmp_path / "run")[1].best == 1 and not (tmp_path / "run" / "model").exists()
    main.main(["--resume", str(tmp_path / "run")])
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_whole_model_of_the_best_epoch_stays_on_resume_with_what_lies_beside_it(tmp_path):
    main.main(runs.argv(tmp_path, epochs=1))
    model = tmp_path / "run" / "model"
    (model / "mine.onnx").write_bytes(b"exported by hand")
    before = (model / "model.safetensors").stat()
    main.main(["--resume", str(tmp_path / "run")])
    after = (model / "model.safetensors").stat()
    assert (model / "mine.onnx").read_bytes() == b"exported by hand"
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["missing", "cut", "older", "unknown"])
def test_a_model_that_is_not_that_of_the_best_epoch_is_written_again(tmp_path, damage):
    main.main(runs.argv(tmp_path, run="whole", epochs=2))
    main.main(runs.argv(tmp_path, epochs=2))
    assert checkpoint.load(tmp_path / "run")[1].best == 2
    weights, ner_json = (tmp_path / "run" / "model" / name for name in ("model.safetensors", "ner.json"))
    meta = json.loads(ner_json.read_text("utf-8"))
    assert meta["epoch"] == 2
    if damage == "missing":
        shutil.rmtree(weights.parent)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        zeros = {name: torch.zeros_like(weight) for name, weight in load_file(weights).items()}
        save_file(zeros, weights, {"format": "pt"})
        meta.pop("epoch")
        ner_json.write_text(json.dumps(meta | ({"epoch": 1} if damage == "older" else {})), "utf-8")
    main.main(["--resume", str(tmp_path / "run")])
    assert_same(tmp_path / "run", tmp_path / "whole")
