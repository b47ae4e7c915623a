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

import checkpoint
import config as settings
import evaluate
from errors import UserError, command

log = logging.getLogger("__main__")


@command
def main(argv: list[str] | None = None) -> None:
    config, flags = settings.load(argv)  # before torch is imported: a wrong key is answered at once
    devices = start_devices(config)
    run = Path(flags.resume) if flags.resume else None
    if devices.is_main_process and not run:
        config = checkpoint.portable(config)
        run = checkpoint.new_run(config.output, config.run)
    run = agreed(run)
    with checkpoint.opened(run, devices.is_main_process):
        log.info("run %s", run)
        if flags.resume:
            checkpoint.check_same(config, run)
        with devices.main_process_first():
            train_on, dev, test = read_data(config)
        train(config, run, devices, train_on, dev)
        finish(config, run, devices, test, flags.push_to_hub)


def train(config, run: Path, devices, corpus, dev: list) -> None:
    """Everything from the encoder to the last epoch. Leaves the best epoch in run/model."""
    import torch

    import fast
    import loader
    import model as models
    from tagger import Tagger

    # What is trained
    device, first, labels = devices.device, devices.is_main_process, loader.label_list(corpus.sentences)
    dtype, reason = fast.choose(config.precision, device)
    log.info("device %s, %d process(es), %d thread(s)", device, devices.num_processes, torch.get_num_threads())
    log.info("precision %s: %s", str(dtype).removeprefix("torch."), reason)
    if first:
        checkpoint.write(run / "config.yaml", settings.dump(config))
        checkpoint.write(run / "environment.json", json.dumps(checkpoint.environment(devices, dtype), indent=1) + "\n")
    if warning := settings.rate_warning(config):
        log.warning("%s", warning)
    torch.manual_seed(config.seed)  # new weights are drawn from it
    model, tokenizer, meta = models.build(config, labels, corpus.unit, fast.attention(device))
    log.info("labels: %s", " ".join(labels))
    log.info("%s", models.trainable_line(model))
    fast.prepare(model, dtype, device)
    optimizer = fast.Optimizer(model, config.learning_rate, config.weight_decay)
    tagger = Tagger(model, tokenizer, meta)

    # What it is trained on: a step takes `size` windows, however many processes and passes share them
    windows = tagger.units.windows([sentence.chars for sentence in corpus.sentences])
    gold = [[labels.index(tag) for tag in sentence.tags] for sentence in corpus.sentences]
    size = config.batch_size * config.accumulation * devices.num_processes
    steps = len(loader.batches(windows, size, seed=config.seed))
    log.info("%d windows of at most %d tokens, %d in a step, %d steps an epoch; %s at learning rate %g",
             len(windows), config.max_length, size, steps, config.tuning, config.learning_rate)  # fmt: skip

    # Where it stands
    keeper = checkpoint.Keeper(run, optimizer, config.checkpoint_minutes,
                               lambda folder: models.save(model, tokenizer, meta, folder), writes=first)  # fmt: skip
    what = checkpoint.digest(corpus.sentences, labels, steps)
    at = keeper.resumed(what) or checkpoint.Progress(micro_batch=config.batch_size, of=what)
    if config.trackers:
        devices.init_trackers("ner", {key: str(value) for key, value in config.model_dump().items()})

    with progress_bar(steps, first) as bar, checkpoint.Stop() as stop:
        try:
            while at.epoch < config.epochs:
                log.info("epoch %d begin", at.epoch + 1)
                order = loader.batches(windows, size, seed=checkpoint.seed_of(config.seed, at.epoch))
                bar.reset()
                bar.update(at.step)
                model.train()
                stop.patient = True
                while at.step < steps:
                    begun, batch = time.perf_counter(), order[at.step]
                    rate = rate_at(at.epoch * steps + at.step, config.epochs * steps, config)
                    torch.manual_seed(checkpoint.seed_of(config.seed, at.epoch, at.step, devices.process_index))
                    loss, asked = add_gradients(model, optimizer, batch, gold, tokenizer, devices, at, stop.asked)
                    norm = optimizer.step(rate, config.max_grad_norm) if math.isfinite(loss) else math.nan
                    if not math.isfinite(loss) or (not math.isfinite(norm) and optimizer.scale == 1):
                        raise UserError(not_finite(config, at, loss, norm, rate, [corpus.sentences[w.sentence] for w in batch]))
                    if at.step in (0, (steps - 1) // 2, steps - 1):
                        log.info("batch loss %f", loss)
                    at.add(batch, loss, time.perf_counter() - begun)
                    bar.update()
                    if asked:
                        raise KeyboardInterrupt
                    if keeper.due():
                        keeper.keep(at)
                stop.patient = False

                log.info("epoch average loss: %f", at.loss / at.units)
                log.info("开始测试第%d轮模型效果：", at.epoch + 1)
                scores, predicted, dev_loss = score_sentences(tagger, dev, devices)
                log_scores(scores)
                stop.patient = True
                line, is_best = at.end_epoch(scores, dev_loss, rate)
                log.info("epoch %d: dev loss %f, %.0f tokens a second, %.1f seconds%s", at.epoch, dev_loss,
                         line["tokens_per_second"], line["seconds"], ", the best so far" if is_best else "")  # fmt: skip
                if not any(tag != "O" for tags in predicted for tag in tags):
                    log.warning("%s", nothing_found(config, at.epoch * steps))
                keeper.keep(at, is_best)
                devices.log(checkpoint.flat(line), step=at.epoch)
                if stop.asked and devices.num_processes == 1:  # several processes agree at their next step
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if stop.twice:
                raise
            stop.patient = True
            keeper.keep(at)
            log.info("stopped in epoch %d after %d of %d steps; to go on: python main.py --resume %s", at.epoch + 1, at.step, steps, run)
            sys.exit(128 + stop.asked)
    keeper.finish(at)


def start_devices(config):
    """The Accelerator: devices, processes and trackers. Raises UserError for a tracker that is not there."""
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import LoggerType, get_available_trackers

    for name in config.trackers:
        if name not in LoggerType.list():
            raise UserError(f"trackers: {name!r} is none of {', '.join(sorted(set(LoggerType.list()) - {'all'}))}")
        if name != "all" and name not in map(str, get_available_trackers()):
            raise UserError(f"trackers: {name} is not installed; `pip install {name}`, or leave it out")
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no",
                       log_with=config.trackers or None, project_dir=config.output)  # fmt: skip


