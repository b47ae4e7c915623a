"""A run's folder on disk: made once, locked while in use, and one whole checkpoint in it at every instant.

A checkpoint is a single safetensors file, so that one rename replaces it: tensors are what training changes (not the
frozen encoder), the file's own metadata holds the rest as JSON. No random state is stored, because every step seeds its
own (see `seed_of`): the position in the run is the random state, for any number of processes.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import config as settings
from errors import UserError

log = logging.getLogger("__main__")
FILE = Path("checkpoint") / "state.safetensors"
WRITING = ".writing"  # what a file or folder is called until it is whole
MAY_DIFFER = ("epochs", "output", "run", "checkpoint_minutes", "trackers", "test")  # between a run and its continuation
PATHS = ("train", "dev", "test", "pretrained")


@dataclasses.dataclass
class Progress:
    """Where a run stands: the epoch under way (from 0), the steps it has taken, its sums, and all epochs before."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0  # summed over labelled units
    units: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict] = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl
    best: int | None = None  # the epoch (from 1) with the highest micro-F1 on dev
    micro_batch: int = 1  # windows that go through the model at once
    scale: float = 1.0  # of the loss, for float16
    data: str = ""  # what is trained on: see digest()

    def add(self, batch: list, loss: float, seconds: float) -> None:
        """Counts a step: a batch of windows, its mean loss and how long it took."""
        self.step += 1
        self.loss += loss * units(batch)
        self.units += units(batch)
        self.tokens += sum(len(window.ids) for window in batch)
        self.seconds += seconds

    def end_epoch(self, scores: dict, dev_loss: float, rate: float) -> tuple[dict, bool]:
        """Goes to the next epoch. Returns the line of metrics.jsonl for the last one, and whether it is the best so far."""
        f1 = scores["micro"]["f1"]
        is_best = self.best is None or f1 > self.history[self.best - 1]["dev"]["micro"]["f1"]
        self.epoch += 1
        self.history.append({
            "epoch": self.epoch, "train_loss": self.loss / self.units, "dev_loss": dev_loss, "dev": scores,
            "seconds": self.seconds, "tokens_per_second": self.tokens / max(self.seconds, 1e-9), "learning_rate": rate,
        })  # fmt: skip
        self.best = self.epoch if is_best else self.best
        self.step, self.loss, self.units, self.tokens, self.seconds = 0, 0.0, 0, 0, 0.0
        return self.history[-1], is_best


def units(batch: list) -> int:
    """How many units the windows of a batch answer for: those that carry a label."""
    return sum(window.own_end - window.own_start for window in batch)


def seed_of(*parts) -> int:
    """A seed below 2**63 that depends on every part: the run's seed, the epoch, the step, the process."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def digest(sentences: list, labels: list[str], steps: int) -> str:
    """What a run trains on, in 64 hexadecimal digits: sentences, labels, steps an epoch."""
    summary = hashlib.sha256(f"{labels} {steps}".encode("utf-8", "surrogatepass"))
    for sentence in sentences:
        summary.update(f"{sentence.chars} {sentence.tags}".encode("utf-8", "surrogatepass"))
    return summary.hexdigest()


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


def flat(line: dict, prefix: str = "") -> dict[str, float]:
    """A line of metrics.jsonl with keys like dev/micro/f1, as trackers want it."""
    found = {}
    for key, value in line.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


# The folder

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
        raise UserError(f"{wanted}: the run's folder cannot be made: {error.strerror}; name another with --output") from None
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
    """Compares a config with that of the run it is to continue. Raises UserError naming the keys that may not differ."""
    saved, differ = settings.load(["--config", str(run / "config.yaml")])[0], []
    for key in settings.Config.model_fields:
        old, new = getattr(saved, key), getattr(config, key)
        if old != new and not (key in PATHS and old and new and (settings.resolve_path(old) or 1) == settings.resolve_path(new)):
            differ.append(key)
    if differ:
        log.info("other config than the run's: %s", ", ".join(f"{key} ({getattr(config, key)}, was {getattr(saved, key)})" for key in differ))
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
        if fresh and run.is_dir() and not {path.name for path in run.iterdir()} - {"train.log", "config.yaml", "environment.json"}:
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


# Writing

def write(path: Path, text: str) -> None:
    """Writes a text file under another name, to disk, and renames it. Raises OSError."""
    temporary = path.with_name(path.name + WRITING)
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(run: Path, optimizer, progress: Progress) -> None:
    """Replaces the run's checkpoint by that of now. Raises OSError or SafetensorError; the old one then stays whole."""
    import safetensors.torch

    tensors = {}
    for name, weight in optimizer.masters.items():
        tensors[f"weight/{name}"] = weight.detach().contiguous()
        for kind, value in optimizer.adamw.state.get(weight, {}).items():
            tensors[f"{kind}/{name}"] = value.contiguous()
    path = run / FILE
    for left in path.parent.iterdir():  # of a process that was killed while it wrote
        if left != path:
            left.unlink()
    temporary = path.with_name(path.name + WRITING)
    state = dataclasses.replace(progress, scale=optimizer.scale)
    safetensors.torch.save_file(tensors, temporary, {"progress": json.dumps(dataclasses.asdict(state))})
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def load(run: Path):
    """The run's checkpoint as (tensors by name, Progress), or None where it has none yet. Raises UserError."""
    import safetensors

    path = run / FILE
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        kinds = {field.name: type(getattr(Progress(), field.name)) for field in dataclasses.fields(Progress)}
        odd = [key for key, kind in kinds.items() if key != "best" and not isinstance(values[key], (kind, int) if kind is float else kind)]
        scored = [line["dev"]["micro"]["f1"] + line["epoch"] for line in values["history"]]  # numbers, all of them
        if odd or set(values) != set(kinds) or len(scored) != values["epoch"] or values["micro_batch"] < 1 or values["step"] < 0:
            raise ValueError(f"its progress does not add up {odd or ''}")
        if values["best"] not in (range(1, len(scored) + 1) if scored else (None,)):
            raise ValueError(f"its best epoch is {values['best']}")
        return tensors, Progress(**values)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this program, or damaged ({error}); start a new run") from None


