"""What was stopped goes on as if it had not been: killed at any moment, with more epochs, without test."""

import random
import shutil
import time

import pytest
import runs
from runs import refused, untimed_metrics
from safetensors.torch import load_file
from stopped_runs import EPOCHS, OFTEN, assert_same, began, writing

import main
from ner import checkpoint
from ner import config as settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_random_moments_it_ends_the_same_bit_for_bit(whole_run, tmp_path):
    run, draw = tmp_path / "run", random.Random(7)
    arguments, kills, torn = runs.argv(tmp_path, **OFTEN), 0, 0
    for _ in range(40):
        before = began(run)
        process = runs.Process(arguments)
        arguments = ["--resume", run]
        if not runs.until(lambda before=before: began(run) > before, process):
            break  # it ended by itself
        if kills < 4:
            time.sleep(draw.uniform(0, 0.3))
        elif not runs.until(lambda: writing(run), process):
            break
        process.kill()
        kills += 1
        torn += writing(run)
        if (run / checkpoint.FILE).exists():
            checkpoint.load(run)  # raises where the one in place is not whole
        if kills >= 5 and torn:
            break
    assert kills >= 5 and torn, "the run ended before it was killed often enough"
    assert runs.Process(["--resume", run]).wait() == 0
    assert_same(run, whole_run)
    assert not writing(run) and not list(run.glob(".model*")), "something is left of the killed ones"


def test_killed_before_its_first_checkpoint_it_starts_again_in_its_folder(whole_run, tmp_path):
    process = runs.Process(runs.argv(tmp_path, epochs=EPOCHS, checkpoint_minutes=60))
    runs.until(lambda: began(tmp_path / "run") == 1, process)
    process.kill()
    assert not (tmp_path / "run" / checkpoint.FILE).exists()
    main.main(["--resume", str(tmp_path / "run"), "--checkpoint_minutes", "60"])
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(whole_run)


def test_epochs_may_differ_and_a_finished_run_goes_on(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run"), "--epochs", str(EPOCHS + 1), "--output", str(tmp_path)])
    assert [line["epoch"] for line in untimed_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert untimed_metrics(tmp_path / "run")[:EPOCHS] == untimed_metrics(whole_run)
    log = runs.log(tmp_path / "run")
    assert f"epochs ({EPOCHS + 1}, was {EPOCHS})" in log
    assert settings.load(["--config", str(tmp_path / "run" / "config.yaml")])[0].epochs == EPOCHS + 1


def test_a_run_that_goes_on_without_test_keeps_no_old_scores_of_it(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run"), "--test", "null"])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "finished.json" in left and not left & {"test.json", "predictions.jsonl"}
    assert settings.load(["--config", str(tmp_path / "run" / "config.yaml")])[0].test is None
    assert "deleted, as the run goes on: test.json, predictions.jsonl" in (tmp_path / "run" / "train.log").read_text(
        "utf-8"
    )


def test_scores_of_fewer_epochs_do_not_outlive_them(whole_run, tmp_path):
    """Killed while it goes on, a run that had ended is not taken for one that has."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    process = runs.Process(["--resume", run, "--epochs", "50"])
    runs.until(lambda: "epoch 6 begin" in runs.log(run), process)
    process.kill()
    assert not {path.name for path in run.iterdir()} & {"test.json", "predictions.jsonl", "finished.json"}


def test_latest_is_the_run_stopped_last(whole_run, tmp_path, capsys):
    assert "holds a checkpoint" in refused(capsys, "--resume", "latest", "--output", tmp_path)
    shutil.copytree(whole_run, tmp_path / "b")
    shutil.copytree(whole_run, tmp_path / "a")
    (tmp_path / "a" / "checkpoint" / "touched").write_text("")
    assert settings.load(["--resume", "latest", "--output", str(tmp_path)])[1].resume == str(tmp_path / "a")


@pytest.mark.parametrize("tuning", ["lora", "adalora", "ptuning"])
def test_other_tunings_go_on_bit_for_bit_in_bf16_too(tmp_path, tuning):
    keys = {"tuning": tuning, "learning_rate": 1e-2, "epochs": 3, "precision": "bf16"}
    keys |= {"lora_dropout": 0.1} if tuning == "lora" else {}
    main.main(runs.argv(tmp_path, run="whole", **keys))
    process = runs.Process(runs.argv(tmp_path, run="killed", checkpoint_minutes=0.0001, **keys))
    runs.until(lambda: began(tmp_path / "killed") == 2, process)
    time.sleep(0.1)
    process.kill()
    assert not (tmp_path / "killed" / "test.json").exists()
    assert runs.Process(["--resume", tmp_path / "killed"]).wait() == 0
    assert untimed_metrics(tmp_path / "killed") == untimed_metrics(tmp_path / "whole")
    for name in ("model/adapter_model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(ours[key].equal(theirs[key]) for key in ours | theirs)
        assert "checkpoint" not in name or any(key.startswith("rank/") for key in ours) == (tuning == "adalora")