def agreed(value):
    """The first process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def read_data(config) -> tuple:
    """The corpus to train on, and dev and test sentences; logs what is in the files and what is odd about them."""
    import loader

    if any(path and path.startswith("data/msra/") and not settings.resolve_path(path) for path in (config.train, config.dev, config.test)):
        from data import msra

        msra.ensure()
    corpora = {}
    for split in ("train", "dev", "test"):
        if path := getattr(config, split):
            corpora[split] = loader.read(path, split=split)
            log.info("%s: %s", split, corpora[split].describe())
            for warning in corpora[split].warnings():
                log.warning("%s", warning)
    corpus = corpora.pop("train")
    kept = loader.sample(corpus.sentences, config.max_train_sentences, config.seed)
    if len(kept) < len(corpus.sentences):
        log.info("train: a sample of %d of these sentences, by the seed", len(kept))
    held_out = []
    if "dev" not in corpora:
        held_out = loader.sample(kept, max(1, len(kept) // 20), config.seed)
        ours = set(map(id, held_out))
        kept = [sentence for sentence in kept if id(sentence) not in ours] or kept
        log.info("dev: none given, so %d sentences (5%%) of train are held out by the seed", len(held_out))
    corpus = dataclasses.replace(corpus, sentences=kept)
    for other in corpora.values():
        for warning in loader.compare(corpus, other):
            log.warning("%s", warning)
    return corpus, corpora["dev"].sentences if "dev" in corpora else held_out, corpora["test"].sentences if "test" in corpora else None


def rate_at(step: int, total: int, config) -> float:
    """The learning rate of a step (from 0): a straight line up, then one down that would reach 0 at `total`."""
    warmup = round(total * config.warmup_ratio)
    share = (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)
    return config.learning_rate * min(1.0, share)


def add_gradients(model, optimizer, batch, gold, tokenizer, devices, at, asked: int) -> tuple[float, int]:
    """Adds the gradient of the mean loss over all labelled units of a batch, which the processes share out.

    Each process works through its share at.micro_batch windows at a time, fewer where memory does not suffice; since
    sums are divided by the units of the whole batch, the result is the same for any way to share. Gradients are summed
    over the processes here, in one message, rather than by DistributedDataParallel, which wants equal shares.
    Returns the mean loss, and whether any process was `asked` to stop.
    """
    import torch

    import loader
    import model as models

    share = batch[devices.process_index::devices.num_processes]
    units = checkpoint.units(batch)
    while True:
        total, shape = torch.zeros((), device=devices.device), None
        try:
            for start in range(0, len(share), at.micro_batch):
                inputs = loader.collate(share[start:start + at.micro_batch], tokenizer.pad_token_id or 0, gold)
                inputs = {name: tensor.to(devices.device) for name, tensor in inputs.items()}
                labels = inputs.pop("labels")
                shape = tuple(labels.shape)
                loss, _ = models.loss_sum(model(**inputs).logits, labels)
                optimizer.backward(loss / units)
                total += loss.detach()
            break
        except torch.OutOfMemoryError:
            if at.micro_batch == 1:
                raise UserError(f"out of memory on one window of {shape[1]} tokens; lower max_length, or take a smaller encoder") from None
        half = at.micro_batch // 2
        log.warning("out of memory on a batch of %d windows x %d tokens: from here on %d windows at a time and %d times the "
                    "accumulation, which computes the same", *shape, half, -(-len(share) // half))  # fmt: skip
        at.micro_batch = half
        for weight in optimizer.weights.values():
            weight.grad = None
        if devices.device.type == "cuda":
            torch.cuda.empty_cache()
    if devices.num_processes == 1:
        return total.item() / units, asked
    weights = list(optimizer.weights.values())
    parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights] + [total, torch.tensor(float(asked > 0), device=total.device)]
    summed = devices.reduce(torch.cat([part.float().flatten() for part in parts]), "sum")
    *grads, total, asked_by = summed.split([part.numel() for part in parts])
    for weight, grad in zip(weights, grads):
        weight.grad = grad.view_as(weight).to(weight.dtype)
    return total.item() / units, int(asked_by.item())


def not_finite(config, at, loss: float, norm: float, rate: float, sentences: list) -> str:
    """What to say of a step whose loss or gradient is not finite: all that is needed to look into it."""
    lines = ", ".join(map(str, sorted({sentence.line for sentence in sentences})))
    return (f"{config.train}: epoch {at.epoch + 1}, step {at.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g} at "
            f"learning rate {rate:g}, in a batch of the sentences at lines {lines}; the last checkpoint is whole; "
            "try a lower learning_rate or precision fp32")  # fmt: skip


def nothing_found(config, steps: int) -> str:
    """What to say of an epoch after which no entity was predicted on dev."""
    likely = settings.rate_warning(config) or f"{steps} steps at learning rate {config.learning_rate:g} were too few or too small"
    return f"no entity at all was predicted on dev, every unit is tagged O; the likely cause: {likely}"


def score_sentences(tagger, sentences: list, devices) -> tuple[dict, list[list[str]], float]:
    """Scores of sentences, the tags predicted for each, and the mean loss per unit. Every process tags a share."""
    from accelerate.utils import gather_object

    number, found = {label: index for index, label in enumerate(tagger.labels)}, []
    for index in range(devices.process_index, len(sentences), devices.num_processes):
        found.append(index)
    log_probs = tagger.log_probs([sentences[index].chars for index in found])
    tagged = tagger.decoded(log_probs)
    losses = [-math.fsum(float(row[number[tag]]) for row, tag in zip(rows, sentences[index].tags) if tag in number)
              for index, rows in zip(found, log_probs)]  # fmt: skip
    gathered = gather_object([(index, tags, loss) for index, (tags, _), loss in zip(found, tagged, losses)])
    _, predicted, losses = zip(*sorted(gathered))
    gold = [sentence.tags for sentence in sentences]
    return evaluate.score(gold, list(predicted)), list(predicted), math.fsum(losses) / max(1, sum(map(len, gold)))


def log_scores(scores: dict) -> None:
    for name, row in scores["types"].items():
        log.info("%s类实体，准确率：%f, 召回率: %f, F1: %f", name, row["precision"], row["recall"], row["f1"])
    log.info("Macro-F1: %f", scores["macro"]["f1"])
    log.info("Micro-F1 %f", scores["micro"]["f1"])
    log.info("-" * 20)


@contextlib.contextmanager
def progress_bar(steps: int, shown: bool):
    """A tqdm bar over the steps of an epoch; there is none where the output is no terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with tqdm(total=steps, disable=None if shown else True, leave=False, unit="step") as bar:
        with contextlib.nullcontext() if bar.disable else logging_redirect_tqdm([log]):
            yield bar


