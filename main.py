"""Trains a tagger: reads the sentences, tunes the encoder, keeps the best epoch, scores it once on test.

python main.py                                # everything as config.yaml says
python main.py --tuning full --epochs 8       # any key of it, on the command line
python main.py --resume latest                # go on where a run was stopped
accelerate launch main.py                     # the same on several devices
"""

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ner import config as settings
from ner import run as folder
from ner import scores as scoring
from ner.errors import UserError, command
from ner.files import write_text
from ner.progress import flat, seed_of, units_of

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from ner.checkpoint import Checkpoints
    from ner.corpus import Corpus, Sentence
    from ner.progress import Progress
    from ner.stop import Stop
    from ner.training import Training
    from ner.windows import Window

log = logging.getLogger("__main__")
RESULTS = ("test.json", "predictions.jsonl", "finished.json")  # what a run that has ended holds


@command
def main(argv: list[str] | None = None) -> None:
    config, flags = settings.load(argv)  # before torch is imported: a wrong key is answered at once
    from ner import corpora, distributed

    accelerator = distributed.start(config)
    if flags.resume:
        run = Path(flags.resume)
    else:
        run = distributed.from_first(accelerator, lambda: folder.new_run(config.output, config.run))
    with folder.opened(run, writes=accelerator.is_main_process):
        log.info("run %s", run)
        if flags.resume:
            folder.check_same(config, run)
        corpus, dev, test = corpora.read(config, accelerator)
        progress = train(config, run, accelerator, corpus, dev)
        finish(config, run, accelerator, progress, dev, test, flags.push_to_hub)


def train(
    config: settings.Config, run: Path, accelerator: "Accelerator", corpus: "Corpus", dev: "list[Sentence]"
) -> "Progress":
    """Train from where the run stands to the last epoch; leave the best one in run/model. Exits where it is stopped."""
    from ner.checkpoint import Checkpoints
    from ner.progress import Progress, progress_bar
    from ner.stop import Stop
    from ner.training import build

    training = build(config, corpus, accelerator, run)
    writes, steps = accelerator.is_main_process, training.steps_an_epoch
    checkpoints = Checkpoints(run, training, config.checkpoint_minutes, writes)
    progress = checkpoints.resume() or Progress(
        data=training.digest, encoder=training.encoder_digests, micro_batch=config.batch_size
    )
    if writes and (progress.epoch < config.epochs or config.test is None):
        discard_results(run)
    with progress_bar(steps, shown=writes) as bar, Stop(accelerator) as stop:
        for epoch in range(progress.epoch, config.epochs):
            log.info("epoch %d begin", epoch + 1)
            bar.reset()
            bar.update(progress.step)
            train_epoch(training, progress, checkpoints, stop, bar)
            if not stop.agreed():
                score_epoch(training, dev, progress, checkpoints, stop)
            if stop.agreed():
                checkpoints.save(progress)
                log.info("stopped in epoch %d after %d of %d steps; go on with: python main.py --resume %s",
                         progress.epoch + 1, progress.step, steps, run)  # fmt: skip
                sys.exit(128 + stop.requested)
    checkpoints.finish(progress)
    return progress


