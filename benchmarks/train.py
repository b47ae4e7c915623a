"""Main.py's training against transformers' Trainer + peft, on the same encoder, sentences and rates.

    python benchmarks/train.py [--data FOLDER] [--sentences 1500] [--epochs 1] [--tuning lora full]
        [--seeds 1] [--json FILE]

Each side trains in a process of its own, in turn, so that each has the machine and its peak memory to itself.
There are two peers. `trainer` is written as the PEFT token-classification guide has it:
DataCollatorForTokenClassification, the Trainer's defaults for everything not named, so float32 on a CPU.
`trainer_tuned` is what a practitioner would switch on: bf16=True and length-grouped batches. Encoder, sentences,
epochs, batch size, learning rate, weight decay and the adapter's rank and alpha are the same on all sides; DIFFERENCES
below is what is not, printed and written too. Against `trainer` the figures are `ratio`, `peer_f1` and so on; against
`trainer_tuned` they begin with `tuned_`.

Speed counts real tokens (no padding) over the training time alone. `peak_share` is the share of the matrix peak that
the whole loop reaches, `step_peak_share` that of single steps: ten batches spread over an epoch, each trained on ten
times, of which the fastest counts, as it does for the peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ner import config  # noqa: E402
from ner.tunings import TUNINGS  # noqa: E402

LORA = {"r": 16, "alpha": 32}
RATES = {tuning: TUNINGS[tuning].learning_rate for tuning in ("lora", "full")}
BATCH = 16
PEERS = {"trainer": "peer_", "trainer_tuned": "tuned_"}  # what their figures begin with
DIFFERENCES = {
    "precision": "main.py: auto, bfloat16 weights with float32 master copies where the device multiplies it natively; "
    "trainer: float32 on a CPU, bf16=True on a GPU; trainer_tuned: bf16=True (autocast over float32 weights)",
    "batches": "main.py: windows of like length together; trainer: any together; trainer_tuned: length-grouped",
    "head": "main.py: learns ten times as fast (head_factor 10); the Trainer: at the common learning rate",
    "weights scored": "main.py: a running mean of the weights (averaging); the Trainer: the last ones",
    "schedule": "main.py: a tenth of the steps warm up; the Trainer: no warm-up",
    "decoding": "main.py: Viterbi over well-formed IOB2; the Trainer: argmax",
    "dropout": "main.py: 0.1; the Trainer: the encoder's own",
    "long sentences": "main.py: several windows; the Trainer: cut off at 512 tokens",
}


def peer(options):
    """Train and score with the Trainer; write the figures to options.json. options.tuned: with its faster settings."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from ner import formats
    from ner import scores as scoring
    from ner.corpus import label_list

    set_seed(options.seeds[0])
    train, test = (formats.read(str(options.data / name)) for name in ("train", "test"))
    labels = label_list(train)
    number = {label: i for i, label in enumerate(labels)}
    encoder = config.resolve_path(options.pretrained)
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def encode(sentence):
        item = tokenizer(sentence.chars, is_split_into_words=True, truncation=True, max_length=512)
        words, previous, item["labels"] = item.word_ids(), None, []
        for word in words:
            item["labels"].append(-100 if word is None or word == previous else number[sentence.tags[word]])
            previous = word
        return dict(item)

    train_set, test_set = ([encode(s) for s in corpus.sentences] for corpus in (train, test))
    model = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=len(labels), dtype=torch.float32)
    if options.peer == "lora":
        model = get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.TOKEN_CLS,
                r=LORA["r"],
                lora_alpha=LORA["alpha"],
                lora_dropout=0.0,
                target_modules="all-linear",
                exclude_modules=["classifier"],
            ),
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataset=train_set,
            eval_dataset=test_set,
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=RATES[options.peer],
                num_train_epochs=options.epochs,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                weight_decay=0.01,
                save_strategy="no",
                report_to="none",
                seed=options.seeds[0],
                disable_tqdm=True,
                bf16=options.tuned or torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                **grouped(options.tuned),
            ),
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        scores = trainer.predict(test_set).predictions
    predicted = []
    for sentence, item, score in zip(test.sentences, test_set, scores, strict=True):
        tags = [labels[i] for i, label in zip(score.argmax(-1), item["labels"], strict=False) if label != -100]
        predicted.append(tags + ["O"] * (len(sentence.tags) - len(tags)))  # truncated, as the guide does
    f1 = scoring.score([s.tags for s in test.sentences], predicted)["micro"]["f1"]
    tokens = options.epochs * sum(len(item["input_ids"]) for item in train_set)
    options.json.write_text(
        json.dumps({"tokens_per_second": tokens / seconds, "seconds_per_epoch": seconds / options.epochs, "f1": f1})
    )


