"""Trains a tagger: reads the sentences, tunes the encoder, keeps the best epoch, scores it once on test.

python main.py                                # everything as config.yaml says
python main.py --tuning full --epochs 8       # any key of it, on the command line
python main.py --resume latest                # go on where a run was stopped
accelerate launch main.py                     # the same on several devices
"""

import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path

from ner import checkpoint
from ner import config as settings
from ner import scores as scoring
from ner import files
from ner import files
from ner import files
from ner import files
from ner import run as folder
from ner.errors import UserError, command

log = logging.getLogger("__main__")


@command
def main(argv: list[str] | None = None) -> None:
    config, flags = settings.load(argv)  # before torch is imported: a wrong key is answered at once
    from ner import distributed as parallel

    devices = parallel.start(config)
    run = Path(flags.resume) if flags.resume else None
    if devices.is_main_process and not run:
        config = folder.portable(config)
        run = folder.new_run(config.output, config.run)
    run = parallel.agreed(run)
    with folder.opened(run, writes=devices.is_main_process):
        log.info("run %s", run)
        if flags.resume:
            folder.check_same(config, run)
        corpus, dev, test = read_data(config, devices)
        train(config, run, devices, corpus, dev)
        finish(config, run, devices, test, flags.push_to_hub)


def train(config, run: Path, devices, corpus, dev: list) -> None:
    """From the encoder to the last epoch. Leaves the best epoch in run/model."""
    import torch

    from ner import kernels as fast
    from ner.precision import choose_dtype
    from ner.optimizer import Optimizer
    from ner import batches
    from ner import model as models
    from ner.corpus import label_list
    from ner.distributed import add_gradients, after_step
    from ner.tagging import Tagger

    # What is trained
    device, labels = devices.device, label_list(corpus.sentences)
    dtype, reason = choose_dtype(config.precision, device)
    log.info("device %s, %d process(es), %d thread(s)", device, devices.num_processes, torch.get_num_threads())
    log.info("precision %s: %s", str(dtype).removeprefix("torch."), reason)
    if warning := settings.rate_warning(config):
        log.warning("%s", warning)
    if devices.is_main_process:
        files.write(run / "config.yaml", settings.dump(config))
        files.write(run / "environment.json", json.dumps(folder.environment(devices, dtype), indent=1) + "\n")
    torch.manual_seed(config.seed)  # new weights are drawn from it
    model, tokenizer, meta = models.build(config, labels, corpus.unit, fast.attention_implementation(device))
    log.info("labels: %s", " ".join(labels))
    log.info("%s", models.trainable_line(model))
    fast.prepare(model, dtype, device)
    optimizer = Optimizer(model, config.learning_rate, config.weight_decay, config.averaging,
                               models.head_weights(model), config.head_factor)  # fmt: skip
    tagger = Tagger(model, tokenizer, meta)

    # What it is trained on: a step takes `size` windows, however many processes and passes share them
    number = {label: index for index, label in enumerate(labels)}
    gold = [[number[tag] for tag in sentence.tags] for sentence in corpus.sentences]
    windows = tagger.windower.windows([sentence.chars for sentence in corpus.sentences])
    size = config.batch_size * config.accumulation * devices.num_processes
    steps = math.ceil(len(windows) / size)
    log.info("%d windows of at most %d tokens, %d in a step, %d steps an epoch; %s at learning rate %g",
             len(windows), meta["max_length"], size, steps, config.tuning, config.learning_rate)  # fmt: skip

    # Where it stands
    keeper = checkpoint.Keeper(run, model, optimizer, config.checkpoint_minutes, devices.is_main_process,
                               save_model=lambda place: models.save(model, tokenizer, meta, place))  # fmt: skip
    data = checkpoint.digest(corpus.sentences, labels, steps)
    at = keeper.resumed(data) or checkpoint.Progress(data=data, micro_batch=config.batch_size)
    if config.trackers:
        devices.project_configuration.logging_dir = str(run)
        devices.init_trackers("ner", {key: str(value) for key, value in config.model_dump().items()})

    def rate_at(step: int) -> float:
        """A straight line up, then one down that reaches 0 after the last step; steps count from 0, over all epochs."""
        total, warmup = config.epochs * steps, round(config.epochs * steps * config.warmup_ratio)
        share = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
        return config.learning_rate * share

    with progress_bar(steps, shown=devices.is_main_process) as bar, checkpoint.Stop() as stop:
        try:
            while at.epoch < config.epochs:
                log.info("epoch %d begin", at.epoch + 1)
                order = batches.shuffled(windows, size, seed=checkpoint.seed_of(config.seed, at.epoch))
                bar.reset()
                bar.update(at.step)
                model.train()
                with stop.patiently():
                    while at.step < steps:
                        begun, batch = time.perf_counter(), order[at.step]
                        done = at.epoch * steps + at.step
                        rate = rate_at(done)
                        torch.manual_seed(checkpoint.seed_of(config.seed, done, devices.process_index))
                        loss, asked = add_gradients(model, optimizer, batch, gold, tokenizer.pad_token_id or 0,
                                                    devices, at, bool(stop.asked))  # fmt: skip
                        norm = optimizer.step(rate, config.max_grad_norm) if math.isfinite(loss) else math.nan
                        if not math.isfinite(loss) or (not math.isfinite(norm) and optimizer.scale == 1):
                            raise UserError(not_finite(config, at, loss, norm, rate, corpus, batch))
                        after_step(model, optimizer, done + 1, config.epochs * steps)
                        if at.step in (0, (steps - 1) // 2, steps - 1):
                            log.info("batch loss %f", loss)
                        at.add(batch, loss, time.perf_counter() - begun)
                        bar.update()
                        if asked:
                            raise KeyboardInterrupt
                        if keeper.due():
                            keeper.keep(at)

                log.info("epoch average loss: %f", at.loss / at.units)
                log.info("开始测试第%d轮模型效果：", at.epoch + 1)
                with optimizer.using(optimizer.scored):
                    scores, predicted, dev_loss = scoring.score_sentences(tagger, dev, devices)
                log_scores(scores)
                with stop.patiently():
                    line, is_best = at.end_epoch(scores, dev_loss, rate_at(at.epoch * steps + steps - 1))
                    log.info("epoch %d took %.1f seconds, %.0f tokens a second; dev loss %f%s", at.epoch,
                             line["seconds"], line["tokens_per_second"], dev_loss,
                             "; the best so far" if is_best else "")  # fmt: skip
                    if not any(tag != "O" for tags in predicted for tag in tags):
                        log.warning("%s", nothing_found(config, at.epoch * steps))
                    keeper.keep(at, is_best)
                    devices.log(checkpoint.flat(line), step=at.epoch)
                if stop.asked and devices.num_processes == 1:  # several agree at the next step
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if stop.twice:
                raise
            with stop.patiently():
                keeper.keep(at)
            log.info("stopped in epoch %d after %d of %d steps; go on with: python main.py --resume %s",
                     at.epoch + 1, at.step, steps, run)  # fmt: skip
            sys.exit(128 + (stop.asked or 2))
    keeper.finish(at)


def read_data(config, devices) -> tuple:
    """The corpus to train on, dev and test sentences (None: no test); logs what is in them and what is odd about it."""
    from ner import formats, survey
    from ner.corpus import sample

    paths = {part: path for part in ("train", "dev", "test") if (path := getattr(config, part))}
    if any(path.startswith("data/msra/") and not settings.resolve_path(path) for path in paths.values()):
        with devices.main_process_first():
            from data import msra

            msra.ensure(say=lambda line: log.info("%s", line))
    corpora = {}
    for part, path in paths.items():
        corpora[part] = formats.read(path if path.startswith("hub:") else settings.resolve_path(path) or path, part)
        log.info("%s: %s", part, corpora[part].describe())
    corpus = corpora.pop("train")
    kept = sample(corpus.sentences, config.max_train_sentences, config.seed)
    if len(kept) < len(corpus.sentences):
        log.info("train: %d of these sentences, a sample by the seed", len(kept))
    if "dev" not in corpora:
        held_out = sample(kept, max(1, len(kept) // 20), config.seed)
        theirs = set(map(id, held_out))
        kept = [sentence for sentence in kept if id(sentence) not in theirs] or kept
        log.info("dev: no file, so 5%% of train, %d sentences, are held out by the seed", len(held_out))
        corpora["dev"] = dataclasses.replace(corpus, path="the held-out sentences", sentences=held_out)
    corpus = dataclasses.replace(corpus, sentences=kept)
    for other in (corpus, *corpora.values()):
        for warning in other.warnings() + (survey.compare(corpus, other) if other is not corpus else []):
            log.warning("%s", warning)
    return corpus, corpora["dev"].sentences, corpora["test"].sentences if "test" in corpora else None


def not_finite(config, at, loss: float, norm: float, rate: float, corpus, batch: list) -> str:
    """What to say of a step whose loss or gradient is not finite: all that is needed to look into it."""
    lines = ", ".join(map(str, sorted({corpus.sentences[window.sentence].line for window in batch})))
    return (f"{config.train}: epoch {at.epoch + 1}, step {at.step + 1}: the loss is {loss:g} and the gradient's norm "
            f"{norm:g} at learning rate {rate:g}, in a batch of the sentences at lines {lines}; the last checkpoint is "
            "whole; try a lower learning_rate, or precision fp32")  # fmt: skip


def nothing_found(config, steps: int) -> str:
    """What to say of an epoch after which no entity was predicted on dev."""
    return "no entity at all was predicted on dev, every unit is tagged O; the likely cause: " + (
        settings.rate_warning(config)
        or f"{steps} steps at learning rate {config.learning_rate:g} were too few or too small"
    )


def log_scores(scores: dict) -> None:
    for name, row in scores["types"].items():
        log.info("%s类实体，准确率：%f, 召回率: %f, F1: %f", name, row["precision"], row["recall"], row["f1"])
    log.info("Macro-F1: %f", scores["macro"]["f1"])
    log.info("Micro-F1 %f", scores["micro"]["f1"])
    log.info("-" * 20)


@contextlib.contextmanager
def progress_bar(steps: int, shown: bool):
    """A bar over the steps of an epoch, with log lines above it; none where the output is no terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with tqdm(total=steps, disable=None if shown else True, leave=False, unit="step") as bar:
        with contextlib.nullcontext() if bar.disable else logging_redirect_tqdm():
            yield bar


def finish(config, run: Path, devices, test: list | None, hub: str | None) -> None:
    """Scores the best epoch on test as it was saved, and writes what the other commands read."""
    from ner.tagging import Tagger

    devices.wait_for_everyone()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    best = max(history, key=lambda line: line["dev"]["micro"]["f1"])["epoch"]
    written = {"finished.json": [{"best_epoch": best, "epochs": len(history)}]}
    if test is not None:
        log.info("开始测试第%d轮模型在测试集上的效果：", best)
        scores, predicted, _ = scoring.score_sentences(Tagger.of(run, devices.device, config.precision), test, devices)
        log_scores(scores)
        rows = [{"chars": s.chars, "gold": s.tags, "predicted": tags} for s, tags in zip(test, predicted)]
        written = {"predictions.jsonl": rows, "test.json": [scores]} | written
    if devices.is_main_process:
        for name, rows in written.items():
            files.write(run / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        from ner import card, hub as model_hub
        from ner import report

        for what, write in {"report": report.write, "model card": card.write_card}.items():
            try:
                log.info("%s: %s", what, write(run))
            except Exception as error:  # the run is whole without it
                log.warning("no %s was written: %s: %s", what, type(error).__name__, error)
        if hub:
            log.info("uploaded: %s", model_hub.push(run, hub))
    devices.end_training()
    log.info("finished: %s", run)


if __name__ == "__main__":
    main()
