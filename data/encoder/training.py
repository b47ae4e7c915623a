"""The training loop: schedule, optimizer, checkpoints, log lines."""

import json
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from batches import Maker, Pieces
from e5 import E5
from safetensors import safe_open
from safetensors.torch import save_file
from student import Student, variance
from torch import nn

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Recipe:
    """What a training step does. Lengths are in characters."""

    objectives: dict[str, float]  # and their weights in the loss
    cycles: list[float]  # each with a learning rate that rises and falls
    learning_rate: float
    warm_up: float  # share of a cycle
    decay: float  # share of a cycle in which the rate falls to zero
    masking: str  # "words" or "spans"
    masked: float  # share of the text
    gold_every: int  # every so many batches one is of sentences with gold tags, in the last cycle
    head_factor: float = 1.0  # the heads' learning rate is so many times the encoder's
    detached: float = 0.0  # share of the first cycle in which only the heads learn

    @property
    def total(self) -> float:
        return sum(self.cycles)

    def rate(self, done: float) -> float:
        """Return the learning rate after `done` characters: up, level, down to zero, in each cycle."""
        if done < self.detached * self.cycles[0]:
            return self.learning_rate  # new heads need no warm-up
        for length in self.cycles:
            if done < length:
                return self.learning_rate * min(1, done / (self.warm_up * length), (length - done) / (self.decay * length))
            done -= length
        return 0.0


@dataclass
class Progress:
    step: int = 0
    characters: int = 0
    batches: dict[str, int] = field(default_factory=lambda: {"text": 0, "gold": 0})


class Optimizer:
    """AdamW on float32 copies of bfloat16 weights, which are written back after each step."""

    def __init__(self, student: Student, head_factor: float):
        names, weights = zip(*student.named_parameters())
        self.masters = {name: weight.detach().float().clone().requires_grad_() for name, weight in zip(names, weights)}
        student.to(torch.bfloat16)
        self.weights = dict(student.named_parameters())
        groups = [{"params": [m for n, m in self.masters.items() if n.startswith("heads") == heads], "factor": factor}
                  for heads, factor in ((False, 1.0), (True, head_factor))]  # fmt: skip
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for name, weight in self.weights.items():
            self.masters[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.adamw.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(list(self.weights.values()), list(self.masters.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the masters and AdamW's state under names, for a checkpoint."""
        tensors = {f"weight/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.adamw.state[master].items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(tensors[f"weight/{name}"])
            state = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if state:
                self.adamw.state[master] = state
        self.write_back()


def save_checkpoint(folder: Path, optimizer: Optimizer, progress: Progress) -> None:
    """Write the checkpoint whole or not at all: a kill leaves the one before."""
    temporary = folder / (CHECKPOINT + ".tmp")
    save_file(optimizer.tensors(), temporary, {"progress": json.dumps(asdict(progress))})
    temporary.replace(folder / CHECKPOINT)


def load_checkpoint(folder: Path, optimizer: Optimizer, device: str) -> Progress:
    """Return the progress of the checkpoint, where there is one, and put its weights and state in place."""
    if not (folder / CHECKPOINT).exists():
        return Progress()
    with safe_open(folder / CHECKPOINT, "pt", device=device) as file:
        optimizer.restore({name: file.get_tensor(name) for name in file.keys()})
        progress = Progress(**json.loads(file.metadata()["progress"]))
    print(f"train: goes on at step {progress.step}, {progress.characters} characters", flush=True)
    return progress


class Log:
    """Means of the losses since the last line."""

    def __init__(self, total: float, progress: Progress, seconds: float):
        self.total, self.seconds = total, seconds
        self.began = self.shown = time.time()
        self.first = progress.characters
        self.sums: dict[str, list[float]] = {}

    def add(self, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value.item())

    def show(self, progress: Progress, rate: float) -> None:
        """Print a line, if it is time for one."""
        if time.time() - self.shown < self.seconds and progress.characters < self.total:
            return
        self.shown = time.time()
        speed = (progress.characters - self.first) / (self.shown - self.began)
        losses = ", ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in self.sums.items())
        print(f"train: step {progress.step}, {progress.characters / 1e6:.3f} of {self.total / 1e6:.3f} M characters, "
              f"{losses}, rate {rate:.2e}, {speed:.0f}/s, {(self.total - progress.characters) / speed / 60:.0f} min left",
              flush=True)  # fmt: skip
        self.sums = {}


class Stop:
    """Whether SIGTERM or SIGINT came: the training then writes a checkpoint and ends."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_):
        self.requested = True


def train(student: Student, recipe: Recipe, maker: Maker, text: Pieces, gold: Pieces | None, e5: E5 | None,
          folder: Path, checkpoint_seconds: float, log_seconds: float = 60) -> None:  # fmt: skip
    """Train the student as the recipe says, from the checkpoint in `folder` if there is one; its weights are float32
    afterwards. The same seeds give the same weights, interrupted or not.

    The recipe's lengths may be others than before the interruption: the rate then goes on where theirs is."""
    optimizer = Optimizer(student, recipe.head_factor)
    progress = load_checkpoint(folder, optimizer, maker.device)
    log, stop, saved = Log(recipe.total, progress, log_seconds), Stop(), time.time()
    streams = {"text": text.batches(progress.batches["text"])}
    if gold:
        streams["gold"] = gold.batches(progress.batches["gold"])
    while progress.characters < recipe.total:
        in_last_cycle = progress.characters >= sum(recipe.cycles[:-1])
        is_gold = gold is not None and in_last_cycle and progress.step % recipe.gold_every == recipe.gold_every - 1
        pieces = next(streams["gold" if is_gold else "text"])
        batch = maker.make(pieces, progress.step)
        if e5:
            batch.vectors = e5.vectors(batch.texts, batch.ids.shape[1])
        losses = student(batch, detached=progress.characters < recipe.detached * recipe.cycles[0])
        sum(recipe.objectives[name] * loss for name, loss in losses.items()).backward()
        rate = recipe.rate(progress.characters)
        optimizer.step(rate)

        progress.step += 1
        progress.batches["gold" if is_gold else "text"] += 1
        progress.characters += sum(len(text) for text, *_ in pieces)
        if e5:
            losses["share"] = losses["vectors"] / variance(batch.vectors)
        log.add(**losses)
        log.show(progress, rate)
        if stop.requested or time.time() - saved > checkpoint_seconds:
            save_checkpoint(folder, optimizer, progress)
            saved = time.time()
        if stop.requested:
            raise SystemExit("train: stopped; the same command goes on")
    save_checkpoint(folder, optimizer, progress)
    for name, weight in optimizer.weights.items():
        weight.data = optimizer.masters[name].data
