"""What was stopped goes on as if it had not been: killed, interrupted, tampered with."""

import contextlib
import io
import json
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file, save_file

import main
from ner import checkpoint
from ner import config as settings

EPOCHS = 4
OFTEN = {"epochs": EPOCHS, "checkpoint_minutes": 0.0001}  # a checkpoint after each step


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums over several threads round in another order; the processes of `runs` have one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    main.main(runs.argv(output, **OFTEN))
    return output / "run"


def lines(run):
    """metrics.jsonl without what depends on the clock."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in read]


def assert_same(run, other):
    assert lines(run) == lines(other)
    assert (run / "test.json").read_bytes() == (other / "test.json").read_bytes()
    for name in ("model/model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype and ours[key].equal(theirs[key]), key


def began(run):
    """How often an epoch began in this folder, by its log."""
    with contextlib.suppress(OSError):
        return (run / "train.log").read_text("utf-8").count(" begin\n")
    return 0


def writing(run):
    """Whether a checkpoint is being written at this moment."""
    with contextlib.suppress(OSError):
        return any(path.name != checkpoint.FILE.name for path in (run / "checkpoint").iterdir())
    return False


def test_killed_at_random_moments_it_ends_the_same_bit_for_bit(whole, tmp_path):
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
    assert_same(run, whole)
    assert not writing(run) and not list(run.glob(".model*")), "something is left of the killed ones"


def test_killed_before_its_first_checkpoint_it_starts_again_in_its_folder(whole, tmp_path):
    process = runs.Process(runs.argv(tmp_path, epochs=EPOCHS, checkpoint_minutes=60))
    runs.until(lambda: began(tmp_path / "run") == 1, process)
    process.kill()
    assert not (tmp_path / "run" / checkpoint.FILE).exists()
    main.main(["--resume", str(tmp_path / "run"), "--checkpoint_minutes", "60"])
    assert lines(tmp_path / "run") == lines(whole)


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
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_ends_the_step_and_says_how_to_go_on(whole, tmp_path, number):
    run = tmp_path / "run"
    process = runs.Process(runs.argv(tmp_path, epochs=EPOCHS, checkpoint_minutes=60))
    runs.until(lambda: began(run) == 2, process)
    process.send(number)
    assert process.wait() == 128 + number
    assert f"python main.py --resume {run}" in process.output and "Traceback" not in process.output
    assert checkpoint.load(run)[1].history, "there is a checkpoint"
    assert not (run / "test.json").exists()
    main.main(["--resume", str(run)])
    assert lines(run) == lines(whole)


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


def test_a_signal_while_dev_is_scored_does_not_wait(whole, tmp_path, monkeypatch):
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
    assert lines(tmp_path / "run") == lines(whole)


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main.main([str(argument) for argument in arguments])
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(("key", "value"), [("tuning", "lora"), ("seed", 2), ("batch_size", 8), ("max_length", 32),
                                            ("learning_rate", 1e-3), ("train", None),
                                            ("pretrained", None)])  # fmt: skip
def test_keys_that_may_not_differ_are_named(whole, capsys, tmp_path, key, value):
    if value is None:
        source = runs.world() / {"train": "train", "pretrained": "encoder"}[key]
        value = tmp_path / "other"
        shutil.copytree(source, value) if source.is_dir() else shutil.copy(source, value)
    text = refused(capsys, "--resume", whole, f"--{key}", value)
    assert f"{key} may not differ" in text and "epochs, output" in text


def test_epochs_may_differ_and_a_finished_run_goes_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run"), "--epochs", str(EPOCHS + 1), "--output", str(tmp_path)])
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert lines(tmp_path / "run")[:EPOCHS] == lines(whole)
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert f"epochs ({EPOCHS + 1}, was {EPOCHS})" in log
    assert settings.load(["--config", str(tmp_path / "run" / "config.yaml")])[0].epochs == EPOCHS + 1


def test_a_run_that_goes_on_without_test_keeps_no_old_scores_of_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    main.main(["--resume", str(tmp_path / "run"), "--test", "null"])
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "finished.json" in left and not left & {"test.json", "predictions.jsonl"}
    assert settings.load(["--config", str(tmp_path / "run" / "config.yaml")])[0].test is None
    assert "deleted, as the run goes on: test.json, predictions.jsonl" in (tmp_path / "run" / "train.log").read_text(
        "utf-8"
    )


def test_scores_of_fewer_epochs_do_not_outlive_them(whole, tmp_path):
    """Killed while it goes on, a run that had ended is not taken for one that has."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    process = runs.Process(["--resume", run, "--epochs", "50"])
    runs.until(lambda: "epoch 6 begin" in (run / "train.log").read_text("utf-8"), process)
    process.kill()
    assert not {path.name for path in run.iterdir()} & {"test.json", "predictions.jsonl", "finished.json"}


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