def train_epoch(
    training: "Training", progress: "Progress", checkpoints: "Checkpoints", stop: "Stop", bar: "tqdm"
) -> None:
    """Take the steps that remain of an epoch, or return after the one in which a signal came."""
    from ner import adalora, distributed

    config, model, optimizer, steps = training.config, training.model, training.optimizer, training.steps_an_epoch
    model.train()
    for batch in progress.remaining(training.batches_of(progress.epoch)):
        began = time.perf_counter()
        step = progress.epoch * steps + progress.step  # over all epochs, from 0
        learning_rate = training.learning_rate(step)
        loss_sum = add_gradients(training, batch, progress, step)  # forward, loss, backward: see below
        loss = distributed.sum_over_processes(training.accelerator, loss_sum, optimizer) / units_of(batch)
        gradients = adalora.gradients(model, optimizer.scale.value)
        norm = optimizer.step(learning_rate, config.max_grad_norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or optimizer.scale.may_overflow):
            raise UserError(not_finite(training, progress, batch, loss, norm, learning_rate))
        if math.isfinite(norm):  # else the step was left out, as float16 has overflowed
            adalora.after_step(model, step + 1, training.steps, gradients, optimizer)
            optimizer.average(step + 1)
        if progress.step in (0, (steps - 1) // 2, steps - 1):
            log.info("batch loss %f", loss)
        progress.count(batch, loss, time.perf_counter() - began)
        training.time_left.log_once(progress)
        bar.update()
        if checkpoints.due():
            checkpoints.save(progress)
        if stop.agreed():
            return


def add_gradients(training: "Training", batch: "list[Window]", progress: "Progress", step: int) -> "torch.Tensor":
    """Add the gradient of a batch's mean loss over all labelled units. Return this process's part of the summed loss.

    The processes share the batch, and each works through its share progress.micro_batch windows at a time, fewer where
    memory does not suffice. As every sum is divided by the units of the whole batch, each way to share it gives the
    same gradient. Raises UserError where memory does not suffice for a single window.
    """
    import torch

    from ner.memory import smaller_batch

    accelerator = training.accelerator
    share = batch[accelerator.process_index :: accelerator.num_processes]
    torch.manual_seed(seed_of(training.config.seed, step, accelerator.process_index))
    try:
        return forward_backward(training, share, units_of(batch), progress.micro_batch)
    except RuntimeError as error:
        progress.micro_batch = smaller_batch(error, share, progress.micro_batch)
    training.optimizer.clear_gradients()
    return add_gradients(training, batch, progress, step)


def forward_backward(training: "Training", share: "list[Window]", units: int, micro_batch: int) -> "torch.Tensor":
    """Add the gradient of the loss of `share`, divided by `units`. Return the loss, summed: a float32 scalar."""
    import torch

    total = torch.zeros((), device=training.device)
    for start in range(0, len(share), micro_batch):
        inputs, labels = training.collate(share[start : start + micro_batch])
        loss = training.loss(training.model(**inputs).logits, labels)
        training.optimizer.backward(loss / units)
        if training.adversary:
            with training.adversary.moved():
                moved_loss = training.loss(training.model(**inputs).logits, labels)
                training.optimizer.backward(moved_loss / units)
        total += loss.detach()
    return total


def score_epoch(
    training: "Training", dev: "list[Sentence]", progress: "Progress", checkpoints: "Checkpoints", stop: "Stop"
) -> None:
    """Score the epoch on dev, keep it where it is the best, and go to the next; do nothing where a signal comes."""
    accelerator, steps = training.accelerator, training.steps_an_epoch
    log.info("epoch average loss: %f", progress.loss / progress.units)
    log.info("开始测试第%d轮模型效果：", progress.epoch + 1)
    with training.scored_weights():
        result = stop.break_off(lambda: scoring.score_sentences(training.tagger, dev, accelerator))
    if result is None:
        return
    scores, predicted, dev_loss = result
    log_scores(scores)
    last_rate = training.learning_rate(progress.epoch * steps + steps - 1)
    line = progress.end_epoch(scores, dev_loss, last_rate)
    is_best = progress.best == progress.epoch
    log.info("epoch %d took %.1f seconds, %.0f tokens a second; dev loss %f%s", progress.epoch, line["seconds"],
             line["tokens_per_second"], dev_loss, "; the best so far" if is_best else "")  # fmt: skip
    if not any(tag != "O" for tags in predicted for tag in tags):
        log.warning("%s", nothing_predicted(training.config, progress.epoch * steps))
    checkpoints.save(progress, is_best)
    accelerator.log(flat(line), step=progress.epoch)


def finish(
    config: settings.Config,
    run: Path,
    accelerator: "Accelerator",
    progress: "Progress",
    dev: "list[Sentence]",
    test: "list[Sentence] | None",
    hub: str | None,
) -> None:
    """Score the best epoch on test as it was saved, and write what the other commands read."""
    from ner.tagging import Tagger

    accelerator.wait_for_everyone()
    if test is not None:
        log.info("开始测试第%d轮模型在测试集上的效果：", progress.best)
        tagger = Tagger.of(run, device=accelerator.device, precision=config.precision)
        scores, predicted, _ = scoring.score_sentences(tagger, test, accelerator)
        log_scores(scores)
    if accelerator.is_main_process:
        if test is not None:
            rows = [{"chars": s.chars, "gold": s.tags, "predicted": t} for s, t in zip(test, predicted, strict=True)]
            write_lines(run / "predictions.jsonl", rows)
            write_lines(run / "test.json", [scores])
        write_lines(run / "finished.json", [{"best_epoch": progress.best, "epochs": progress.epoch}])
        hand_on(config, run, dev, hub)
    accelerator.end_training()
    log.info("finished: %s", run)
    log.info("next: python predict.py --run %s, or open %s", run, (run / "report.html").absolute())


def hand_on(config: settings.Config, run: Path, dev: "list[Sentence]", hub: str | None) -> None:
    """Write what is made of a finished run, and upload it where a name on the hub was given."""
    from ner import card, export, report
    from ner import hub as model_hub

    export.export_finished(run, config.export, dev)
    for what, write in {"report": report.write, "model card": card.write_card}.items():
        try:
            log.info("%s: %s", what, write(run))
        except Exception as error:  # the run is whole without it
            log.warning("no %s was written: %s: %s", what, type(error).__name__, error)
    if hub:
        log.info("uploaded: %s", model_hub.push(run, hub))


def write_lines(path: Path, rows: list[dict]) -> None:
    """Replace a file by JSON, a line a row."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def discard_results(run: Path) -> None:
    """Delete the scores of an earlier end of the run, which is to end otherwise now."""
    if found := [name for name in RESULTS if (run / name).exists()]:
        for name in found:
            (run / name).unlink()
        log.info("deleted, as the run goes on: %s", ", ".join(found))


def log_scores(scores: dict) -> None:
    """Log precision, recall and F1 of each type, and the two averages."""
    for name, row in scores["types"].items():
        log.info("%s类实体，准确率：%f, 召回率: %f, F1: %f", name, row["precision"], row["recall"], row["f1"])
    log.info("Macro-F1: %f", scores["macro"]["f1"])
    log.info("Micro-F1 %f", scores["micro"]["f1"])
    log.info("-" * 20)


def not_finite(
    training: "Training", progress: "Progress", batch: "list[Window]", loss: float, norm: float, rate: float
) -> str:
    """Say of a step whose loss or gradient is not finite all that is needed to look into it."""
    numbers = sorted({training.corpus.sentences[window.sentence].line for window in batch})
    return (
        f"{training.config.train}: epoch {progress.epoch + 1}, step {progress.step + 1}: the loss is {loss:g} and the "
        f"gradient's norm {norm:g} at learning rate {rate:g}, in a batch of the sentences at lines "
        f"{', '.join(map(str, numbers))}; the last checkpoint is whole; try a lower learning_rate, or precision fp32"
    )


def nothing_predicted(config: settings.Config, steps: int) -> str:
    """Say of an epoch after which no entity was predicted on dev what the likely cause is."""
    cause = settings.rate_warning(config)
    cause = cause or f"{steps} steps at learning rate {config.learning_rate:g} were too few or too small"
    return f"no entity at all was predicted on dev, every unit is tagged O; the likely cause: {cause}"


if __name__ == "__main__":
    main()
