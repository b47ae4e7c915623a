"""One whole checkpoint of a run at every instant: what it holds, how it is written, kept, and put back.

A checkpoint is a single safetensors file, so that one rename replaces it: tensors are what training changes (not the
frozen encoder), the file's own metadata holds the rest as JSON. No random state is stored, because every step seeds its
own (see `seed_of`): the position in the run is the random state, for any number of processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

from ner.errors import UserError
from ner.files import WRITING, sync, write

log = logging.getLogger("__main__")
FILE = Path("checkpoint") / "state.safetensors"
RANK_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # adalora's


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
        """Goes to the next epoch. Returns the last one's line of metrics.jsonl, and whether it is the best so far."""
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


def flat(line: dict, prefix: str = "") -> dict[str, float]:
    """A line of metrics.jsonl with keys like dev/micro/f1, as trackers want it."""
    found = {}
    for key, value in line.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return found


def save(run: Path, model, optimizer, progress: Progress) -> None:
    """Replaces the run's checkpoint by that of now. Raises OSError or SafetensorError; the old one then stays whole."""
    import safetensors.torch

    tensors = _ranks(model)
    for name, weight in optimizer.masters.items():
        tensors[f"weight/{name}"] = weight.detach().contiguous()
        if optimizer.scored is not optimizer.masters:
            tensors[f"average/{name}"] = optimizer.scored[name].contiguous()
        for kind, value in optimizer.adamw.state.get(weight, {}).items():
            tensors[f"{kind}/{name}"] = value.contiguous()
    path = run / FILE
    for left in path.parent.iterdir():  # of a process that was killed while it wrote
        if left != path:
            left.unlink()
    temporary = path.with_name(path.name + WRITING)
    state = dataclasses.replace(progress, scale=optimizer.scale)
    safetensors.torch.save_file(tensors, temporary, {"progress": json.dumps(dataclasses.asdict(state))})
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _ranks(model) -> dict:
    """What adalora knows beside its weights: how much each counts, which ranks are masked. Empty for other tunings."""
    import torch

    if not hasattr(getattr(model, "base_model", None), "rankallocator"):
        return {}
    pattern = model.peft_config["default"].rank_pattern or {}
    found = {f"rank/{name}": torch.tensor(kept) for name, kept in pattern.items()}
    for kind in RANK_SCORES:
        found |= {f"{kind}/{name}": score for name, score in getattr(model.base_model.rankallocator, kind).items()}
    return found


