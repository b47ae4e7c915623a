"""ner/run.py: a folder is made once, held by one process, logged to, and named when something is wrong with it."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ner import config, run
from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("__main__")


def test_a_taken_name_gets_a_number(tmp_path):
    folders = [run.new_run(tmp_path / "runs", "mine") for _ in range(3)]
    assert [folder.name for folder in folders] == ["mine", "mine-2", "mine-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: the run's folder cannot be made: .*; name another with --output"):
        run.new_run(tmp_path / "file", "run")


def test_the_log_goes_to_the_terminal_and_to_the_file(tmp_path, capsys):
    before, handlers = logging.raiseExceptions, list(logging.root.handlers)
    with run.opened(tmp_path, writes=True):
        log.info("开始测试第1轮模型效果：")
        assert not logging.raiseExceptions, "a full disk ends no run through its log"
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text("utf-8")):
        assert text.endswith(" - __main__ - INFO - 开始测试第1轮模型效果：\n") and text.count("\n") == 1
    assert logging.raiseExceptions == before and logging.root.handlers == handlers


def test_a_process_that_does_not_write_logs_nothing(tmp_path, capsys):
    with run.opened(tmp_path, writes=False):
        log.warning("not here")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_the_file_gets_the_error_that_ends_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError), run.opened(tmp_path, writes=True):
        log.info("before")
        run.write_held_log()
        raise UserError("train.txt:3: no tag")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" - ")[2:] for line in lines] == [["INFO", "before"], ["ERROR", "train.txt:3: no tag"]]
    assert "no tag" not in capsys.readouterr().out, "the terminal gets it once, on stderr"


@pytest.mark.parametrize(("error", "written"), [(UserError("refused"), ""), (RuntimeError("odd"), "before\n")])
def test_the_log_of_a_run_that_is_refused_stays_as_it_was(tmp_path, capsys, error, written):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(type(error)), run.opened(tmp_path, writes=True):
        log.info("before")
        raise error
    assert (tmp_path / "train.log").read_text().endswith(written) and "before" in capsys.readouterr().out
    assert written or not (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("error", [UserError("wrong"), KeyboardInterrupt(), RuntimeError("odd")])
def test_a_fresh_folder_without_a_training_goes_away(tmp_path, error):
    folder = run.new_run(tmp_path, "run")
    with pytest.raises(type(error)), run.opened(folder, writes=True):
        (folder / "config.yaml").write_text("")
        raise error
    assert not folder.exists()


@pytest.mark.parametrize("name", ["model", "checkpoint", "metrics.jsonl"])
def test_a_folder_with_work_in_it_stays(tmp_path, name):
    folder = run.new_run(tmp_path, "run")
    with pytest.raises(UserError), run.opened(folder, writes=True):
        (folder / name).write_text("")
        raise UserError("wrong")
    assert (folder / name).exists()


def test_two_processes_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    code = f"from pathlib import Path; from ner import run\nwith run.opened(Path({str(tmp_path)!r}), True): pass"
    with run.opened(tmp_path, writes=True):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"{tmp_path}: another process is training there" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_without_locks_it_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with run.opened(tmp_path, writes=True):
        log.info("fine")
    assert "fine" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_an_error_about_a_file_of_the_run_names_its_whole_path(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    folder.mkdir()
    with pytest.raises(UserError) as caught, run.opened(folder, writes=True):
        raise OSError(code, os.strerror(code), str(folder / "model" / "ner.json"))
    file = tmp_path / "run" / "model" / "ner.json"
    assert str(caught.value) == f"{file}: cannot be read or written: {os.strerror(code)}"


def test_an_error_about_another_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError), run.opened(tmp_path, writes=True):
        open(tmp_path.parent / "elsewhere").close()


@pytest.mark.parametrize("call", ["open", "log"])
def test_a_folder_that_may_not_be_read_or_written_is_one_line(tmp_path, monkeypatch, call):
    def refused(*_, **__):
        file = tmp_path if call == "open" else tmp_path / "train.log"
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(*((os, "open") if call == "open" else (logging.FileHandler, "_open")), refused)
    with pytest.raises(UserError, match="cannot be read or written: Permission denied"), run.opened(tmp_path, True):
        raise AssertionError("not reached")


def saved(folder: Path, *argv: str) -> config.Config:
    """A run's config, saved in its folder."""
    made, _ = config.load(["--train", str(folder), *argv])
    (folder / "config.yaml").write_text(config.dump(made))
    (folder / "environment.json").write_text("{}")
    return made


def test_a_run_goes_on_with_its_own_config_only(tmp_path):
    made = saved(tmp_path)
    run.check_same(made, tmp_path)
    run.check_same(made.model_copy(update={"epochs": 9, "test": None, "export": "none"}), tmp_path)
    with pytest.raises(UserError, match=r"--resume .*: kernels, seed may not differ .*\(epochs, output.* may\)"):
        run.check_same(made.model_copy(update={"seed": 9, "kernels": "plain", "epochs": 9}), tmp_path)


def test_the_same_path_is_the_same_from_another_folder(tmp_path, monkeypatch):
    made = saved(tmp_path, "--pretrained", "data/encoder")
    (tmp_path / "data" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run.check_same(made, tmp_path)
    again, flags = config.load(["--resume", str(tmp_path)])
    run.check_same(again, Path(flags.resume or ""))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_runs_of_before_are_read(name):
    made = config.load_run(ROOT / "tests" / "saved_runs" / name)
    assert (made.tuning, made.kernels, made.export) == (name, "auto", "int8")