def test_latest_is_the_run_stopped_last(whole, tmp_path, capsys):
    assert "holds a checkpoint" in refused(capsys, "--resume", "latest", "--output", tmp_path)
    shutil.copytree(whole, tmp_path / "b")
    shutil.copytree(whole, tmp_path / "a")
    (tmp_path / "a" / "checkpoint" / "touched").write_text("")
    assert settings.load(["--resume", "latest", "--output", str(tmp_path)])[1].resume == str(tmp_path / "a")


class Malice:
    """What runs when this is unpickled leaves a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def poisons(mark):
    """The same malice as a bare pickle, as torch saved files once and as it does now."""
    import torch

    plain, zipped, old = pickle.dumps(Malice(mark)), io.BytesIO(), io.BytesIO()
    torch.save(Malice(mark), zipped)
    torch.save(Malice(mark), old, _use_new_zipfile_serialization=False)
    return [plain, zipped.getvalue(), old.getvalue()]


def test_the_malice_of_the_next_test_works(tmp_path):
    for number, poison in enumerate(poisons(tmp_path / "mark")[:2]):
        with contextlib.suppress(Exception):
            if number:
                import torch

                torch.load(io.BytesIO(poison), weights_only=False)
            else:
                pickle.loads(poison)
        assert (tmp_path / "mark").exists()
        (tmp_path / "mark").unlink()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_pickle_in_any_file_of_a_run_is_never_run(tmp_path, capsys, tuning):
    import evaluate
    import predict
    from ner import report

    main.main(runs.argv(tmp_path, tuning=tuning, epochs=1))
    run, mark, bad = tmp_path / "run", tmp_path / "mark", tmp_path / "bad"
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    extra = ("model/pytorch_model.bin", "model/adapter_model.bin", "model/encoder/pytorch_model.bin",
             "model/training_args.bin", "model/tokenizer.pkl", "checkpoint/state.pt")  # fmt: skip
    extra = set(map(Path, extra))
    assert len(files) >= 12
    opened = 0
    for number, file in enumerate([*files, *sorted(extra)]):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(run, bad)
        (bad / file).parent.mkdir(exist_ok=True)
        (bad / file).unlink(missing_ok=True)  # not through a hard link
        (bad / file).write_bytes(poisons(mark)[number % 3])
        if file in extra:  # those are looked at where the safe file is missing
            for safe in (bad / file).parent.glob("*.safetensors"):
                safe.unlink()
        readers = [(main, ["--resume", str(bad)]), (report, [str(bad)])]
        if file.parts[0] in ("model", "config.yaml"):
            readers += [(evaluate, ["--run", str(bad)]), (predict, ["--run", str(bad), "江泽民在北京"])]
        for command, arguments in readers:
            try:
                command.main(arguments)
            except SystemExit as end:
                assert end.code in (None, 0, 2), (command, file)
            opened += 1
            assert not mark.exists(), f"{command.__name__} ran the pickle in {file}"
    capsys.readouterr()
    assert opened >= 50


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
def test_a_damaged_checkpoint_is_named(whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / checkpoint.FILE)
    assert checkpoint.FILE.name in refused(capsys, "--resume", tmp_path / "run")


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
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for name in ("model/adapter_model.safetensors", "checkpoint/state.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(ours[key].equal(theirs[key]) for key in ours | theirs)
        assert "checkpoint" not in name or any(key.startswith("rank/") for key in ours) == (tuning == "adalora")
