"""Training steps at the size of bert-base (12 × 768, random weights) and of the embedded encoder, against the Trainer.

    python benchmarks/base_size.py [--sizes base embedded] [--tuning lora full] [--steps 6] [--json FILE]

Both sides train on the same sentences of 20 to 70 random characters, 16 in a step, each in a process of its own, which
gives the peak memory. Two steps warm up; the figures are of those that follow. The suite computes as main.py does by
default, with the softmax head; the Trainer, with peft for LoRA, by its defaults, in float32 on a CPU. `ratio` is that
of real tokens a second. What else differs is written in benchmarks/train.py.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_setup import BATCH, ROOT, main_arguments, measured

EMBEDDED = ROOT / "data" / "encoder"
WARM_UP = 2
RATES = {"lora": 1e-3, "full": 2e-5}
LABELS = ["O", "B-PER", "B-LOC"]
Figures = dict[str, float]


def write_sentences(file: Path, count: int) -> None:
    """Write labelled sentences of 20 to 70 random ideographs."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            for _ in range(draw.randint(20, 70)):
                stream.write(f"{chr(draw.randint(0x4E00, 0x8FFF))} {draw.choice(LABELS)}\n")
            stream.write("\n")


def write_base_encoder(folder: Path) -> None:
    """Write a BERT of 12 layers of 768 with random weights and the embedded encoder's vocabulary."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    BertModel(BertConfig(vocab_size=len(tokenizer))).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main_steps(options: argparse.Namespace) -> Figures:
    """Return tokens and seconds of main.py's steps."""
    from train_steps import take_step

    from ner import config, distributed, formats
    from ner.progress import tokens_of
    from ner.training import build

    tuning = options.tuning[0]
    keys = {"pretrained": options.encoder, "train": options.sentences, "dev": "null", "test": "null", "epochs": 1}
    settings, _ = config.load(main_arguments(tuning, RATES[tuning], **keys))
    training = build(settings, formats.read(str(settings.train)), distributed.start(settings))
    tokens = seconds = 0.0
    training.model.train()
    for step, batch in enumerate(training.batches_of(0)):
        began = time.perf_counter()
        take_step(training, batch, step)
        if step >= WARM_UP:
            tokens, seconds = tokens + tokens_of(batch), seconds + time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds}


def trainer_steps(options: argparse.Namespace) -> Figures:
    """Return tokens and seconds of the Trainer's steps."""
    from train_peer import build_model, encode
    from transformers import AutoTokenizer, DataCollatorForTokenClassification

    from ner import formats

    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    label2id = {label: index for index, label in enumerate(LABELS)}
    items = [encode(tokenizer, sentence, label2id) for sentence in formats.read(str(options.sentences)).sentences]
    model = build_model(options.tuning[0], options.encoder, len(LABELS))
    pad, tokens = DataCollatorForTokenClassification(tokenizer), list[int]()

    def collate(features: list[dict]) -> dict:
        batch = pad(features)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    times = train_by_trainer(model, items, collate, RATES[options.tuning[0]])
    return {"tokens": sum(tokens[WARM_UP:]), "seconds": sum(times[WARM_UP:])}


def train_by_trainer(
    model: Any, items: list[dict[str, list[int]]], collate: Callable[[list[dict]], dict], learning_rate: float
) -> list[float]:
    """Train for an epoch with the Trainer's defaults, save nothing; return the seconds of each step."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times = list[float]()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            times[-1] += time.perf_counter()

    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not has_gpu,
            bf16=has_gpu,
        )
        Trainer(model=model, args=arguments, train_dataset=items, data_collator=collate, callbacks=[Clock()]).train()
    return times


def in_a_process(side: str, encoder: Path, tuning: str, sentences: Path, steps: int) -> Figures:
    """Run this file for one side in a process of its own; return its speed, seconds a step and peak memory."""
    file = sentences.with_name("figures.json")
    command = [sys.executable, __file__, "--side", side, "--encoder", str(encoder), "--tuning", tuning]
    command += ["--sentences", str(sentences), "--json", str(file)]
    memory = measured(command)
    figures = json.loads(file.read_text("utf-8"))
    return {
        "tokens_per_second": figures["tokens"] / figures["seconds"],
        "seconds_per_step": figures["seconds"] / steps,
        "peak_mb": memory,
    }


def compare(encoder: Path, tuning: str, sentences: Path, steps: int) -> Figures:
    """Return the figures of main.py, the Trainer's with `peer_` before their names, and their ratio."""
    ours, peer = (in_a_process(side, encoder, tuning, sentences, steps) for side in ("main", "trainer"))
    row = ours | {f"peer_{key}": value for key, value in peer.items()}
    return row | {"ratio": ours["tokens_per_second"] / peer["tokens_per_second"]}


def main() -> None:
    """Measure, print a line a size and tuning, and write the figures."""
    options = arguments()
    if options.side:
        figures = main_steps(options) if options.side == "main" else trainer_steps(options)
        options.json.write_text(json.dumps(figures), encoding="utf-8")
        return
    result: dict[str, dict[str, Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sentences = Path(folder) / "train"
        write_sentences(sentences, BATCH * (WARM_UP + options.steps))
        for size in options.sizes:
            encoder = Path(folder) / "base" if size == "base" else EMBEDDED
            if size == "base":
                write_base_encoder(encoder)
            result[size] = {}
            for tuning in options.tuning:
                row = result[size][tuning] = compare(encoder, tuning, sentences, options.steps)
                speed, memory = (
                    f"{row[key]:.2f} / {row[f'peer_{key}']:.2f}" for key in ("seconds_per_step", "peak_mb")
                )
                print(f"{size}, {tuning}: {speed} seconds a step, {memory} MB, ratio {row['ratio']:.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["base", "embedded"], default=["base", "embedded"])
    parser.add_argument("--tuning", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=6, help="of each side that are counted (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--side", choices=["main", "trainer"], help=argparse.SUPPRESS)
    for part in ("encoder", "sentences"):
        parser.add_argument(f"--{part}", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
