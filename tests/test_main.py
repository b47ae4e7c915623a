"""A run from its first line to its last: what it logs, what it leaves behind, what it does the same again."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

import pytest
import runs
from runs import log, losses, metrics
from safetensors.torch import load_file

import evaluate
import main
import predict
from ner import config as settings
from ner import scores as scoring
from ner.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - __main__ - "
NUMBER = r"\d+\.\d{6}"
EPOCH = re.compile(
    rf"{STAMP}INFO - epoch (\d+) begin\n"
    rf"({STAMP}INFO - batch loss {NUMBER}\n){{3}}"
    rf"{STAMP}INFO - epoch average loss: {NUMBER}\n"
    rf"{STAMP}INFO - 开始测试第\1轮模型效果：\n"
    rf"{STAMP}INFO - LOC类实体，准确率：{NUMBER}, 召回率: {NUMBER}, F1: {NUMBER}\n"
    rf"{STAMP}INFO - ORG类实体，准确率：{NUMBER}, 召回率: {NUMBER}, F1: {NUMBER}\n"
    rf"{STAMP}INFO - PER类实体，准确率：{NUMBER}, 召回率: {NUMBER}, F1: {NUMBER}\n"
    rf"{STAMP}INFO - Macro-F1: {NUMBER}\n"
    rf"{STAMP}INFO - Micro-F1 {NUMBER}\n"
    rf"{STAMP}INFO - -{{20}}\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three epochs, which learns what there is to learn."""
    output = tmp_path_factory.mktemp("main")
    main.main(runs.argv(output, epochs=3))
    return output / "run"


def test_the_log_has_the_users_format_to_the_letter(run):
    assert [match[1] for match in EPOCH.finditer(log(run))] == ["1", "2", "3"]
    assert all(re.match(STAMP + "(INFO|WARNING) - ", line) for line in log(run).splitlines())
    assert re.search(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: \d+\.\d{4}\n", log(run))
    assert re.search(r"precision float32: ", log(run)) and "\r" not in log(run)


def test_the_terminal_shows_the_same_log(tmp_path, capfd):
    main.main(runs.argv(tmp_path))
    assert capfd.readouterr().out == log(tmp_path / "run")


def test_a_run_leaves_all_that_others_read(run):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "train.log", "metrics.jsonl", "model", "test.json", "checkpoint", "report.html",
        "predictions.jsonl", "environment.json", "finished.json",
    }  # fmt: skip
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line) == {"epoch", "train_loss", "dev_loss", "dev", "seconds", "tokens_per_second", "learning_rate"}
        assert line["seconds"] > 0 and line["tokens_per_second"] > 0 and 0 < line["learning_rate"] <= 5e-3
        assert line["learning_rate"] == pytest.approx(5e-3 * (1 + 39 - line["epoch"] * 13) / 35)
    for scores in (lines[-1]["dev"], json.loads((run / "test.json").read_text("utf-8"))):
        assert set(scores) == {"micro", "macro", "weighted", "types", "accuracy"} and set(scores["types"]) == {
            "LOC",
            "ORG",
            "PER",
        }
        for row in (scores["micro"], scores["macro"], scores["weighted"], *scores["types"].values()):
            assert set(row) == {"precision", "recall", "f1", "support"} and all(
                0 <= row[key] <= 1 for key in ("precision", "recall", "f1")
            )
    assert lines[-1]["dev"]["micro"]["f1"] > 0.8, "it learned"


def test_predictions_are_the_test_file_with_tags_and_give_its_scores(run):
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text("utf-8").splitlines()]
    blocks = [block.splitlines() for block in (runs.world() / "test").read_text("utf-8").strip().split("\n\n")]
    assert [["".join(line[0]) for line in block] for block in blocks] == [row["chars"] for row in rows]
    assert [[line[2:] for line in block] for block in blocks] == [row["gold"] for row in rows]
    assert scoring.score([row["gold"] for row in rows], [row["predicted"] for row in rows]) == json.loads(
        (run / "test.json").read_text("utf-8")
    )


