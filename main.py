"""Trains a tagger: reads the sentences, tunes the encoder, keeps the best epoch, scores it once on test.

python main.py                                # everything as config.yaml says
python main.py --tuning full --epochs 8       # any key of it, on the command line
python main.py --resume latest                # go on where a run was stopped
accelerate launch main.py                     # the same on several devices

What needs torch is imported inside the functions, so that a wrong key is answered at once.
"""

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ner import config as settings
from ner import results
from ner import run as folder
from ner import scores as scoring
from ner.errors import command
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


@command
def main(argv: list[str] | None = None) -> None:
    """Read the sentences, train, score the best epoch on test."""
    config, flags = settings.load(argv)
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
        config = settings.with_epochs(config, len(corpus.sentences))
        progress = train(config, run, accelerator, corpus, dev)
        finish(config, run, accelerator, progress, dev, test, flags.push_to_hub)


def train(
    config: settings.Config, run: Path, accelerator: "Accelerator", corpus: "Corpus", dev: "list[Sentence]"
) -> "Progress":
    """Train from where the run stands to the last epoch; leave the best one in run/model. Exits where it is stopped."""
    from ner.checkpoint import Checkpoints
    from ner.progress import Progress, progress_bar
    from ner.stop import Stop
    from ner.training import build, describe

    training = build(config, corpus, accelerator)
    writes = accelerator.is_main_process
    checkpoints = Checkpoints(run, training, config.checkpoint_minutes, writes)
    progress = checkpoints.resume() or Progress(
        data=training.digest, encoder=training.encoder_digests, micro_batch=config.batch_size
    )
    if writes and (progress.epoch < training.epochs or config.test is None):
        results.discard(run)
    describe(training, run)  # only now: a resume that is refused leaves the run as it was
    checkpoints.begin()
    folder.write_held_log()
    with progress_bar(training.steps_an_epoch, shown=writes) as bar, Stop(accelerator) as stop:
        for epoch in range(progress.epoch, training.epochs):
            log.info("epoch %d begin", epoch + 1)
            train_epoch(training, progress, checkpoints, stop, bar)
            if not stop.agreed():
                score_epoch(training, dev, progress, checkpoints, stop)
            if stop.agreed():
                checkpoints.save(progress)
                log.info("stopped in epoch %d after %d of %d steps; go on with: python main.py --resume %s",
                         progress.epoch + 1, progress.step, training.steps_an_epoch, run)  # fmt: skip
                sys.exit(128 + stop.requested)
    checkpoints.finish(progress)
    return progress


def train_epoch(
    training: "Training", progress: "Progress", checkpoints: "Checkpoints", stop: "Stop", bar: "tqdm"
) -> None:
    """Take the steps that remain of an epoch, or return after the one in which a signal came."""
    from ner import distributed

    bar.reset()
    bar.update(progress.step)
    training.model.train()
    for batch in progress.remaining(training.batches_of(progress.epoch)):
        began = time.perf_counter()
        step = training.steps_taken(progress)
        loss_sum = add_gradients(training, batch, progress, step)  # forward, loss, backward: see below
        loss = distributed.sum_over_processes(training.accelerator, loss_sum, training.optimizer) / units_of(batch)
        norm = training.optimizer_step(step)
        training.check_finite(loss, norm, batch, step)
        if progress.step in training.logged_steps:
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

    rank, processes = training.accelerator.process_index, training.accelerator.num_processes
    share = batch[rank::processes]
    while True:
        torch.manual_seed(seed_of(training.config.seed, step, rank))
        try:
            return forward_backward(training, share, units_of(batch), progress.micro_batch)
        except RuntimeError as error:
            progress.micro_batch = smaller_batch(error, share, progress.micro_batch)
        training.optimizer.clear_gradients()


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
    log.info("epoch average loss: %f", progress.loss / progress.units)
    log.info("开始测试第%d轮模型效果：", progress.epoch + 1)
    with training.scored_weights():
        result = stop.break_off(lambda: scoring.score_sentences(training.tagger, dev, training.accelerator))
    if result is None:
        return
    scores, predicted, dev_loss = result
    scoring.log_scores(scores)
    steps = training.steps_taken(progress)
    line = progress.end_epoch(scores, dev_loss, learning_rate=training.learning_rate(steps - 1))
    is_best = progress.best == progress.epoch
    log.info("epoch %d took %.1f seconds, %.0f tokens a second; dev loss %f%s", progress.epoch, line["seconds"],
             line["tokens_per_second"], dev_loss, "; the best so far" if is_best else "")  # fmt: skip
    if not any(tag != "O" for tags in predicted for tag in tags):
        log.warning("%s", training.why_nothing_is_predicted(steps))
    checkpoints.save(progress, is_best)
    training.accelerator.log(flat(line), step=progress.epoch)


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
        scoring.log_scores(scores)
        if accelerator.is_main_process:
            results.write_test(run, test, predicted, scores)
    if accelerator.is_main_process:
        results.write_finished(run, progress.best, progress.epoch)
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


if __name__ == "__main__":
    main()
