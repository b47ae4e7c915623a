"""The counts of an epoch, the best one, and how long a run will take."""

import logging
from types import SimpleNamespace

import pytest

from ner.progress import Progress, TimeLeft, best_epoch, duration


def line(f1: float) -> dict:
    return {"micro": {"f1": f1}}


def batch(tokens: int) -> list:
    return [SimpleNamespace(ids=[0] * tokens, own_start=0, own_end=tokens - 2)]


def test_the_first_of_equal_epochs_is_the_best():
    progress = Progress()
    for f1 in (0.1, 0.5, 0.5, 0.2):
        progress.count(batch(10), 1.0, 0.1)
        progress.end_epoch(line(f1), 1.0, 1e-3)
    assert progress.best == best_epoch(progress.history) == 2 and best_epoch([]) is None


def test_an_epochs_line_holds_means():
    progress = Progress()
    progress.count(batch(12), 2.0, 1.0)
    progress.count(batch(32), 1.0, 3.0)
    row = progress.end_epoch(line(0.5), 0.7, 1e-3)
    assert row["train_loss"] == pytest.approx((10 * 2.0 + 30 * 1.0) / 40)
    assert row["tokens_per_second"] == 11 and row["seconds"] == 4 and row["epoch"] == 1
    assert (progress.epoch, progress.step, progress.loss, progress.units) == (1, 0, 0.0, 0)


def test_the_time_left_is_told_once_by_the_speed_after_the_first_steps(caplog):
    caplog.set_level(logging.INFO, "__main__")
    progress, time_left = Progress(), TimeLeft(tokens_an_epoch=10_000, epochs=3)
    for step in range(60):
        progress.count(batch(100), 1.0, 10.0 if step < 5 else 1.0)
        time_left.log_once(progress)
    assert [record.getMessage() for record in caplog.records] == [
        "training takes about 5 minutes from here, at 100 tokens a second"
    ]


def test_times_in_words():
    assert [duration(seconds) for seconds in (40, 420, 9000)] == ["40 seconds", "7 minutes", "2.5 hours"]
