"""One whole checkpoint of a run at every instant: what it holds, how it is saved, loaded and restored.

A checkpoint is a single safetensors file, so that one rename replaces it: its tensors are what training changes (not
the frozen encoder), its metadata holds the Progress as JSON, and the version of this format.
"""

import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from ner import adalora, saved_model
from ner.errors import UserError
from ner.files import remove_leftovers, replacing, temporary_path, write_text
from ner.optimizer import Optimizer
from ner.progress import Progress, best_epoch

if TYPE_CHECKING:
    from ner.training import Training

log = logging.getLogger("__main__")
FILE = Path("checkpoint") / "state.safetensors"
FORMAT = 3  # 2 knew no encoder; 1 knew no good_steps, and had no version in its metadata


def save(run: Path, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """Replace the run's checkpoint by that of now. Raises OSError or SafetensorError; the old one then stays whole."""
    state = dataclasses.replace(progress, scale=optimizer.scale.value, good_steps=optimizer.scale.good_steps)
    metadata = {"format": str(FORMAT), "progress": json.dumps(dataclasses.asdict(state))}
    with replacing(run / FILE) as temporary:
        # In a folder of its own: safetensors writes beside its target first, and leaves that there when it is killed.
        folder = temporary_path(run / FILE)
        folder.mkdir()
        try:
            save_file(optimizer.state() | adalora.state(model), folder / FILE.name, metadata)
            os.replace(folder / FILE.name, temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def load(run: Path) -> tuple[dict[str, torch.Tensor], Progress] | None:
    """Return the run's checkpoint, or None where it has none yet.

    Raises UserError where it cannot be read, is damaged, or is of a newer program.
    """
    path = (run / FILE).absolute()
    try:
        if not path.exists():
            return None
        path.open("rb").close()  # safetensors says "no such file" of what may not be read
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format", "1") not in map(str, range(1, FORMAT + 1)):
                raise UserError(f"{path}: written by a newer version of this program; go on with that one")
            progress = _progress(metadata)
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; make it readable") from None
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint of this program, or damaged ({error}); start a new run") from None


def _progress(metadata: dict[str, str]) -> Progress:
    """Return the Progress in a checkpoint's metadata. Raises ValueError, KeyError and the like where it is damaged."""
    values = json.loads(metadata["progress"])
    progress = Progress(**values)
    for field in dataclasses.fields(Progress):
        value, default = getattr(progress, field.name), getattr(Progress(), field.name)
        expected = (int, float) if isinstance(default, float) else type(default)
        if field.name != "best" and (not isinstance(value, expected) or isinstance(value, bool)):
            raise ValueError(f"its {field.name} is {value!r:.40}")
    scores = [float(line["dev"]["micro"]["f1"] + line["epoch"]) for line in progress.history]  # numbers, all of them
    if progress.epoch != len(scores) or progress.best != best_epoch(progress.history):
        raise ValueError("its epochs do not add up")
    if progress.micro_batch < 1 or min(progress.step, progress.units, progress.tokens) < 0:
        raise ValueError("its step or batch is below what can be")
    return progress


def restore(model: nn.Module, optimizer: Optimizer, tensors: dict[str, torch.Tensor], progress: Progress) -> None:
    """Put a checkpoint into the model's trained weights and the optimizer. Raises UserError where it does not fit."""
    try:
        optimizer.load_state(tensors)
    except ValueError as error:
        raise UserError(f"{error} does not fit the model; was the encoder changed since? start a new run") from None
    adalora.load_state(model, tensors)
    if tensors:
        raise UserError(f"{next(iter(tensors))} fits no weight of the model; start a new run")
    optimizer.scale.value, optimizer.scale.good_steps = progress.scale, progress.good_steps


class Checkpoints:
    """Writes what a run must not lose: its checkpoint, metrics.jsonl, and model/ after a best epoch.

    One failed write is survived: the best weights stay in memory and go out with the next checkpoint. A second failure
    in a row ends the run. Only the process that `writes` does any of it.
    """

    def __init__(self, run: Path, training: "Training", minutes: float, writes: bool):
        self.run, self.training, self.optimizer = run.absolute(), training, training.optimizer
        self.seconds, self.last, self.writes = minutes * 60, time.monotonic(), writes
        self.failed = False  # the last write did
        self.unsaved_best: dict[str, torch.Tensor] | None = None  # weights of a best epoch that are not on disk yet

    def resume(self) -> Progress | None:
        """Put the run's checkpoint, if there is one, into model and optimizer. Return where the run stands.

        Raises UserError where it does not fit, or was trained on something else.
        """
        if self.writes:
            for path in (self.run / FILE, self.run / "model", self.run / "metrics.jsonl"):
                remove_leftovers(path)
        saved = load(self.run)
        if saved is None:
            return None
        tensors, progress = saved
        if progress.data != self.training.digest:
            raise UserError(
                f"{self.run}: the training sentences, their labels or the number of processes changed "
                "since it was stopped; put them back, or start a new run"
            )
        self._check_encoder(progress)
        try:
            restore(self.training.model, self.optimizer, tensors, progress)
        except UserError as error:
            raise UserError(f"{self.run / FILE}: {error}") from None
        log.info("resumed in epoch %d after %d steps", progress.epoch + 1, progress.step)
        if self.writes:
            self._repair(progress)
        return progress

    def _check_encoder(self, progress: Progress) -> None:
        """Raise UserError where a file of the encoder, whose frozen weights no checkpoint holds, is another now."""
        now, name = self.training.encoder_digests, self.training.config.pretrained
        if not progress.encoder:
            log.warning("the checkpoint has no digest of its encoder: a change of %s would go unnoticed", name)
            progress.encoder = now
        changed = sorted(file for file in now | progress.encoder if now.get(file) != progress.encoder.get(file))
        if changed:
            raise UserError(
                f"{self.run}: {', '.join(changed)} of the encoder {name} changed since the run was stopped; put the "
                "old file back, or start a new run"
            )

    def _repair(self, progress: Progress) -> None:
        """Write what a process that was killed after its checkpoint did not come to."""
        if progress.best and progress.best == progress.epoch and not progress.step and not self._has_model_of(progress):
            self._write_model(self.optimizer.scored, progress.best)
        self._write_metrics(progress)

    def _has_model_of(self, progress: Progress) -> bool:
        """Whether the saved model is that of the best epoch, and loads; what lies beside it then stays."""
        try:
            return saved_model.load(self.run / "model")[2]["epoch"] == progress.best
        except UserError:
            return False

    def begin(self) -> None:
        """Make the checkpoint's folder, as training begins: from now on the run's folder stays."""
        if self.writes:
            (self.run / FILE).parent.mkdir(exist_ok=True)

    def due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return self.writes and time.monotonic() - self.last >= self.seconds

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write all; `is_best`: the scored weights of now are the best so far. Raises UserError at a second failure."""
        if not self.writes:
            return
        try:
            self._write(progress, is_best)
            self.failed = False
        except (OSError, safetensors.SafetensorError, UserError) as error:
            reason = f"{getattr(error, 'filename', None) or self.run}: cannot be written: "
            reason += str(getattr(error, "strerror", None) or error)
            if self.failed:
                raise UserError(f"{reason}; this was the second time, so the run ends here") from None
            log.warning("%s; the run goes on and tries again at the next checkpoint", reason)
            self.failed = True
            if is_best:
                self.unsaved_best = {name: w.detach().clone() for name, w in self.optimizer.scored.items()}
        self.last = time.monotonic()

    def finish(self, progress: Progress) -> None:
        """Try once more where the last write failed. Raises UserError."""
        if self.failed:
            self.save(progress)

    def _write(self, progress: Progress, is_best: bool) -> None:
        """Write the checkpoint first, so that resuming from it writes the rest again.

        An older best epoch goes before it, for a checkpoint of a later step would not.
        """
        if not self.run.is_dir():
            raise FileNotFoundError(2, "the folder is gone", str(self.run))
        if self.unsaved_best and not is_best:
            self._write_model(self.unsaved_best, progress.best)
        save(self.run, self.training.model, self.optimizer, progress)
        if is_best:
            self._write_model(self.optimizer.scored, progress.best)
        self.unsaved_best = None
        self._write_metrics(progress)

    def _write_model(self, weights: dict[str, torch.Tensor], epoch: int | None) -> None:
        with self.optimizer.using(weights):
            self.training.save_model(self.run / "model", epoch or 0)

    def _write_metrics(self, progress: Progress) -> None:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in progress.history)
        write_text(self.run / "metrics.jsonl", lines)
