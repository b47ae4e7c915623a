"""Ctrl-C and SIGTERM: a first signal ends the step or the scoring, a second one the process."""

import signal

import pytest
import runs
from runs import untimed_metrics
from stopped_runs import EPOCHS, OFTEN, began

import main
from ner import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_ends_the_step_and_says_how_to_go_on(whole_run, tmp_path, number):
    run = tmp_path / "run"
    process = runs.Process(runs.argv(tmp_path, epochs=EPOCHS, checkpoint_minutes=60))
    runs.until(lambda: began(run) == 2, process)
    process.send(number)
    assert process.wait() == 128 + number
    assert f"python main.py --resume {run}" in process.output and "Traceback" not in process.output
    assert checkpoint.load(run)[1].history, "there is a checkpoint"
    assert not (run / "test.json").exists()
    main.main(["--resume", str(run)])
    assert untimed_metrics(run) == untimed_metrics(whole_run)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch):
    """The first comes while a checkpoint is being written, the second too: the old checkpoint stays."""
    steps = []

    def save(run, model, optimizer, progress, real=checkpoint.save):
        steps.append(progress.step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("still running after the second signal")
        real(run, model, optimizer, progress)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(SystemExit) as end:
        main.main(runs.argv(tmp_path, **OFTEN))
    assert end.value.code == 130 and len(steps) == 3
    assert checkpoint.load(tmp_path / "run")[1].step == steps[1]


def test_a_signal_while_dev_is_scored_does_not_wait(whole_run, tmp_path, monkeypatch):
    from ner import scores as scoring

    def score_sentences(*_):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still scoring")

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_sentences", score_sentences)
        with pytest.raises(SystemExit) as end:
            main.main(runs.argv(tmp_path, epochs=EPOCHS))
    state = checkpoint.load(tmp_path / "run")[1]
    assert end.value.code == 130 and (state.epoch, state.step) == (0, 13)
    main.main(["--resume", str(tmp_path / "run")])
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(whole_run)
