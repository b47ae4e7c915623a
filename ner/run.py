"""A run's folder: made once, locked while in use, logged to."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from ner import config as settings
from ner.errors import UserError

log = logging.getLogger("__main__")
FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
MOST_HELD = 10_000  # log lines in memory
NEVER = logging.CRITICAL + 1  # above every level: no line is so grave that those before it are written
MAY_DIFFER = ("epochs", "output", "run", "checkpoint_minutes", "trackers", "test", "export")  # when a run goes on
BEFORE_TRAINING = {"train.log", "config.yaml", "environment.json"}  # files of a run that has not trained yet


def new_run(output: str | os.PathLike, name: str | None) -> Path:
    """Make and return a folder that no other run has: `name` or the time, with -2, -3, … where that is taken.

    os.mkdir is the lock, so two runs started in the same second get two folders. Raises UserError.
    """
    wanted = Path(output) / (name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for count in range(1, 10_000):
            run = wanted if count == 1 else wanted.with_name(f"{wanted.name}-{count}")
            with contextlib.suppress(FileExistsError):
                os.mkdir(run)
                return run
    except OSError as error:
        reason = f"the run's folder cannot be made: {error.strerror}"
        raise UserError(f"{wanted}: {reason}; name another with --output") from None
    raise UserError(f"{wanted}: there are too many runs of that name; name another with --run")


def check_same(config: settings.Config, run: Path) -> None:
    """Compare a config with that of the run it is to go on with. Raises UserError naming keys that may not differ."""
    saved = settings.load_run(run)
    differ = [key for key in settings.Config.model_fields if getattr(saved, key) != getattr(config, key)]
    if differ:
        changes = ", ".join(f"{key} ({getattr(config, key)}, was {getattr(saved, key)})" for key in differ)
        log.info("other config than the run's: %s", changes)
    wrong = [key for key in differ if key not in MAY_DIFFER]
    if wrong:
        raise UserError(
            f"--resume {run}: {', '.join(wrong)} may not differ from {run / 'config.yaml'} ({', '.join(MAY_DIFFER)} "
            "may); leave the option out, or start a new run"
        )


@contextlib.contextmanager
def opened(run: Path, writes: bool) -> Iterator[None]:
    """Hold the folder's lock and log to the terminal and train.log meanwhile; the process that `writes` does both.

    A run that fails before training begins leaves nothing: a fresh folder is removed, and the log of a run that was to
    go on stays as it was. Raises UserError for what the system says about the run's files.
    """
    if not writes:
        log.setLevel(logging.CRITICAL)
        yield
        return
    is_fresh = not (run / "config.yaml").exists()
    with _named_errors(run), _locked(run), _removed_if_unused(run, is_fresh), _logged(run / "train.log", not is_fresh):
        yield


def write_held_log() -> None:
    """Write what `opened` held back from train.log, and every later line at once: the run does go on."""
    for handler in logging.root.handlers:
        if isinstance(handler, MemoryHandler):
            handler.flush()
            handler.capacity = 1


@contextlib.contextmanager
def _named_errors(run: Path) -> Iterator[None]:
    """Turn an OSError about a file of the run into a UserError that names the file by its whole path."""
    try:
        yield
    except OSError as error:
        file = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, (str, bytes)) else None
        if file is None or not file.is_relative_to(run.absolute()):
            raise
        raise UserError(f"{file}: cannot be read or written: {error.strerror}") from None


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Lock the folder until the block ends or the process dies. Raises UserError where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process is training there; wait for it, or stop it first") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_if_unused(run: Path, is_fresh: bool) -> Iterator[None]:
    """Remove a fresh folder when the block raises before anything of a training lies in it."""
    try:
        yield
    except BaseException:
        if is_fresh and run.is_dir() and {path.name for path in run.iterdir()} <= BEFORE_TRAINING:
            shutil.rmtree(run, ignore_errors=True)
        raise


@contextlib.contextmanager
def _logged(path: Path, hold: bool) -> Iterator[None]:
    """Log to the terminal and to the file `path` during the block; the file gets a UserError that ends it too.

    hold: keep the file's lines in memory until write_held_log(); a UserError before that discards them.
    """
    raise_before, logging.raiseExceptions = logging.raiseExceptions, False  # a full disk must not end a run by its log
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter(FORMAT))
    held = MemoryHandler(MOST_HELD if hold else 1, flushLevel=NEVER, target=file)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter(FORMAT))
    try:
        logging.root.addHandler(terminal)  # other modules' and libraries' warnings come in the same form
        logging.root.addHandler(held)
        log.setLevel(logging.INFO)
        yield
    except UserError as error:  # the terminal gets it from errors.command
        held.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error), (), None))
        held.buffer.clear()  # of a resume that was refused
        raise
    finally:
        logging.raiseExceptions = raise_before
        for handler in (terminal, held, file):  # closing writes what is still held: the resume failed otherwise
            logging.root.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()


def environment(accelerator: Any, dtype: Any) -> dict[str, Any]:
    """Return versions, machine, device and precision, for environment.json. dtype: a torch.dtype."""
    import torch

    libraries = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
    gpu = {"gpu": torch.cuda.get_device_name(accelerator.device)} if accelerator.device.type == "cuda" else {}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(accelerator.device),
        **gpu,
        "processes": accelerator.num_processes,
        "precision": str(dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }
