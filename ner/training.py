"""What main.py's loop works on: a tuned model, its optimizer, its loss, and the training windows in their steps."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ner import adalora, batches, encoder, kernels, saved_model
from ner import model as models
from ner.adversarial import FastGradient
from ner.config import Config, dump, no_effect_warnings, rate_warning
from ner.corpus import Corpus, label_list
from ner.crf import Crf
from ner.errors import UserError
from ner.files import write_text
from ner.losses import Loss, loss_function
from ner.optimizer import Optimizer
from ner.precision import choose_dtype
from ner.progress import Progress, TimeLeft, digest, seed_of, tokens_of
from ner.run import environment
from ner.tagging import Tagger
from ner.windows import Window

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("__main__")
ENCODER_FILES = ("config.json", "tokenizer.json", "vocab.txt")  # beside its weights: what a run on it depends on


@dataclasses.dataclass
class Training:
    """Built by build(). Steps count from 0, over all epochs."""

    config: Config
    accelerator: "Accelerator"
    corpus: Corpus
    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase"
    meta: dict  # what ner.json will hold
    optimizer: Optimizer
    tagger: Tagger  # tags dev with the model as it is
    windows: list[Window]
    gold: list[list[int]]  # the label indices of each sentence
    windows_a_step: int  # however many processes and passes share them
    loss: Loss  # (logits, labels) -> the summed loss
    crf: Crf | None = None  # where it is the loss
    adversary: FastGradient | None = None

    @functools.cached_property
    def digest(self) -> str:
        """What is trained on, for checkpoints: sentences, labels and steps."""
        return digest(self.corpus.sentences, self.meta["labels"], self.steps_an_epoch)

    @functools.cached_property
    def encoder_digests(self) -> dict[str, str]:
        """{file name: sha256} of the encoder's weights, config and tokenizer, for checkpoints."""
        folder = Path(encoder.find(self.config.pretrained)[0])
        weights = self.meta["encoder_sha256"] or encoder.digests(folder)
        others = [folder / name for name in ENCODER_FILES if (folder / name).is_file()]
        return weights | {file.name: encoder.sha256(file) for file in others}

    @functools.cached_property
    def time_left(self) -> TimeLeft:
        """Says how long the run will take."""
        return TimeLeft(tokens_of(self.windows), self.epochs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def epochs(self) -> int:
        """Of the whole run."""
        assert self.config.epochs != "auto"  # settings.with_epochs() has put in what it means
        return self.config.epochs

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.windows) / self.windows_a_step)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.steps_an_epoch

    @property
    def logged_steps(self) -> tuple[int, int, int]:
        """The steps of an epoch whose loss is logged: the first, the middle one and the last."""
        return 0, (self.steps_an_epoch - 1) // 2, self.steps_an_epoch - 1

    def steps_taken(self, progress: Progress) -> int:
        """Return how many steps the run has taken, which is the number of the next one."""
        return progress.epoch * self.steps_an_epoch + progress.step

    def batches_of(self, epoch: int) -> list[list[Window]]:
        """Return the batches of an epoch (from 0), one a step, mixed by the run's seed and the epoch."""
        return batches.shuffled(self.windows, self.windows_a_step, seed=seed_of(self.config.seed, epoch))

    def collate(self, windows: list[Window]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the model's inputs and the labels, int64 [windows, length] each, on its device."""
        tensors = batches.collate(windows, self.tagger.pad_id, self.gold)
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return tensors, tensors.pop("labels")

    def learning_rate(self, step: int) -> float:
        """Return a straight line up while warming up, then one down that reaches 0 after the last step."""
        warmup = round(self.steps * self.config.warmup_ratio)
        share = (step + 1) / warmup if step < warmup else (self.steps - step) / (self.steps - warmup)
        return peak_learning_rate(self.config) * share

    def optimizer_step(self, step: int) -> float:
        """Clip the gradients, take step `step`, mask AdaLoRA's ranks, and move the averaged weights.

        Returns the gradients' norm before clipping. Where it is not finite, as float16 may overflow, nothing changed.
        """
        gradients = adalora.gradients(self.model, self.optimizer.scale.value)
        norm = self.optimizer.step(self.learning_rate(step), self.config.max_grad_norm)
        if math.isfinite(norm):
            adalora.after_step(self.model, step + 1, self.steps, gradients, self.optimizer)
            self.optimizer.average(step + 1)
        return norm

    def check_finite(self, loss: float, norm: float, batch: list[Window], step: int) -> None:
        """Raise UserError where loss or norm of a step is not finite, but for what a smaller loss scale will cure."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.optimizer.scale.may_overflow):
            return
        epoch, step_of_epoch = divmod(step, self.steps_an_epoch)
        lines = sorted({self.corpus.sentences[window.sentence].line for window in batch})
        raise UserError(
            f"{self.config.train}: epoch {epoch + 1}, step {step_of_epoch + 1}: the loss is {loss:g} and the "
            f"gradient's norm {norm:g} at learning rate {self.learning_rate(step):g}, in a batch of the sentences at "
            f"lines {', '.join(map(str, lines))}; the last checkpoint is whole; try a lower learning_rate, or "
            "precision fp32"
        )

    def summary(self) -> str:
        """Return a line on the windows and steps of an epoch, the tuning and its learning rate."""
        windows = f"{len(self.windows)} windows of at most {self.meta['max_length']} tokens"
        steps = f"{self.windows_a_step} in a step, {self.steps_an_epoch} steps an epoch, {self.epochs} epochs"
        return f"{windows}, {steps}; {self.config.tuning} at learning rate {self.config.learning_rate:g}"

    def why_nothing_is_predicted(self, steps: int) -> str:
        """Say of the weights after so many steps, which predict no entity on dev, what the likely cause is."""
        cause = rate_warning(self.config)
        cause = cause or f"{steps} steps at learning rate {self.config.learning_rate:g} were too few or too small"
        return f"no entity at all was predicted on dev, every unit is tagged O; the likely cause: {cause}"

    @contextlib.contextmanager
    def scored_weights(self) -> Iterator[None]:
        """Have model and tagger compute with the weights that an epoch is judged by and that are saved."""
        with self.optimizer.using(self.optimizer.scored):
            self.tagger.transitions = self.crf.numpy() if self.crf else None
            yield

    def save_model(self, folder: Path, epoch: int) -> None:
        """Write the model with the weights that it has now, those after `epoch`, whole or not at all."""
        transitions = {"transitions": self.crf.numpy()} if self.crf else {}
        saved_model.save(self.model, self.tokenizer, self.meta | transitions | {"epoch": epoch}, folder)


def build(config: Config, corpus: Corpus, accelerator: "Accelerator") -> Training:
    """Build all that is needed to train on `corpus`, with new weights drawn by config.seed; log what was chosen.

    Writes nothing. Raises UserError where the encoder cannot be had or used.
    """
    device, labels = accelerator.device, label_list(corpus.sentences)
    dtype, reason = choose_dtype(config.precision, device)
    log.info("device %s, %d process(es), %d thread(s)", device, accelerator.num_processes, torch.get_num_threads())
    log.info("precision %s: %s", str(dtype).removeprefix("torch."), reason)
    if warning := rate_warning(config):
        log.warning("%s", warning)
    for warning in no_effect_warnings(config):
        log.warning("%s", warning)
    torch.manual_seed(config.seed)
    attention = kernels.attention_implementation(device, config.kernels)
    model, tokenizer, meta = models.build(config, labels, corpus.unit, attention)
    log.info("labels: %s", " ".join(labels))
    log.info("%s", models.trainable_line(model))
    kernels.prepare(model, dtype, device, config.kernels)
    tagger = Tagger(model, tokenizer, meta)
    crf = Crf(labels).to(device) if config.head == "crf" else None
    label2id = {label: index for index, label in enumerate(labels)}
    training = Training(
        config=config,
        accelerator=accelerator,
        corpus=corpus,
        model=model,
        tokenizer=tokenizer,
        meta=meta,
        optimizer=build_optimizer(config, model, crf),
        tagger=tagger,
        windows=tagger.windower.windows([sentence.units for sentence in corpus.sentences]),
        gold=[[label2id[tag] for tag in sentence.tags] for sentence in corpus.sentences],
        windows_a_step=config.batch_size * config.accumulation * accelerator.num_processes,
        loss=crf or loss_function(config.loss, config.label_smoothing),
        crf=crf,
        adversary=FastGradient(model, config.adversarial_epsilon) if config.adversarial == "fgm" else None,
    )
    log.info("%s", training.summary())
    return training


def build_optimizer(config: Config, model: nn.Module, crf: Crf | None = None) -> Optimizer:
    """Return the optimizer of a model that kernels.prepare() has put into its type and place, and of its CRF."""
    return Optimizer(
        model,
        peak_learning_rate(config),
        config.weight_decay,
        config.averaging,
        head=models.head_weights(model),
        head_factor=config.head_factor or 1.0,
        masked=adalora.masked_weights(model),
        extra={"crf.transitions": crf.transitions} if crf else {},
        extra_rate=config.crf_learning_rate,
    )


def peak_learning_rate(config: Config) -> float:
    """Return the learning rate, which settings.load() has put in where the user gave none."""
    assert config.learning_rate is not None
    return config.learning_rate


def describe(training: Training, run: Path) -> None:
    """Write the run's config.yaml and environment.json, by the process that writes there, and start its trackers."""
    config, accelerator = training.config, training.accelerator
    if accelerator.is_main_process:
        dtype = next(training.model.parameters()).dtype
        write_text(run / "config.yaml", dump(config))
        write_text(run / "environment.json", json.dumps(environment(accelerator, dtype), indent=1) + "\n")
    if config.trackers:
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("ner", {key: str(value) for key, value in config.model_dump().items()})
