"""Disks that are full and folders that go away or cannot be made: nothing is lost, and what is wrong is named."""

import contextlib
import importlib
import logging
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import runs
from runs import exit_code, untimed_metrics
from safetensors.torch import load_file

import main
from ner import checkpoint, saved_model, training
from ner import run as folder
from ner import scores as scoring

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert exit_code(*runs.argv(tmp_path, epochs=4)) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    warnings = [line for line in runs.log(run).splitlines() if "WARNING" in line and "cannot be written" in line]
    assert len(warnings) == 1 and str(run) in warnings[0]
    epochs = untimed_metrics(run)
    assert epochs == untimed_metrics(whole) and max(range(4), key=lambda i: epochs[i]["dev"]["micro"]["f1"]) == 1
    for file in ("model/model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert all(ours[key].equal(theirs[key]) for key in ours | theirs)


def test_a_disk_that_stays_full_ends_the_run_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch, capsys):
    main.main(runs.argv(tmp_path, run="whole", epochs=4))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", failing(checkpoint.save, {2, 3}))
        assert exit_code(*runs.argv(tmp_path, epochs=4)) == 2
    run, text = tmp_path / "run", capsys.readouterr().err
    assert text.startswith(f"error: {run}") and "second time" in text and text.count("\n") == 1
    assert checkpoint.load(run)[1].epoch == 1
    assert exit_code("--resume", run) == 0
    assert untimed_metrics(run) == untimed_metrics(tmp_path / "whole"), "what was whole goes on once there is room"


def test_curves_that_can_never_be_written_end_the_run_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "write_text", failing(checkpoint.write_text, range(100)))
    assert exit_code(*runs.argv(tmp_path, epochs=4)) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run")[1].epoch == 2, "what could be written was"


@pytest.mark.parametrize(("which", "code"), [({2}, 0), ({2, 3}, 2)])
def test_after_the_last_epoch_it_is_tried_once_more(tmp_path, monkeypatch, which, code):
    monkeypatch.setattr(checkpoint, "save", failing(checkpoint.save, which))
    assert exit_code(*runs.argv(tmp_path, epochs=2)) == code
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
    assert exit_code(*runs.argv(tmp_path, epochs=4)) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {run}") and output.err.count("\n") == 1
    assert "tries again at the next checkpoint" in output.out
    assert how == "a file" or not run.exists()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.FileHandler, "_open", lambda handler: open("/dev/full", "a"))  # noqa: SIM115
    assert exit_code(*runs.argv(tmp_path)) == 0
    assert (tmp_path / "run" / "test.json").exists()


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/runs"])
def test_an_output_folder_that_cannot_be_made_is_named_at_once(tmp_path, capsys, output):
    (tmp_path / "file").write_text("")
    output = tmp_path / output
    assert exit_code(*runs.argv(output)) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {output}") and "--output" in text and text.count("\n") == 1


def test_a_run_that_never_began_leaves_no_folder(tmp_path, capsys):
    assert exit_code(*runs.argv(tmp_path / "out", train=tmp_path / "missing")) == 2
    assert exit_code(*runs.argv(tmp_path / "out", pretrained=tmp_path)) == 2
    assert not list((tmp_path / "out").iterdir())


def test_a_run_whose_config_cannot_be_written_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "write_text", failing(training.write_text, {1}))
    assert exit_code(*runs.argv(tmp_path / "out")) == 2
    assert "config.yaml: cannot be read or written" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


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
        assert runs.log(run).count("epoch 1 begin") == 1 and (run / "test.json").exists()
    assert untimed_metrics(tmp_path / "run") != untimed_metrics(tmp_path / "run-2")


@pytest.mark.parametrize(("room", "name"), [("ner.report", "write"), ("ner.card", "write_card")])
def test_a_report_or_a_card_that_fails_loses_no_run(tmp_path, monkeypatch, room, name):
    def write(_):
        raise ValueError("no page today")

    monkeypatch.setattr(importlib.import_module(room), name, write)
    assert exit_code(*runs.argv(tmp_path)) == 0
    assert "no page today" in runs.log(tmp_path / "run") and (tmp_path / "run" / "test.json").exists()
