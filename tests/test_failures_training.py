"""Training that cannot go on: no entity to learn, numbers that are not finite, memory that does not suffice."""

import math

import pytest
import runs
import torch
from runs import exit_code, untimed_metrics

import main
from ner import checkpoint, losses


@pytest.fixture(autouse=True, scope="module")
def world():
    """Make the tiny corpus and encoder before a test reads what was printed."""
    runs.world()


def test_train_without_an_entity_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "train").write_text("北 O\n京 O\n\n好 O\n", "utf-8")
    assert exit_code(*runs.argv(tmp_path / "out", train=tmp_path / "train")) == 2
    text = capsys.readouterr().err
    assert "no entity" in text and str(tmp_path / "train") in text and text.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_train_that_lost_its_entities_is_refused_when_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "train").write_text("北 B-LOC\n京 I-LOC\n\n好 O\n", "utf-8")
    assert exit_code(*runs.argv(tmp_path, train=tmp_path / "train", epochs=1)) == 0
    (tmp_path / "train").write_text("北 O\n京 O\n\n好 O\n", "utf-8")
    capsys.readouterr()
    assert exit_code("--resume", tmp_path / "run", "--epochs", 2) == 2
    assert "no entity" in capsys.readouterr().err


def test_a_float16_step_that_overflows_is_left_out_whole(tmp_path, monkeypatch):
    """Neither the average nor AdaLoRA's scores take part in it, and the scale is halved."""
    from ner import adalora
    from ner.optimizer import Optimizer

    steps, judged, averaged = [], [], []

    def step(self, rate, max_norm, real=Optimizer.step):
        steps.append(1)
        if len(steps) == 3:
            next(iter(self.weights.values())).grad.fill_(math.inf)
        return real(self, rate, max_norm)

    def after_step(model, step, *rest, real=adalora.after_step):
        judged.append(step)
        real(model, step, *rest)

    def average(self, step, real=Optimizer.average):
        averaged.append(step)
        real(self, step)

    monkeypatch.setattr(Optimizer, "step", step)
    monkeypatch.setattr(Optimizer, "average", average)
    monkeypatch.setattr(adalora, "after_step", after_step)
    assert exit_code(*runs.argv(tmp_path, tuning="adalora", precision="fp16", epochs=1, learning_rate=1e-3)) == 0
    assert judged == averaged and 3 not in judged and judged[-1] == 13
    tensors, progress = checkpoint.load(tmp_path / "run")
    assert progress.scale < 2.0**16 and all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_with_all_that_is_needed(tmp_path, monkeypatch, capsys, kind):
    calls = []

    def token_loss(logits, labels, real=losses.token_loss, **keys):
        loss = real(logits, labels, **keys)
        calls.append(1)
        if len(calls) == 16:  # the third step of the second epoch
            if kind == "loss":
                return loss * math.nan
            logits.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(losses, "token_loss", token_loss)
    assert exit_code(*runs.argv(tmp_path, max_train_sentences=200, warmup_ratio=0)) == 2
    text, run = capsys.readouterr().err, tmp_path / "run"
    assert "epoch 2, step 3" in text and text.count("\n") == 1
    assert f"learning rate {5e-3 * 11 / 26:g}" in text
    named = [int(number) for number in text.partition(" lines ")[2].partition(";")[0].split(", ")]
    blocks = (runs.world() / "train").read_text("utf-8").split("\n")
    assert 1 <= len(named) <= 16 and all(number == 1 or blocks[number - 2] == "" for number in named)
    assert text.removeprefix("error: ").strip() in runs.log(run), "the log has it too"
    assert checkpoint.load(run)[1].epoch == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(run)[0].values())


def test_a_learning_rate_from_another_world_is_caught(tmp_path, capsys):
    assert exit_code(*runs.argv(tmp_path, learning_rate=1e30, max_grad_norm=1e30)) == 2
    text = capsys.readouterr().err
    assert "is not finite" in text or "learning rate" in text and "e+" in text
    assert not (tmp_path / "run" / "test.json").exists()


def scarce(limit):
    """Return the loss of a device that has memory for `limit` windows."""

    def token_loss(logits, labels, real=losses.token_loss, **keys):
        if len(labels) > limit:
            real(logits, labels, **keys).backward()  # half a gradient is there already when memory runs out
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(logits, labels, **keys)

    return token_loss


def test_out_of_memory_halves_the_batch_and_computes_the_same(tmp_path, monkeypatch):
    main.main(runs.argv(tmp_path, run="whole", dropout=0))
    monkeypatch.setattr(losses, "token_loss", scarce(5))
    assert exit_code(*runs.argv(tmp_path, dropout=0)) == 0
    said = [line for line in runs.log(tmp_path / "run").splitlines() if "out of memory" in line]
    assert len(said) == 2 and "16 windows x" in said[0] and "is 8 windows" in said[0] and "is 4 windows" in said[1]
    for ours, theirs in zip(untimed_metrics(tmp_path / "run"), untimed_metrics(tmp_path / "whole"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
    assert checkpoint.load(tmp_path / "run")[1].micro_batch == 4, "a resumed run remembers"


def test_no_memory_for_a_single_window_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "token_loss", scarce(0))
    assert exit_code(*runs.argv(tmp_path)) == 2
    assert "out of memory on one window of" in capsys.readouterr().err


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def token_loss(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(losses, "token_loss", token_loss)
    with pytest.raises(RuntimeError, match="something else"):
        main.main(runs.argv(tmp_path))
