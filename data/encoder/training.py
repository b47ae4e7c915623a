"""The training loop: schedule, optimizer, checkpoints, log lines."""

import json
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from batches import Maker, Piece, Pieces
from safetensors import safe_open
from safetensors.torch import save_file
from student import Batch, Student, variance
from torch import nn

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Progress:
    """How far a training is: all that its data and its learning rate depend on."""

    step: int = 0
    characters: int = 0
    batches: dict[str, int] = field(default_factory=lambda: {"text": 0, "gold": 0})

    def count(self, stream: str, pieces: list[Piece]) -> None:
        self.step += 1
        self.batches[stream] += 1
        self.characters += sum(len(piece.text) for piece in pieces)


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
    plain_share: float = 1.0  # of the pieces in which the analyser sees no entity only this share is used
    head_factor: float = 1.0  # the heads' learning rate is so many times the encoder's
    detached: float = 0.0  # share of the first cycle in which only the heads learn

    @property
    def total(self) -> float:
        return sum(self.cycles)

    def is_detached(self, done: float) -> bool:
        """Whether only the heads learn, after `done` characters."""
        return done < self.detached * self.cycles[0]

    def rate(self, done: float) -> float:
        """Return the learning rate after `done` characters: up, level, down to zero, in each cycle."""
        if self.is_detached(done):
            return self.learning_rate  # new heads need no warm-up
        for length in self.cycles:
            if done < length:
                rise, fall = done / (self.warm_up * length), (length - done) / (self.decay * length)
                return self.learning_rate * min(1, rise, fall)
            done -= length
        return 0.0

    def stream(self, progress: Progress) -> str:
        """Return which stream the next batch is of, "text" or "gold"."""
        in_last_cycle = progress.characters >= sum(self.cycles[:-1])
        return "gold" if in_last_cycle and progress.step % self.gold_every == self.gold_every - 1 else "text"

    def loss(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.objectives[name] * loss for name, loss in losses.items()]).sum()


class Optimizer:
    """AdamW on float32 copies of weights that compute in `dtype`, which are written back after each step."""

    def __init__(self, student: Student, head_factor: float, dtype: torch.dtype):
        parameters = student.named_parameters()
        self.masters = {name: weight.detach().clone().requires_grad_() for name, weight in parameters}
        student.to(dtype)
        self.weights = dict(student.named_parameters())
        groups = [
            {"params": [m for name, m in self.masters.items() if name.startswith("heads") == is_head], "factor": factor}
            for is_head, factor in ((False, 1.0), (True, head_factor))
        ]
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
            if f"step/{name}" in tensors:  # the encoder has none while only the heads learn
                self.adamw.state[master] = {k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq")}
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
        names = file.keys()
        optimizer.restore({name: file.get_tensor(name) for name in names})
        progress = Progress(**json.loads(file.metadata()["progress"]))
    print(f"train: goes on at step {progress.step}, {progress.characters} characters", flush=True)
    return progress


class Log:
    """Prints a line every so many seconds, with the means of the losses since the last."""

    def __init__(self, total: float, progress: Progress, seconds: float):
        self.total, self.seconds, self.first = total, seconds, progress.characters
        self.began = self.shown = time.time()
        self.sums: dict[str, list[float]] = {}

    def add(self, losses: dict[str, torch.Tensor], batch: Batch) -> None:
        if batch.vectors is not None:  # `vectors` in parts of the targets' variance: 1 is to know nothing
            losses["share"] = losses["vectors"] / variance(batch.vectors)
        for name, loss in losses.items():
            self.sums.setdefault(name, []).append(loss.item())

    def show(self, progress: Progress, rate: float) -> None:
        """Print a line if it is time for one, and at the end."""
        if time.time() - self.shown < self.seconds and progress.characters < self.total:
            return
        self.shown = time.time()
        speed = (progress.characters - self.first) / (self.shown - self.began)
        losses = ", ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in self.sums.items())
        done, left = f"{progress.characters / 1e6:.3f}", (self.total - progress.characters) / speed / 60
        print(
            f"train: step {progress.step}, {done} of {self.total / 1e6:.3f} M characters, {losses}, rate {rate:.2e}, "
            f"{speed:.0f}/s, {left:.0f} min left",
            flush=True,
        )
        self.sums = {}


class Stop:
    """Whether SIGTERM or SIGINT came: the training then writes a checkpoint and ends."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_):
        self.requested = True


def train(
    student: Student,
    recipe: Recipe,
    maker: Maker,
    streams: dict[str, Pieces],
    folder: Path,
    dtype: torch.dtype,
    checkpoint_seconds: float,
    log_seconds: float = 60,
) -> None:
    """Train the student as the recipe says, from the checkpoint in `folder` if there is one; afterwards its weights are
    float32. Interrupted or not, the result is the same.

    streams: "text" and, where there are sentences with gold tags, "gold". dtype: what the student computes in.

    After an interruption the recipe may have other lengths: the learning rate goes on as theirs. Raises SystemExit when
    it was stopped by a signal."""
    optimizer = Optimizer(student, recipe.head_factor, dtype)
    progress = load_checkpoint(folder, optimizer, maker.device)
    batches = {name: stream.batches(progress.batches[name]) for name, stream in streams.items()}
    log, stop, saved = Log(recipe.total, progress, log_seconds), Stop(), time.time()
    while progress.characters < recipe.total:
        stream = recipe.stream(progress) if "gold" in streams else "text"
        pieces = next(batches[stream])
        batch = maker.make(pieces, seed=progress.step)
        losses = student(batch, recipe.is_detached(progress.characters))
        recipe.loss(losses).backward()
        rate = recipe.rate(progress.characters)
        optimizer.step(rate)
        progress.count(stream, pieces)
        log.add(losses, batch)
        log.show(progress, rate)
        if stop.requested or time.time() - saved > checkpoint_seconds:
            save_checkpoint(folder, optimizer, progress)
            saved = time.time()
        if stop.requested:
            raise SystemExit("train: stopped; the same command goes on")
    save_checkpoint(folder, optimizer, progress)
    for name, weight in optimizer.weights.items():
        weight.data = optimizer.masters[name].data
