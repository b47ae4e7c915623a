"""Several processes compute what one does: two on CPUs here, as torchrun and accelerate launch start them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import runs
from runs import metrics, untimed_metrics
from safetensors.torch import load_file

import main
from ner import checkpoint
from ner.errors import UserError
from ner.progress import seed_of


def pair(arguments) -> list[runs.Process]:
    """Two processes of one run, with the variables that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [runs.Process(arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def ended(processes) -> list[int]:
    return [process.wait() for process in processes]


def assert_alike(run, other):
    """Equal up to the order of sums."""
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["dev_loss"] == pytest.approx(theirs["dev_loss"], rel=1e-3)
        assert ours["dev"] == theirs["dev"]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    for key in ours | theirs:
        assert ours[key].allclose(theirs[key], atol=2e-3), key
    assert (run / "test.json").read_bytes() == (other / "test.json").read_bytes()
    assert (run / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of a run by two processes, and what each of them printed."""
    output = tmp_path_factory.mktemp("two")
    both = pair(runs.argv(output, dropout=0, epochs=3, batch_size=8))
    assert ended(both) == [0, 0], both[0].output + both[1].output
    return output, [process.output for process in both]


def test_two_processes_equal_one_with_twice_the_batch(two, tmp_path):
    main.main(runs.argv(tmp_path, dropout=0, epochs=3, batch_size=16))
    assert_alike(two[0] / "run", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["dev"]["micro"]["f1"] > 0.8, "there is something to be alike in"


def test_two_processes_learn_the_same_transitions_of_a_crf(tmp_path):
    both = pair(runs.argv(tmp_path, dropout=0, epochs=2, batch_size=8, head="crf"))
    assert ended(both) == [0, 0], both[0].output + both[1].output
    main.main(runs.argv(tmp_path, dropout=0, epochs=2, batch_size=16, head="crf", run="one"))
    assert_alike(tmp_path / "run", tmp_path / "one")
    ours, theirs = (load_file(tmp_path / run / "model" / "crf.safetensors") for run in ("run", "one"))
    assert ours.keys() == theirs.keys() and all(ours[key].allclose(theirs[key], atol=2e-3) for key in ours)


def test_only_the_first_writes(two):
    output, (first, second) = two
    assert [path.name for path in output.iterdir()] == ["run"]
    log = runs.log(output / "run")
    assert [log.count(f"epoch {number} begin") for number in (1, 2, 3)] == [1, 1, 1] and "2 process(es)" in log
    assert log in first and " - __main__ - " not in second


def test_every_sentence_is_scored_once(two):
    rows = [json.loads(line) for line in (two[0] / "run" / "predictions.jsonl").read_text("utf-8").splitlines()]
    text = (runs.world() / "test").read_text("utf-8").strip()
    assert ["".join(row["chars"]) for row in rows] == [
        "".join(line[0] for line in block.splitlines()) for block in text.split("\n\n")
    ]


def test_shares_may_be_uneven_or_empty(tmp_path):
    """33 sentences in steps of 32: the second step has work for one process only; 39 dev sentences are no pairs."""
    blocks = (runs.world() / "dev").read_text("utf-8").strip().split("\n\n")
    (tmp_path / "dev").write_text("\n\n".join(blocks[:39]) + "\n", "utf-8")
    keys = {"max_train_sentences": 33, "dev": tmp_path / "dev", "dropout": 0, "epochs": 3}
    assert ended(pair(runs.argv(tmp_path, run="two", batch_size=16, **keys))) == [0, 0]
    main.main(runs.argv(tmp_path, run="one", batch_size=32, **keys))
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_two_killed_processes_go_on_bit_for_bit(two, tmp_path):
    run = tmp_path / "run"
    both = pair(runs.argv(tmp_path, dropout=0, epochs=3, batch_size=8, checkpoint_minutes=0.0001))

    def in_second_epoch():
        with contextlib.suppress(UserError):  # the file may be replaced between two looks at it
            return (run / checkpoint.FILE).exists() and checkpoint.load(run)[1].epoch == 1

    runs.until(in_second_epoch, both[0])
    for process in both:
        process.kill()
    assert not (run / "test.json").exists()
    both = pair(["--resume", run])
    assert ended(both) == [0, 0], both[0].output + both[1].output
    assert untimed_metrics(run) == untimed_metrics(two[0] / "run")
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, two[0] / "run"))
    assert all(ours[key].equal(theirs[key]) for key in ours | theirs)


def test_a_signal_to_one_stops_both_after_the_same_step(two, tmp_path):
    run = tmp_path / "run"
    both = pair(runs.argv(tmp_path, dropout=0, epochs=3, batch_size=8))
    runs.until(lambda: (run / "train.log").exists() and "epoch 2 begin" in runs.log(run), both[0])
    both[1].send(signal.SIGINT)
    assert ended(both) == [130, 130] and "--resume" in both[0].output
    assert ended(pair(["--resume", run])) == [0, 0]
    assert untimed_metrics(run) == untimed_metrics(two[0] / "run")


def test_dropout_differs_between_processes(tmp_path):
    """Else both would drop the same units, and two shares would teach less than they could."""
    seeds = {seed_of(1, step, rank) for step in range(100) for rank in range(4)}
    assert len(seeds) == 400


def test_another_number_of_processes_is_refused(two, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--resume", str(two[0] / "run"), "--epochs", "4"])
    assert end.value.code == 2 and "number of processes" in capsys.readouterr().err


ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCHERS = {  # accelerate's --cpu would start a single process, or ask for MPI
    "accelerate": f"{ACCELERATE} --dynamo_backend no --main_process_port",
    "torchrun": "torch.distributed.run --nproc_per_node 2 --master_port",
}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_the_launchers_commands_do_it(two, tmp_path, launcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = [*launcher.split(), str(free.getsockname()[1])]
    settings = runs.argv(tmp_path, dropout=0, epochs=3, batch_size=8)
    place = settings.index("--run")  # which torchrun takes for an option of its own
    command = [sys.executable, "-m", *launcher, "main.py", *settings[:place], *settings[place + 2 :]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = tmp_path.iterdir()
    assert untimed_metrics(run) == untimed_metrics(two[0] / "run")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "set precision"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set accumulation"),
    ],
)
def test_settings_of_the_launcher_that_would_be_ignored_are_refused(
    tmp_path, monkeypatch, capsys, variable, value, said
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as end:
        main.main(runs.argv(tmp_path))
    text = capsys.readouterr().err
    assert end.value.code == 2 and f"{variable}={value}" in text and said in text and text.count("\n") == 1
    assert not list(tmp_path.iterdir()), "no run has begun"


def test_what_the_launcher_sets_by_itself_is_fine(monkeypatch):
    from ner.distributed import check_launch_settings

    check_launch_settings({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    check_launch_settings({})
