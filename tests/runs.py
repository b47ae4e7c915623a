"""Runs of the real commands for the tests: in this process, or in one of its own that can be killed.

Processes are forked from a server that has imported everything already and run nothing, so each starts in no time.
"""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import folders
import tiny

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = [
    "main",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "ner.model",
    "ner.tagging",
    "ner.distributed",
    "ner.kernels",
    "ner.report",
    "ner.export",
    "seqeval.metrics.v1",
    "seqeval.scheme",
    "tqdm.contrib.logging",
]


@functools.cache
def world() -> Path:
    """A folder with an encoder and the files train, dev and test, which `full` learns in three epochs."""
    folder = folders.until_exit("ner-tests-")
    tiny.encoder(folder / "encoder")
    for name, count, seed in (("train", 200, 0), ("dev", 40, 1), ("test", 40, 2)):
        tiny.corpus(folder / name, count, seed)
    return folder


def argv(output, **keys) -> list[str]:
    """The command line of main.py for a tiny run; **keys replace or add keys, None meaning null."""
    here = world()
    settings = {"train": here / "train", "dev": here / "dev", "test": here / "test", "pretrained": here / "encoder",
                "output": output, "run": "run", "tuning": "full", "learning_rate": 5e-3, "epochs": 2, "max_length": 64,
                "precision": "fp32", "export": "none", "head": "softmax", "checkpoint_minutes": 600,
                "kernels": os.environ.get("NER_TEST_KERNELS", "auto")} | keys  # fmt: skip
    return [
        part
        for key, value in settings.items()
        for part in (f"--{key.replace('lora_', 'lora.')}", "null" if value is None else str(value))
    ]


def metrics(run) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def untimed_metrics(run) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in metrics(run)]


def losses(run) -> list[tuple]:
    """(loss of train, loss of dev, scores on dev) of each epoch."""
    return [(line["train_loss"], line["dev_loss"], line["dev"]) for line in metrics(run)]


def log(run) -> str:
    """What train.log holds."""
    return (run / "train.log").read_text("utf-8")


def exit_code(*arguments) -> int:
    """What main.py, run in this process, exits with."""
    import main

    try:
        main.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, *arguments) -> str:
    """The one line with which main.py, run in this process, refuses these arguments."""
    capsys.readouterr()
    assert exit_code(*arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


class Process:
    """main.py, or another script, in a process of its own. `environment`: variables it gets; `output`: what it printed.

    terminal: the device that it prints to instead, such as /dev/pts/3.
    """

    def __init__(
        self, arguments: list, environment: dict | None = None, terminal: str = "", script: Path = ROOT / "main.py"
    ):
        self._file = tempfile.NamedTemporaryFile(suffix=".txt")  # noqa: SIM115  (it lives as long as this object)
        self._process = _server().Process(
            target=_child,
            args=(script, list(map(str, arguments)), terminal or self._file.name, environment or {}),
        )
        self._process.start()

    @property
    def output(self) -> str:
        return Path(self._file.name).read_text("utf-8")

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        if self.running:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._process.join(20)

    def wait(self, seconds: float = 90) -> int:
        """The exit code; a process that takes longer is killed, and the test fails."""
        self._process.join(seconds)
        if self.running:
            self.kill()
            raise AssertionError(f"still running after {seconds} seconds:\n{self.output}")
        return self._process.exitcode


def until(condition, process: Process | None = None, seconds: float = 60) -> bool:
    """Waits for a condition, polled every millisecond; False when the process has ended without it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process and not process.running:
            return bool(condition())
        time.sleep(0.001)  # leaves the core to the process
    raise AssertionError(f"waited {seconds} seconds in vain" + (f":\n{process.output}" if process else ""))


@functools.cache
def _server():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def _child(script, arguments, output, environment):
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= environment
    os.chdir(ROOT)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