def restore(optimizer, tensors: dict, scale: float, path: Path) -> None:
    """Puts the tensors of a checkpoint into the model's trained weights and the optimizer. Raises UserError."""
    import torch

    moments = {"exp_avg", "exp_avg_sq"}
    with torch.no_grad():
        for name, weight in optimizer.masters.items():
            found = {kind: tensors.pop(f"{kind}/{name}", None) for kind in ("weight", "step", *moments)}
            shapes = {kind: tensor.shape for kind, tensor in found.items() if tensor is not None}
            if shapes not in ({"weight": weight.shape}, dict.fromkeys(("weight", *moments), weight.shape) | {"step": torch.Size()}):
                raise UserError(f"{path}: {name} does not fit the model; was the encoder changed since? start a new run")
            weight.copy_(found.pop("weight"))
            if len(shapes) > 1:
                optimizer.adamw.state[weight] = {kind: tensor.to(weight.device) for kind, tensor in found.items()}
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} is of no weight of the model; start a new run")
    optimizer.scale = scale
    optimizer.write_back()


class Keeper:
    """Writes what a run must not lose: checkpoint, metrics.jsonl, and model/ after a best epoch.

    One failed write is survived: the best weights stay in memory and go out with the next checkpoint. A second failure in
    a row ends the run. `save_model(folder)` writes the model as it stands, whole or not at all. Only the process that `writes` does anything.
    """

    def __init__(self, run: Path, optimizer, minutes: float, writes: bool, save_model):
        self.run, self.optimizer, self.save_model, self.writes = run, optimizer, save_model, writes
        self.pause, self.last, self.failed = minutes * 60, time.monotonic(), False
        self.best = None  # a best epoch's weights that are not on disk yet
        if writes:
            (run / FILE).parent.mkdir(exist_ok=True)

    def resumed(self, data: str) -> Progress | None:
        """Puts the run's checkpoint, if there is one, into model and optimizer. Returns where it stands.

        Raises UserError where it was trained on something else than what has the digest `data`.
        """
        if (saved := load(self.run)) is None:
            return None
        tensors, progress = saved
        if progress.data != data:
            raise UserError(f"{self.run}: the training sentences, their labels or the number of processes changed since it "
                            "was stopped; put them back, or start a new run")  # fmt: skip
        restore(self.optimizer, tensors, progress.scale, self.run / FILE)
        for left in self.run.glob(".model-*") if self.writes else ():  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        log.info("resumed in epoch %d after %d steps", progress.epoch + 1, progress.step)
        if progress.epoch and progress.best == progress.epoch and not progress.step:
            self.keep(progress, is_best=True)  # it may have been stopped between checkpoint and model
        return progress

    def due(self) -> bool:
        return self.writes and time.monotonic() - self.last >= self.pause

    def keep(self, progress: Progress, is_best: bool = False) -> None:
        """Writes all; `is_best`: the model as it stands is the best so far. Raises UserError at a second failure."""
        if not self.writes:
            return
        import safetensors

        try:
            if not self.run.is_dir():
                raise FileNotFoundError(2, "the folder is gone", str(self.run))
            if self.best and not is_best:
                self._write_best()
            save(self.run, self.optimizer, progress)  # first, so that what comes after is written again on resume
            if is_best:
                self.save_model(self.run / "model")
            self.best, self.failed = None, False
            write(self.run / "metrics.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in progress.history))
        except (OSError, safetensors.SafetensorError) as error:
            reason = f"{getattr(error, 'filename', None) or self.run}: cannot be written: {getattr(error, 'strerror', None) or error}"
            if self.failed:
                raise UserError(f"{reason}; this was the second time, so the run ends here") from None
            log.warning("%s; the run goes on and tries again at the next checkpoint", reason)
            self.failed = True
            if is_best:
                self.best = {name: weight.detach().clone() for name, weight in self.optimizer.masters.items()}
        self.last = time.monotonic()

    def finish(self, progress: Progress) -> None:
        """Tries once more where the last write failed. Raises UserError."""
        if self.failed:
            self.keep(progress)

    def _write_best(self) -> None:
        """Writes model/ from the best weights, and puts the present ones back."""
        import torch

        masters = self.optimizer.masters
        now = {name: weight.detach().clone() for name, weight in masters.items()}
        try:
            with torch.no_grad():
                for name, weight in masters.items():
                    weight.copy_(self.best[name])
            self.optimizer.write_back()
            self.save_model(self.run / "model")
        finally:
            with torch.no_grad():
                for name, weight in masters.items():
                    weight.copy_(now[name])
            self.optimizer.write_back()


class Stop:
    """Ctrl-C, and the SIGTERM of a cluster: the first lets a patient stretch of work end, the second stops at once."""

    def __init__(self):
        self.asked = 0  # the signal
        self.twice = False
        self.patient = False

    def __enter__(self):
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def patiently(self):
        """A stretch of work that a signal does not break off; the work asks for `asked` by itself, soon."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def _ask(self, number, _frame):
        self.twice = bool(self.asked)
        self.asked = number
        if self.twice or not self.patient:
            raise KeyboardInterrupt