def _restore_ranks(model, tensors: dict) -> None:
    """Takes out of `tensors` what _ranks gave."""
    if not hasattr(getattr(model, "base_model", None), "rankallocator"):
        return
    weights = dict(model.base_model.model.named_parameters())
    for key in [key for key in tensors if key.partition("/")[0] in ("rank", *RANK_SCORES)]:
        kind, _, name = key.partition("/")
        if name not in weights or tensors[key].numel() != weights[name].numel():
            continue  # the caller names what is left
        value = tensors.pop(key)
        if kind == "rank":
            settings = model.peft_config["default"]
            settings.rank_pattern = (settings.rank_pattern or {}) | {name: value.tolist()}
        else:
            getattr(model.base_model.rankallocator, kind)[name] = value.to(weights[name].device)


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
        odd = [key for key, kind in kinds.items()
               if key != "best" and not isinstance(values[key], (kind, int) if kind is float else kind)]  # fmt: skip
        scored = [line["dev"]["micro"]["f1"] + line["epoch"] for line in values["history"]]  # numbers, all of them
        if odd or set(values) != set(kinds) or len(scored) != values["epoch"]:
            raise ValueError(f"its progress does not add up {odd or ''}")
        if values["best"] not in (range(1, len(scored) + 1) if scored else (None,)):
            raise ValueError(f"its best epoch is {values['best']}")
        if values["micro_batch"] < 1 or values["step"] < 0:
            raise ValueError("its step or batch is below what can be")
        return tensors, Progress(**values)
    except (safetensors.SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of this program, or damaged ({error}); start a new run") from None


def restore(model, optimizer, tensors: dict, scale: float, path: Path) -> None:
    """Puts the tensors of a checkpoint into the model's trained weights and the optimizer. Raises UserError."""
    import torch

    moments = ("exp_avg", "exp_avg_sq")
    always = ("weight",) if optimizer.scored is optimizer.masters else ("weight", "average")
    with torch.no_grad():
        for name, weight in optimizer.masters.items():
            found = {kind: tensors.pop(f"{kind}/{name}", None) for kind in (*always, "step", *moments)}
            shapes = {kind: tensor.shape for kind, tensor in found.items() if tensor is not None}
            fresh = dict.fromkeys(always, weight.shape)
            if shapes not in (fresh, fresh | dict.fromkeys(moments, weight.shape) | {"step": torch.Size()}):
                raise UserError(
                    f"{path}: {name} does not fit the model; was the encoder changed since? start a new run"
                )
            weight.copy_(found.pop("weight"))
            if len(always) > 1:
                optimizer.scored[name].copy_(found.pop("average"))
            if len(shapes) > len(always):
                optimizer.adamw.state[weight] = {kind: tensor.to(weight.device) for kind, tensor in found.items()}
    _restore_ranks(model, tensors)
    if tensors:
        raise UserError(f"{path}: {next(iter(tensors))} fits no weight of the model; start a new run")
    optimizer.scale = scale
    optimizer.write_back()


class Keeper:
    """Writes what a run must not lose: checkpoint, metrics.jsonl, and model/ after a best epoch.

    One failed write is survived: the best weights stay in memory and go out with the next checkpoint. A second failure
    in a row ends the run. `save_model(folder)` writes the model with the weights it has, whole or not at all. Only the
    process that `writes` does any of it.
    """

    def __init__(self, run: Path, model, optimizer, minutes: float, writes: bool, save_model):
        self.run, self.model, self.optimizer, self.save_model = run, model, optimizer, save_model
        self.pause, self.last, self.writes, self.failed = minutes * 60, time.monotonic(), writes, False
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
            raise UserError(f"{self.run}: the training sentences, their labels or the number of processes changed "
                            "since it was stopped; put them back, or start a new run")  # fmt: skip
        restore(self.model, self.optimizer, tensors, progress.scale, self.run / FILE)
        for left in self.run.glob(".model-*") if self.writes else ():  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        log.info("resumed in epoch %d after %d steps", progress.epoch + 1, progress.step)
        if progress.epoch and progress.best == progress.epoch and not progress.step:
            self.keep(progress, is_best=True)  # it may have been stopped between checkpoint and model
        return progress

    def due(self) -> bool:
        return self.writes and time.monotonic() - self.last >= self.pause

    def keep(self, progress: Progress, is_best: bool = False) -> None:
        """Writes all; `is_best`: the scored weights of now are the best so far. Raises UserError at a second failure."""
        if not self.writes:
            return
        import safetensors

        try:
            if not self.run.is_dir():
                raise FileNotFoundError(2, "the folder is gone", str(self.run))
            if self.best and not is_best:
                self._write_model(self.best)
            save(self.run, self.model, self.optimizer, progress)  # first, so that the rest is written again on resume
            if is_best:
                self._write_model(self.optimizer.scored)
            self.best, is_best = None, False
            write(
                self.run / "metrics.jsonl",
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in progress.history),
            )
            self.failed = False
        except (OSError, safetensors.SafetensorError, UserError) as error:
            what = getattr(error, "strerror", None) or error
            reason = f"{getattr(error, 'filename', None) or self.run}: cannot be written: {what}"
            if self.failed:
                raise UserError(f"{reason}; this was the second time, so the run ends here") from None
            log.warning("%s; the run goes on and tries again at the next checkpoint", reason)
            self.failed = True
            if is_best:
                self.best = {name: weight.detach().clone() for name, weight in self.optimizer.scored.items()}
        self.last = time.monotonic()

    def finish(self, progress: Progress) -> None:
        """Tries once more where the last write failed. Raises UserError."""
        if self.failed:
            self.keep(progress)

    def _write_model(self, weights: dict) -> None:
        with self.optimizer.using(weights):
            self.save_model(self.run / "model")


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