def finish(config, run: Path, devices, test: list | None, hub: str | None) -> None:
    """Scores the best epoch on test, once, as it was saved; writes what evaluate.py and report.py read."""
    from tagger import Tagger

    devices.wait_for_everyone()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    best = max(history, key=lambda line: line["dev"]["micro"]["f1"])["epoch"]
    scores = None
    if test is not None:
        log.info("开始测试最佳模型（第%d轮）在测试集上的效果：", best)
        scores, predicted, _ = score_sentences(Tagger.of(run, devices.device, config.precision), test, devices)
        log_scores(scores)
    if not devices.is_main_process:
        return
    if scores:
        rows = ({"chars": s.chars, "gold": s.tags, "predicted": tags} for s, tags in zip(test, predicted))
        checkpoint.write(run / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        checkpoint.write(run / "test.json", json.dumps(scores, ensure_ascii=False, indent=1) + "\n")
    checkpoint.write(run / "finished.json", json.dumps({"best_epoch": best, "epochs": len(history)}) + "\n")
    try:
        import report

        log.info("report %s", report.write(run))
    except Exception as error:  # the run is whole without its page
        log.warning("no report was written: %s: %s", type(error).__name__, error)
    devices.end_training()
    log.info("finished: %s", run)


if __name__ == "__main__":
    main()
