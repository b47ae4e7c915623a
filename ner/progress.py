"""Where a run stands: the epoch and step under way, the sums of this epoch, and the scores of all epochs before.

No random state is stored: every step seeds its own (`seed_of`), so the position in the run is the random state, for any
number of processes.
"""

import contextlib
import dataclasses
import hashlib
import logging
import random
from collections.abc import Iterator, Sequence

from ner.corpus import Sentence
from ner.windows import Window

log = logging.getLogger("__main__")


@dataclasses.dataclass
class Progress:
    """All that a checkpoint holds beside tensors."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that the epoch under way has taken
    loss: float = 0.0  # of this epoch, summed over labelled units
    units: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict] = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl
    best: int | None = None  # the epoch (from 1) with the highest micro-F1 on dev
    micro_batch: int = 1  # windows that go through the model at once
    scale: float = 1.0  # of the loss, in float16
    good_steps: int = 0  # steps since the scale changed
    data: str = ""  # what is trained on: see digest()
    encoder: dict[str, str] = dataclasses.field(default_factory=dict)  # {file name: sha256} of what it starts from

    def remaining(self, batches: Sequence[list[Window]]) -> Sequence[list[Window]]:
        """Return the batches of an epoch that are still to come."""
        return batches[self.step :]

    def count(self, batch: list[Window], loss: float, seconds: float) -> None:
        """Count a step: its batch, its mean loss, and how long it took."""
        self.step += 1
        self.loss += loss * units_of(batch)
        self.units += units_of(batch)
        self.tokens += tokens_of(batch)
        self.seconds += seconds

    def end_epoch(self, scores: dict, dev_loss: float, learning_rate: float) -> dict:
        """Go to the next epoch. Return the line of metrics.jsonl of the one that has ended."""
        self.epoch += 1
        line = {
            "epoch": self.epoch,
            "train_loss": self.loss / self.units,
            "dev_loss": dev_loss,
            "dev": scores,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "learning_rate": learning_rate,
        }
        self.history.append(line)
        self.best = best_epoch(self.history)
        self.step, self.loss, self.units, self.tokens, self.seconds = 0, 0.0, 0, 0, 0.0
        return line


def best_epoch(history: list[dict]) -> int | None:
    """Return the first epoch (from 1) of the highest micro-F1 on dev, of the lines of metrics.jsonl; None of none."""
    if not history:
        return None
    return max(history, key=lambda line: line["dev"]["micro"]["f1"])["epoch"]


def units_of(batch: list[Window]) -> int:
    """Return how many units the windows of a batch answer for: those that carry a label."""
    return sum(window.own_end - window.own_start for window in batch)


def tokens_of(batch: list[Window]) -> int:
    """Return the number of tokens in the windows of a batch, without padding."""
    return sum(len(window.ids) for window in batch)


def seed_of(*parts: object) -> int:
    """Return a seed below 2**63 that depends on every part: the run's seed, the epoch, the step, the process."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def digest(sentences: list[Sentence], labels: list[str], steps: int) -> str:
    """Return what a run trains on in 64 hexadecimal digits: sentences, labels, steps an epoch."""
    summary = hashlib.sha256(f"{labels} {steps}".encode("utf-8", "surrogatepass"))
    for sentence in sentences:
        summary.update(f"{sentence.units} {sentence.tags}".encode("utf-8", "surrogatepass"))
    return summary.hexdigest()


def flat(line: dict, prefix: str = "") -> dict[str, float]:
    """Return a line of metrics.jsonl with keys like dev/micro/f1, as trackers want it."""
    values: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}/")
        else:
            values[prefix + key] = value
    return values


class TimeLeft:
    """Says once how long a run will take, by the speed of its first steps."""

    FIRST, LAST = 5, 20  # the steps that are timed; the ones before are slower, as memory and kernels are set up

    def __init__(self, tokens_an_epoch: int, epochs: int):
        self.tokens_an_epoch, self.epochs = tokens_an_epoch, epochs
        self.steps = 0
        self.before = Progress()  # as it was after the first of the timed steps

    def log_once(self, progress: Progress) -> None:
        """Count a step, and log the time after the last of those that are timed, where all are of one epoch."""
        self.steps += 1
        if self.steps == self.FIRST:
            self.before = dataclasses.replace(progress)
        if self.steps != self.LAST or progress.step < self.LAST - self.FIRST:
            return
        seconds = progress.seconds - self.before.seconds
        speed = (progress.tokens - self.before.tokens) / max(seconds, 1e-9)
        left = (self.epochs - progress.epoch) * self.tokens_an_epoch - progress.tokens
        log.info("training takes about %s from here, at %.0f tokens a second", duration(left / speed), speed)


def duration(seconds: float) -> str:
    """Return a time in words: 40 seconds, 7 minutes, 3.2 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


@contextlib.contextmanager
def progress_bar(steps: int, shown: bool) -> Iterator:
    """Show a bar over the steps of an epoch, with log lines above it; none where the output is no terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(total=steps, disable=None if shown else True, leave=False, unit="step")
    with bar, contextlib.nullcontext() if bar.disable else logging_redirect_tqdm():
        yield bar