def test_the_run_goes_through_all_three_commands(run, tmp_path, capsys):
    evaluate.main(["--run", str(run), "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text("utf-8")) == json.loads(
        (run / "test.json").read_text("utf-8")
    )
    capsys.readouterr()
    predict.main(["--run", str(run), "--json", "江泽民在北京会见了比尔·盖茨。"])
    found = json.loads(capsys.readouterr().out)
    assert [(entity["text"], entity["type"]) for entity in found["entities"]] == [
        ("江泽民", "PER"),
        ("北京", "LOC"),
        ("比尔·盖茨", "PER"),
    ]


def test_its_config_runs_again_and_gives_the_same(run, tmp_path):
    main.main(["--config", str(run / "config.yaml"), "--output", str(tmp_path)])
    assert losses(tmp_path / "run") == losses(run)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", run))
    assert all(ours[key].equal(theirs[key]) for key in ours | theirs)


def test_relative_paths_are_kept_where_another_folder_would_not_find_them(tmp_path, monkeypatch):
    monkeypatch.chdir(runs.world())
    main.main(runs.argv(tmp_path, train="train", dev="dev", test="test", pretrained="encoder", epochs=1))
    monkeypatch.chdir("/")
    saved = settings.load(["--config", str(tmp_path / "run" / "config.yaml")])[0]
    assert saved.train == str(runs.world() / "train") and saved.pretrained == str(runs.world() / "encoder")
    evaluate.main(["--run", str(tmp_path / "run")])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_seed_decides(tmp_path, tuning):
    keys = {"tuning": tuning, "learning_rate": 5e-3, "epochs": 1, "precision": "auto"}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        main.main(runs.argv(tmp_path, run=name, seed=seed, **keys))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_a_run_never_overwrites_another(tmp_path):
    main.main(runs.argv(tmp_path, epochs=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    main.main(runs.argv(tmp_path, epochs=1, seed=2))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert losses(tmp_path / "run-2") != losses(tmp_path / "run")


def test_a_run_without_a_name_is_named_by_the_time(tmp_path):
    main.main(runs.argv(tmp_path, run=None, epochs=1))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", next(tmp_path.iterdir()).name)


def test_missing_default_files_are_brought(tmp_path, monkeypatch):
    from data import msra

    brought = []

    def ensure(say):
        brought.append(1)
        say("a notice")
        raise UserError("no network here")

    monkeypatch.setattr(msra, "ensure", ensure)
    monkeypatch.setattr(settings, "resolve_path", lambda path, from_project=False: None)
    with pytest.raises(SystemExit) as end:
        main.main(["--output", str(tmp_path), "--epochs", "1"])
    assert end.value.code == 2 and brought == [1]


def test_curves_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main.main(runs.argv(tmp_path, trackers="[tensorboard]"))
    found = {}
    for file in (tmp_path / "run").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train_loss"] == pytest.approx([line["train_loss"] for line in metrics(tmp_path / "run")])
    assert found["dev/micro/f1"] == pytest.approx([line["dev"]["micro"]["f1"] for line in metrics(tmp_path / "run")])


@pytest.mark.parametrize(("name", "said"), [("tensorbored", "unknown"), ("comet_ml", "not installed")])
def test_a_tracker_that_is_not_there_is_named(tmp_path, capsys, name, said):
    with pytest.raises(SystemExit) as end:
        main.main(runs.argv(tmp_path, trackers=f"[{name}]"))
    assert (
        end.value.code == 2
        and name in (text := capsys.readouterr().err)
        and said in text
        and not list(tmp_path.iterdir())
    )


def test_a_wrong_key_is_answered_before_torch_is_imported():
    code = ("import sys, main\ntry:\n main.main(['--epoch', '3'])\nexcept SystemExit as end: assert end.code == 2\n"
            "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "epochs" in done.stderr, done.stderr


def test_a_bar_is_shown_on_a_terminal_only(tmp_path, capfd):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = runs.Process(runs.argv(tmp_path), terminal=os.ttyname(follower))
    assert select.select([leader], [], [], 90)[0], "it writes to the terminal"
    os.close(follower)  # not before: a terminal that nobody has open cannot be read from
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # the other side was closed
        pass
    assert process.wait() == 0
    shown = shown.decode("utf-8")
    assert re.search(r"\d+%\|.*\d/13 ", shown)
    assert all(line in shown for line in log(tmp_path / "run").splitlines())
    main.main(runs.argv(tmp_path, epochs=1))
    assert "%|" not in "".join(capfd.readouterr())
