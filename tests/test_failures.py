"""Failing surroundings: full disks, folders that go away, losses that are not finite, memory that does not suffice."""

import contextlib
import importlib
import json
import logging
import math
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file

import main
from ner import checkpoint, losses, saved_model
from ner import run as folder
from ner import scores as scoring


@pytest.fixture(autouse=True, scope="module")
def world():
    """Make the tiny corpus and encoder before a test reads what was printed."""
    runs.world()


@contextlib.contextmanager
def full_disk(room: int = 1000):
    """Meanwhile the system refuses to write a file past `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def failing(real, which):
    """The function, on a full disk at those of its calls (from 1) that are in `which`."""
    calls = []

    def wrapped(*arguments, **keys):
        calls.append(1)
        with full_disk(100) if len(calls) in which else contextlib.nullcontext():
            return real(*arguments, **keys)

    return wrapped


def ended(arguments) -> int:
    try:
        main.main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def lines(run):
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in read]


def log(run) -> str:
    return (run / "train.log").read_text("utf-8")


@pytest.fixture
def graded(monkeypatch):
    """Dev scores as if the second epoch were the best of four."""

    grades, real = [], scoring.score_sentences

    def score_sentences(tagger, sentences, devices=None):
        scores, predicted, loss = real(tagger, sentences, devices)
        if tagger.engine.model.training:
            grades.append(1)
            scores["micro"]["f1"] = (0.1, 0.9, 0.5, 0.4)[(len(grades) - 1) % 4]
        return scores, predicted, loss

    monkeypatch.setattr(scoring, "score_sentences", score_sentences)


@pytest.mark.parametrize(("where", "name"), [(checkpoint, "save"), (saved_model, "save"), (checkpoint, "write_text")])
def test_one_full_disk_is_survived_and_nothing_is_lost(tmp_path, monkeypatch, graded, where, name):
    main.main(runs.argv(tmp_path, run="whole", epochs=4))
    with monkeypatch.context() as patched:
        patched.setattr(where, name, failing(getattr(where, name), {2}))
        assert ended(runs.argv(tmp_path, epochs=4)) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    warnings = [line for line in log(run).splitlines() if "WARNING" in line and "cannot be written" in line]
    assert len(warnings) == 1 and str(run) in warnings[0]
    assert lines(run) == lines(whole) and max(range(4), key=lambda i: lines(run)[i]["dev"]["micro"]["f1"]) == 1
    for file in ("model/model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert all(ours[key].equal(theirs[key]) for key in ours | theirs)


def test_a_disk_that_stays_full_ends_the_run_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch, capsys):
    main.main(runs.argv(tmp_path, run="whole", epochs=4))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", failing(checkpoint.save, {2, 3}))
        assert ended(runs.argv(tmp_path, epochs=4)) == 2
    run, text = tmp_path / "run", capsys.readouterr().err
    assert text.startswith(f"error: {run}") and "second time" in text and text.count("\n") == 1
    assert checkpoint.load(run)[1].epoch == 1
    assert ended(["--resume", str(run)]) == 0
    assert lines(run) == lines(tmp_path / "whole"), "what was whole goes on once there is room"


def test_curves_that_can_never_be_written_end_the_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_text", failing(checkpoint.write_text, range(100)))
    assert ended(runs.argv(tmp_path, epochs=4)) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run")[1].epoch == 2, "what could be written was"


@pytest.mark.parametrize(("which", "code"), [({2}, 0), ({2, 3}, 2)])
def test_after_the_last_epoch_it_is_tried_once_more(tmp_path, monkeypatch, which, code):
    monkeypatch.setattr(checkpoint, "save", failing(checkpoint.save, which))
    assert ended(runs.argv(tmp_path, epochs=2)) == code
    assert (tmp_path / "run" / "test.json").exists() == (code == 0)


@pytest.mark.parametrize("how", ["deleted", "a file"])
def test_a_folder_that_goes_away_in_mid_run_is_named(tmp_path, monkeypatch, capsys, how):
    run = tmp_path / "run"

    def save(self, progress, is_best=False, real=checkpoint.Checkpoints.save):
        if progress.epoch == 2:
            shutil.rmtree(run if how == "deleted" else run / "checkpoint", ignore_errors=True)
            if how == "a file":
                (run / "checkpoint").write_text("")
        real(self, progress, is_best)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
    assert ended(runs.argv(tmp_path, epochs=4)) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {run}") and output.err.count("\n") == 1
    assert "tries again at the next checkpoint" in output.out
    assert how == "a file" or not run.exists()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    handler = logging.FileHandler
    monkeypatch.setattr(logging, "FileHandler", lambda path, **keys: handler("/dev/full", **keys))
    assert ended(runs.argv(tmp_path)) == 0
    assert (tmp_path / "run" / "test.json").exists()


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/runs"])
def test_an_output_folder_that_cannot_be_made_is_named_at_once(tmp_path, capsys, output):
    (tmp_path / "file").write_text("")
    output = tmp_path / output
    assert ended(runs.argv(output)) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {output}") and "--output" in text and text.count("\n") == 1


def test_train_without_an_entity_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "train").write_text("北 O\n京 O\n\n好 O\n", "utf-8")
    assert ended(runs.argv(tmp_path / "out", train=tmp_path / "train")) == 2
    text = capsys.readouterr().err
    assert "no entity" in text and str(tmp_path / "train") in text and text.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_train_that_lost_its_entities_is_refused_when_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "train").write_text("北 B-LOC\n京 I-LOC\n\n好 O\n", "utf-8")
    assert ended(runs.argv(tmp_path, train=tmp_path / "train", epochs=1)) == 0
    (tmp_path / "train").write_text("北 O\n京 O\n\n好 O\n", "utf-8")
    capsys.readouterr()
    assert ended(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 2
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
    assert ended(runs.argv(tmp_path, tuning="adalora", precision="fp16", epochs=1, learning_rate=1e-3)) == 0
    assert judged == averaged and 3 not in judged and judged[-1] == 13
    tensors, progress = checkpoint.load(tmp_path / "run")
    assert progress.scale < 2.0**16 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_run_that_never_began_leaves_no_folder(tmp_path, capsys):
    assert ended(runs.argv(tmp_path / "out", train=tmp_path / "missing")) == 2
    assert ended(runs.argv(tmp_path / "out", pretrained=tmp_path)) == 2
    assert not list((tmp_path / "out").iterdir())


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
    assert ended(runs.argv(tmp_path, max_train_sentences=200, warmup_ratio=0)) == 2
    text, run = capsys.readouterr().err, tmp_path / "run"
    assert "epoch 2, step 3" in text and text.count("\n") == 1
    assert f"learning rate {5e-3 * 11 / 26:g}" in text
    named = [int(number) for number in text.partition(" lines ")[2].partition(";")[0].split(", ")]
    blocks = (runs.world() / "train").read_text("utf-8").split("\n")
    assert 1 <= len(named) <= 16 and all(number == 1 or blocks[number - 2] == "" for number in named)
    assert text.removeprefix("error: ").strip() in log(run), "the log has it too"
    assert checkpoint.load(run)[1].epoch == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(run)[0].values())


def test_a_learning_rate_from_another_world_is_caught(tmp_path, capsys):
    assert ended(runs.argv(tmp_path, learning_rate=1e30, max_grad_norm=1e30)) == 2
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
    assert ended(runs.argv(tmp_path, dropout=0)) == 0
    said = [line for line in log(tmp_path / "run").splitlines() if "out of memory" in line]
    assert len(said) == 2 and "16 windows x" in said[0] and "is 8 windows" in said[0] and "is 4 windows" in said[1]
    for ours, theirs in zip(lines(tmp_path / "run"), lines(tmp_path / "whole"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
    assert checkpoint.load(tmp_path / "run")[1].micro_batch == 4, "a resumed run remembers"


def test_no_memory_for_a_single_window_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "token_loss", scarce(0))
    assert ended(runs.argv(tmp_path)) == 2
    assert "out of memory on one window of" in capsys.readouterr().err


def test_another_error_is_not_taken_for_it(tmp_path, monkeypatch):
    def token_loss(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(losses, "token_loss", token_loss)
    with pytest.raises(RuntimeError, match="something else"):
        main.main(runs.argv(tmp_path))


@pytest.mark.parametrize("name", ["same", None])
def test_runs_started_in_the_same_instant_get_folders_of_their_own(tmp_path, name):
    made, gate = [], threading.Barrier(16)

    def start():
        gate.wait()
        made.extend(folder.new_run(tmp_path, name) for _ in range(5))

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == len(made) == 80 and {Path(path) for path in tmp_path.iterdir()} == set(made)


def test_two_runs_of_one_name_share_nothing(tmp_path):
    both = [runs.Process(runs.argv(tmp_path, seed=seed)) for seed in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    for run in tmp_path.iterdir():
        assert log(run).count("epoch 1 begin") == 1 and (run / "test.json").exists()
    assert lines(tmp_path / "run") != lines(tmp_path / "run-2")


@pytest.mark.parametrize(("room", "name"), [("ner.report", "write"), ("ner.card", "write_card")])
def test_a_report_or_a_card_that_fails_loses_no_run(tmp_path, monkeypatch, room, name):
    def write(_):
        raise ValueError("no page today")

    monkeypatch.setattr(importlib.import_module(room), name, write)
    assert ended(runs.argv(tmp_path)) == 0
    assert "no page today" in log(tmp_path / "run") and (tmp_path / "run" / "test.json").exists()