def grouped(tuned):
    """Return the Trainer's setting for batches of like length, which transformers 5 has renamed."""
    from transformers import TrainingArguments

    if not tuned:
        return {}
    old = "group_by_length" in TrainingArguments.__dataclass_fields__
    return {"group_by_length": True} if old else {"train_sampling_strategy": "group_by_length"}


def arguments(tuning, seed, options):
    """main.py's, for the settings of the comparison."""
    return [
        "--tuning",
        tuning,
        "--pretrained",
        options.pretrained,
        "--epochs",
        str(options.epochs),
        "--head",
        "softmax",
        "--max_train_sentences",
        "null",
        "--batch_size",
        str(BATCH),
        "--learning_rate",
        str(RATES[tuning]),
        "--seed",
        str(seed),
        "--lora.r",
        str(LORA["r"]),
        "--lora.alpha",
        str(LORA["alpha"]),
        "--lora.dropout",
        "0",
        "--train",
        str(options.data / "train"),
        "--dev",
        str(options.data / "dev"),
        "--test",
        str(options.data / "test"),
        "--export",
        "none",
    ]


def steps(options):
    """Time single steps of main.py's loop; write tokens a second and the peak measured meanwhile to options.json."""
    import torch

    import main as loop
    from ner import adalora, distributed, formats
    from ner.progress import Progress, tokens_of
    from ner.training import build

    settings, _ = config.load(arguments(options.steps, options.seeds[0], options))
    accelerator = distributed.start(settings)
    training = build(settings, formats.read(str(settings.train)), accelerator)
    model, optimizer, device = training.model, training.optimizer, training.device
    progress, done, tokens, seconds, peak = Progress(micro_batch=BATCH), 0, 0, 0.0, 0.0
    dtype = next(weight.dtype for weight in model.parameters())
    order = training.batches_of(0)
    model.train()
    for batch in order[:: max(1, len(order) // 10)][:10]:
        peak, times = max(peak, matrix_peak(dtype, device.type)), []
        for _ in range(10):
            began = time.perf_counter()
            distributed.sum_over_processes(accelerator, loop.add_gradients(training, batch, progress, done), optimizer)
            gradients = adalora.gradients(model, optimizer.scale.value)
            optimizer.step(settings.learning_rate, settings.max_grad_norm)
            done += 1
            adalora.after_step(model, done, 100, gradients, optimizer)
            optimizer.average(done)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        tokens, seconds = tokens + tokens_of(batch), seconds + min(times)
    options.json.write_text(json.dumps({"tokens_per_second": tokens / seconds, "peak": peak}))


def ours(tuning, seed, options, folder):
    """Trains with main.py; returns the same figures and the trained share of the weights."""
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        *arguments(tuning, seed, options),
        "--output",
        folder,
        "--run",
        tuning,
    ]
    memory = measure(command)
    run = Path(folder) / tuning
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    share = next(line for line in (run / "train.log").read_text().splitlines() if "trainable params:" in line)
    trained, total = (int(part.split(":")[-1].replace(",", "")) for part in share.split("||")[:2])
    return {
        "tokens_per_second": sum(e["tokens_per_second"] * e["seconds"] for e in epochs)
        / sum(e["seconds"] for e in epochs),
        "seconds_per_epoch": sum(e["seconds"] for e in epochs) / len(epochs),
        "f1": json.loads((run / "test.json").read_text())["micro"]["f1"],
        "peak_mb": memory,
        "trained": trained,
        "total": total,
    }


def again(what, tuning, seed, options, folder, *more):
    """Run this file's `peer` or `steps` in a process of its own; return what it wrote and its peak memory in MB."""
    file = Path(folder) / "figures.json"
    memory = measure(
        [
            sys.executable,
            __file__,
            f"--{what}",
            tuning,
            "--data",
            str(options.data),
            "--pretrained",
            options.pretrained,
            "--epochs",
            str(options.epochs),
            "--seeds",
            str(seed),
            "--json",
            str(file),
            *more,
        ]
    )
    return json.loads(file.read_text()), memory


def sampled(source, sentences, seed, folder):
    """Writes at most so many sentences of train, and a third of that of dev and test, to a folder; returns it."""
    from data import msra
    from ner import formats
    from ner.corpus import sample

    if source == ROOT / "data/msra":
        msra.ensure(say=print)
    for part, most in {"train": sentences, "dev": sentences // 3, "test": sentences // 3}.items():
        msra.write(folder / part, sample(formats.read(str(source / part)).sentences, most, seed))
    return folder


def measure(command):
    """Runs a command quietly; returns its peak resident memory in MB. Raises SystemExit with its last words."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\nfailed:\n" + log.read().decode(errors="replace")[-2000:])
    return usage.ru_maxrss / 1024


def matrix_peak(dtype, device):
    """Multiply-add operations a second (two each) of a square matrix product, the best of ten."""
    import torch

    a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * 2048**3 / best


def encoder_weights(pretrained):
    """Number of weights that multiply each token: all matrices of the encoder but its embeddings."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(config.resolve_path(pretrained), dtype=torch.float32)
    return sum(
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name
    )


def summary(tuning, mine, others, weights, peak):
    """Return the figures of one tuning: means over the seeds, each seed's, and the ratios.

    Operations a token: 4 a frozen and 6 a trained weight (forward 2, input gradient 2, weight gradient 2).
    """
    average = {key: mean(run[key] for run in mine) for key in mine[0]}
    operations = 4 * weights + 6 * average["trained"] if tuning == "lora" else 6 * weights
    shown = ("tokens_per_second", "seconds_per_epoch", "f1", "peak_mb")
    row = {key: average[key] for key in shown}
    row |= {
        "peak_share": average["tokens_per_second"] * operations / peak,
        "matrix_peak_gflops": peak / 1e9,
        "step_peak_share": average["step_tokens_per_second"] * operations / average["step_peak"],
    }
    for name, prefix in PEERS.items():
        row |= {prefix + key: mean(run[key] for run in others[name]) for key in shown}
        ratio = "ratio" if prefix == "peer_" else prefix + "ratio"
        row[ratio] = average["tokens_per_second"] / row[f"{prefix}tokens_per_second"]
    return row | {"seeds": {"main.py": mine, **others}, "differences": DIFFERENCES}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/msra", help="folder with train, dev and test")
    parser.add_argument("--pretrained", default="data/encoder")
    parser.add_argument("--sentences", type=int, default=1500, help="of train, at most; of dev and test a third")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tuning", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="the figures are means over these")
    parser.add_argument("--json", type=Path)
    for part in ("peer", "steps"):
        parser.add_argument(f"--{part}", choices=list(RATES), help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.peer:
        return peer(options)
    if options.steps:
        return steps(options)

    import torch

    from ner.precision import choose_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, reason = choose_dtype("auto", device)
    weights = encoder_weights(options.pretrained)
    result, source = {}, options.data
    for tuning in options.tuning:
        peak, mine, others = 0, [], {name: [] for name in PEERS}
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                options.data = sampled(source, options.sentences, seed, Path(folder))
                peak = max(peak, matrix_peak(dtype, device))
                mine.append(ours(tuning, seed, options, folder))
                peak = max(peak, matrix_peak(dtype, device))
                single, _ = again("steps", tuning, seed, options, folder)
                mine[-1] |= {"step_tokens_per_second": single["tokens_per_second"], "step_peak": single["peak"]}
                for name, runs in others.items():
                    figures, memory = again(
                        "peer", tuning, seed, options, folder, *(["--tuned"] if name == "trainer_tuned" else [])
                    )
                    runs.append(figures | {"peak_mb": memory})
            print(
                f"{tuning}, seed {seed}: F1 {mine[-1]['f1']:.4f} against "
                + " and ".join(f"{runs[-1]['f1']:.4f} ({name})" for name, runs in others.items()),
                flush=True,
            )
        result[tuning] = summary(tuning, mine, others, weights, peak)
    print(
        f"\n{device}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')} ({reason}), "
        f"{options.epochs} epochs of {source}, at most {options.sentences} sentences, seeds {options.seeds}"
    )
    print(f"{'':24}" + "".join(f"{tuning:>12}" for tuning in result))
    figures = [key for key, value in next(iter(result.values()), {}).items() if not isinstance(value, dict)]
    for key in figures:
        print(
            f"{key:24}"
            + "".join(f"{row[key]:12.3f}" if row[key] < 100 else f"{row[key]:12.0f}" for row in result.values())
        )
    print("\nNot the same on all sides:", *(f"  {what}: {text}" for what, text in DIFFERENCES.items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
