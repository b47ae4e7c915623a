"""What cannot go on is named: another config, encoder or corpus, a run under way, a damaged checkpoint."""

import json
import shutil

import pytest
import runs
import tiny
from runs import refused, untimed_metrics
from safetensors.torch import load_file, save_file
from stopped_runs import began

import main
from ner import checkpoint


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_encoder_that_changed_since_is_named(tmp_path, capsys, tuning, name):
    encoder = shutil.copytree(runs.world() / "encoder", tmp_path / "encoder")
    main.main(runs.argv(tmp_path, pretrained=encoder, tuning=tuning, epochs=1))
    changed = encoder / name
    before = changed.read_bytes()
    if name == "model.safetensors":
        tensors = load_file(changed)
        changed.unlink()
        save_file({key: tensor + 1 for key, tensor in tensors.items()}, changed, {"format": "pt"})
    else:
        changed.write_bytes(before.replace("京".encode(), "亰".encode()))
    text = refused(capsys, "--resume", tmp_path / "run", "--epochs", 2)
    assert f"{name} of the encoder {encoder} changed" in text
    changed.unlink()
    changed.write_bytes(before)
    main.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    assert len(untimed_metrics(tmp_path / "run")) == 2


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, capsys):
    encoder = shutil.copytree(runs.world() / "encoder", tmp_path / "encoder")
    main.main(runs.argv(tmp_path, pretrained=encoder, epochs=1))
    before = contents(tmp_path / "run")
    tiny.encoder(encoder, seed=1)  # other weights
    assert "of the encoder" in refused(capsys, "--resume", tmp_path / "run", "--epochs", 2, "--test", "null")
    assert "may not differ" in refused(capsys, "--resume", tmp_path / "run", "--seed", 2)
    assert contents(tmp_path / "run") == before


def contents(run):
    """The bytes of a run's files."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("key", "value"), [("tuning", "lora"), ("seed", 2), ("batch_size", 8), ("max_length", 32),
                                            ("learning_rate", 1e-3), ("train", None),
                                            ("pretrained", None)])  # fmt: skip
def test_keys_that_may_not_differ_are_named(whole_run, capsys, tmp_path, key, value):
    if value is None:
        source = runs.world() / {"train": "train", "pretrained": "encoder"}[key]
        value = tmp_path / "other"
        shutil.copytree(source, value) if source.is_dir() else shutil.copy(source, value)
    text = refused(capsys, "--resume", whole_run, f"--{key}", value)
    assert f"{key} may not differ" in text and "epochs, output" in text


def test_training_sentences_that_changed_are_noticed(tmp_path, capsys):
    train = tmp_path / "train"
    shutil.copy(runs.world() / "train", train)
    main.main(runs.argv(tmp_path, train=train, epochs=1))
    train.write_text(train.read_text("utf-8").replace("O\n", "B-PER\n", 1), "utf-8")
    assert "sentences" in refused(capsys, "--resume", tmp_path / "run", "--epochs", 2)


def test_a_run_under_way_cannot_be_resumed_beside_it(tmp_path, capsys):
    process = runs.Process(runs.argv(tmp_path, epochs=50))
    runs.until(lambda: began(tmp_path / "run") >= 2, process)
    text = refused(capsys, "--resume", tmp_path / "run")
    process.kill()
    assert "another process" in text
    assert runs.Process(["--resume", tmp_path / "run", "--epochs", "2"]).wait() == 0, "a lock outlives its process"


def tamper(path, change):
    """Rewrites a checkpoint with change(tensors, progress as a dict)."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    tensors = load_file(path)
    progress = change(tensors, progress) or progress
    save_file(tensors, path, {"progress": progress if isinstance(progress, str) else json.dumps(progress)})


BIAS = "classifier.bias"
DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "nested": lambda path: tamper(path, lambda tensors, progress: "[" * 100_000),
    "list": lambda path: tamper(path, lambda tensors, progress: "[]"),
    "keys": lambda path: tamper(path, lambda tensors, progress: {"epoch": 1}),
    "type": lambda path: tamper(path, lambda tensors, progress: progress | {"epoch": "1"}),
    "history": lambda path: tamper(path, lambda tensors, progress: progress | {"history": [{"evil": 1}]}),
    "best": lambda path: tamper(path, lambda tensors, progress: progress | {"best": 99}),
    "negative": lambda path: tamper(path, lambda tensors, progress: progress | {"step": -3}),
    "zero": lambda path: tamper(path, lambda tensors, progress: progress | {"micro_batch": 0}),
    "missing": lambda path: tamper(path, lambda tensors, progress: tensors.pop(f"weight/{BIAS}") is None),
    "more": lambda path: tamper(
        path, lambda tensors, progress: tensors.update(other=tensors[f"weight/{BIAS}"].clone())
    ),
    "shape": lambda path: tamper(
        path, lambda tensors, progress: tensors.update({f"weight/{BIAS}": tensors[f"weight/{BIAS}"][:2].clone()})
    ),
    "moment": lambda path: tamper(
        path, lambda tensors, progress: tensors.update({f"exp_avg/{BIAS}": tensors[f"step/{BIAS}"].clone()})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named(whole_run, tmp_path, capsys, damage):
    shutil.copytree(whole_run, tmp_path / "run")
    damage(tmp_path / "run" / checkpoint.FILE)
    assert checkpoint.FILE.name in refused(capsys, "--resume", tmp_path / "run")
