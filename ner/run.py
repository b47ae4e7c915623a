"""A run's folder: made once, locked while in use, its log, and files in it that are whole at every instant."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from ner import config as settings
from ner.errors import UserError

log = logging.getLogger("__main__")
MAY_DIFFER = ("epochs", "output", "run", "checkpoint_minutes", "trackers", "test")  # between a run and its continuation
PATHS = ("train", "dev", "test", "pretrained")


def new_run(output: str, name: str | None) -> Path:
    """Makes and returns a folder that no other run has: `name` or the time, with -2, -3, … where that is taken.

    os.mkdir is the lock, so two runs started in the same second get two folders. Raises UserError.
    """
    wanted = Path(output) / (name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            run = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            with contextlib.suppress(FileExistsError):
                os.mkdir(run)
                return run
    except OSError as error:
        raise UserError(
            f"{wanted}: the run's folder cannot be made: {error.strerror}; name another with --output"
        ) from None
    raise UserError(f"{wanted}: there are too many runs of that name; name another with --run")


def portable(config):
    """The config with those paths made absolute that would not be found from another working folder."""
    changed = {}
    for key in PATHS:
        path = getattr(config, key)
        found = settings.resolve_path(path) if path else None
        if found and not (settings.ROOT / path).exists():
            changed[key] = str(found)
    return config.model_copy(update=changed)


def check_same(config, run: Path) -> None:
    """Compares a config with that of the run it is to go on with. Raises UserError naming keys that may not differ."""
    saved, differ = settings.load(["--config", str(run / "config.yaml")])[0], []
    for key in settings.Config.model_fields:
        old, new = getattr(saved, key), getattr(config, key)
        if old != new and not (
            key in PATHS and old and new and (settings.resolve_path(old) or 1) == settings.resolve_path(new)
        ):
            differ.append(key)
    if differ:
        log.info(
            "other config than the run's: %s",
            ", ".join(f"{key} ({getattr(config, key)}, was {getattr(saved, key)})" for key in differ),
        )
    wrong = [key for key in differ if key not in MAY_DIFFER]
    if wrong:
        raise UserError(f"--resume {run}: {', '.join(wrong)} may not differ from {run / 'config.yaml'} "
                        f"({', '.join(MAY_DIFFER)} may); leave the option out, or start a new run")  # fmt: skip


@contextlib.contextmanager
def opened(run: Path, writes: bool):
    """Holds the folder's lock and logs to the terminal and train.log meanwhile; the process that `writes` does both.

    A fresh folder goes away again when the run ends before training began.
    """
    if not writes:
        log.setLevel(logging.CRITICAL)
        yield
        return
    lock, handlers, logging.raiseExceptions = _lock(run), [], False  # a full disk must not end a run through its log
    fresh = not (run / "config.yaml").exists()
    try:
        file = logging.FileHandler(run / "train.log", encoding="utf-8")
        handlers += [logging.StreamHandler(sys.stdout), file]
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
            logging.root.addHandler(handler)  # other rooms' and libraries' warnings come in the same form
        log.setLevel(logging.INFO)
        yield
    except UserError as error:  # the terminal gets it from errors.command
        file.handle(log.makeRecord("__main__", logging.ERROR, "", 0, str(error), (), None))
        raise
    except OSError as error:
        if not str(error.filename or "").startswith(str(run)):
            raise
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None
    finally:
        for handler in handlers:
            logging.root.removeHandler(handler)
            with contextlib.suppress(OSError):
                handler.close()
        if (
            fresh
            and run.is_dir()
            and not {path.name for path in run.iterdir()} - {"train.log", "config.yaml", "environment.json"}
        ):
            if sys.exc_info()[0] is not None:
                shutil.rmtree(run, ignore_errors=True)
        os.close(lock)


def _lock(run: Path) -> int:
    """An open descriptor that locks the folder until it is closed, or the process dies."""
    try:
        import fcntl
    except ImportError:  # Windows
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{run}: another process is training there; wait for it, or stop it first") from None
    except OSError:  # a file system without locks
        pass
    return descriptor


def environment(devices, dtype) -> dict:
    """Versions, machine, device and precision, for environment.json."""
    import torch

    names = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
    gpu = {"gpu": torch.cuda.get_device_name(devices.device)} if devices.device.type == "cuda" else {}
    return {
        "python": platform.python_version(), "system": platform.platform(), "machine": platform.machine(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(devices.device), **gpu,
        "processes": devices.num_processes, "precision": str(dtype).removeprefix("torch."),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }  # fmt: skip
