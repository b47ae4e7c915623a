"""ner/errors.py: every command takes any text, and ends with one line and an exit code whatever happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FULL = Path("/dev/full")


def run(code: str, **keys) -> subprocess.CompletedProcess:
    """Run a command whose main() holds `code`, as a process of its own."""
    body = "\n".join("    " + line for line in code.splitlines())
    script = f"import sys\nfrom ner.errors import UserError, command\n@command\ndef main():\n{body}\nmain()\n"
    keys = {"stdout": subprocess.PIPE} | keys
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, timeout=60, **keys)


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("print('fine')", 0, b""),
        ("raise UserError('config.yaml:3: 北京')", 2, "error: config.yaml:3: 北京\n".encode()),
        ("raise UserError('\\ud800')", 2, b"error: ?\n"),
        ("raise KeyboardInterrupt", 130, b"interrupted\n"),
        ("raise BrokenPipeError", 141, b""),
        ("sys.exit(7)", 7, b""),
    ],
)
def test_how_a_command_ends(code, status, said):
    done = run(code)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_chinese_is_printed_whatever_the_locale(settings):
    code = r"print('\u6c5f\u6cfd\u6c11\ud800'); raise UserError('\u5317\u4eac')"  # 江泽民, 北京
    done = run(code, env=os.environ | settings)
    assert done.stdout.decode("utf-8") == "江泽民?\n"
    assert done.stderr.decode("utf-8") == "error: 北京\n"


def test_the_run_s_log_keeps_its_chinese_on_any_terminal(tmp_path):
    code = (
        "import logging; from pathlib import Path; from ner import run\n"
        f"with run.opened(Path({str(tmp_path)!r}), writes=True):\n"
        r"    logging.getLogger('__main__').info('\u5f00\u59cb\u6d4b\u8bd5')"
    )
    done = run(code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout.decode("utf-8").endswith(" - __main__ - INFO - 开始测试\n"), done.stderr


@pytest.mark.parametrize("command", [["loader.py"], ["-m", "ner.report"]])
def test_commands_print_chinese_on_any_terminal(tmp_path, command):
    folder = tmp_path / "北京"
    folder.mkdir()
    (folder / "train.log").write_text("")
    (folder / "train").write_text("北 B-LOC\n京 I-LOC\n", encoding="utf-8")
    named = folder / "train" if command == ["loader.py"] else folder
    settings = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(named)], cwd=ROOT, capture_output=True, env=settings, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "北京" in done.stdout.decode("utf-8")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("code", ["print('short')", "print('long' * 10**6)", "print('x'); sys.exit(0)"])
def test_a_full_disk_behind_standard_output_is_one_line(code, unbuffered):
    with open(FULL, "w") as full:
        done = run(code, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert done.stderr == b"error: standard output: cannot be written (No space left on device)\n"


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_whose_log_fills_the_disk_behind_standard_output_ends_and_says_so(tmp_path, unbuffered):
    code = (
        "import logging; from pathlib import Path; from ner import run\n"
        f"with run.opened(Path({str(tmp_path)!r}), writes=True):\n"
        "    logging.getLogger('__main__').info('first')\n"
        "    logging.getLogger('__main__').info('last')"
    )
    with open(FULL, "w") as full:
        done = run(code, stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.stderr == b"error: standard output: cannot be written (No space left on device)\n"
    assert done.returncode == 2 and "last" in (tmp_path / "train.log").read_text("utf-8")


def test_without_a_buffer_each_line_is_seen_at_once():
    code = "import os\nprint('first')\nos.write(1, b'second\\n')\nprint('third')"
    done = run(code, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.stdout == b"first\nsecond\nthird\n"


def test_a_reader_that_goes_away_is_no_error():
    code = "import os\nr, w = os.pipe()\nos.dup2(w, 1)\nos.close(r)\nos.close(w)\nprint('x' * 10**6)"
    done = run(code)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams_are_no_error():
    command = f"exec {sys.executable} -c \"from ner.errors import command\ncommand(lambda: print('x'))()\" >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=60).returncode == 0


def test_other_errors_keep_their_traceback():
    done = run("open('/nowhere/at/all')")
    assert done.returncode == 1 and b"FileNotFoundError" in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["main.py", "--help"],
        ["loader.py", "--help"],
        ["predict.py", "--help"],
        ["evaluate.py", "--help"],
        ["model.py", "--help"],
        ["-m", "ner.report", "--help"],
        ["-m", "ner.config"],
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_every_command_says_that_its_output_is_full(argv, unbuffered):
    settings = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    keys = {"cwd": ROOT, "env": settings, "stderr": subprocess.PIPE, "timeout": 60, "text": True}
    with open(FULL, "w") as full:
        done = subprocess.run([sys.executable, *argv], stdout=full, **keys)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: standard output: cannot be written")
