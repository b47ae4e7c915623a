"""The suite's training against transformers' Trainer + peft, on the same encoder, data and settings.

    python benchmarks/train.py [--data FOLDER] [--sentences 1500] [--epochs 1] [--tuning lora full] [--seeds 1] [--json FILE]

Each side trains in a process of its own, in turn, so that each has the machine and its peak memory to itself.
The peer is written as the PEFT token-classification guide has it: DataCollatorForTokenClassification, the Trainer's
defaults for everything not named. Speed counts real tokens (no padding) over the training time alone. `peak_share` is
the share of the matrix peak that the whole loop reaches, `step_peak_share` that of single steps: ten batches spread over
an epoch, each trained on ten times, of which the fastest counts, as it does for the peak.
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


def peer(options):
    """Trains and scores with the Trainer; writes the figures to options.json."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, Trainer, TrainingArguments,
        set_seed)

    from ner import scores as scoring
    from ner import formats
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
        model = get_peft_model(model, LoraConfig(
            task_type=TaskType.TOKEN_CLS, r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0,
            target_modules="all-linear", exclude_modules=["classifier"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model, train_dataset=train_set, eval_dataset=test_set, processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            args=TrainingArguments(
                output_dir=folder, learning_rate=RATES[options.peer], num_train_epochs=options.epochs,
                per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, weight_decay=0.01,
                save_strategy="no", report_to="none", seed=options.seeds[0], disable_tqdm=True,
                bf16=torch.cuda.is_available()))
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
    options.json.write_text(json.dumps({"tokens_per_second": tokens / seconds, "seconds_per_epoch":
                                        seconds / options.epochs, "f1": f1}))


def arguments(tuning, seed, options):
    """main.py's, for the settings of the comparison."""
    return ["--tuning", tuning, "--pretrained", options.pretrained, "--epochs", str(options.epochs),
            "--max_train_sentences", "null", "--batch_size", str(BATCH), "--learning_rate", str(RATES[tuning]),
            "--seed", str(seed), "--lora.r", str(LORA["r"]), "--lora.alpha", str(LORA["alpha"]), "--lora.dropout", "0",
            "--train", str(options.data / "train"), "--dev", str(options.data / "dev"),
            "--test", str(options.data / "test")]


def steps(options):
    """Times single steps of main.py's loop; writes tokens a second and the peak measured meanwhile to options.json."""
    import torch

    from ner import checkpoint
    from ner import kernels as fast
    from ner.precision import choose_dtype
    from ner.optimizer import Optimizer
    from ner import batches, formats
    from ner.corpus import label_list
    from ner import model as models
    from ner import distributed as parallel
    from ner.tagging import Tagger
    settings, _ = config.load(arguments(options.steps, options.seeds[0], options))
    devices, corpus = parallel.start(settings), formats.read(settings.train)
    device, labels = devices.device, label_list(corpus.sentences)
    dtype, _ = choose_dtype(settings.precision, device)
    torch.manual_seed(settings.seed)
    model, tokenizer, meta = models.build(settings, labels, corpus.unit, fast.attention_implementation(device))
    fast.prepare(model, dtype, device)
    optimizer = Optimizer(model, settings.learning_rate, settings.weight_decay, settings.averaging,
                               models.head_weights(model), settings.head_factor)
    number = {label: index for index, label in enumerate(labels)}
    gold = [[number[tag] for tag in sentence.tags] for sentence in corpus.sentences]
    windows = Tagger(model, tokenizer, meta).windower.windows([sentence.chars for sentence in corpus.sentences])
    order = batches.shuffled(windows, BATCH, seed=settings.seed)
    at, done, tokens, seconds, peak = checkpoint.Progress(micro_batch=BATCH), 0, 0, 0.0, 0.0
    model.train()
    for batch in order[::max(1, len(order) // 10)][:10]:
        peak, times = max(peak, matrix_peak(dtype, device.type)), []
        for _ in range(10):
            began = time.perf_counter()
            loss, _ = parallel.add_gradients(model, optimizer, batch, gold, tokenizer.pad_token_id, devices, at, False)
            optimizer.step(settings.learning_rate, settings.max_grad_norm)
            parallel.after_step(model, optimizer, done := done + 1, 100)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        tokens, seconds = tokens + sum(len(window.ids) for window in batch), seconds + min(times)
    options.json.write_text(json.dumps({"tokens_per_second": tokens / seconds, "peak": peak}))


def ours(tuning, seed, options, folder):
    """Trains with main.py; returns the same figures and the trained share of the weights."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments(tuning, seed, options), "--output", folder,
               "--run", tuning]
    memory = measure(command)
    run = Path(folder) / tuning
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    share = next(line for line in (run / "train.log").read_text().splitlines() if "trainable params:" in line)
    trained, total = (int(part.split(":")[-1].replace(",", "")) for part in share.split("||")[:2])
    return {"tokens_per_second": sum(e["tokens_per_second"] * e["seconds"] for e in epochs)
            / sum(e["seconds"] for e in epochs),
            "seconds_per_epoch": sum(e["seconds"] for e in epochs) / len(epochs),
            "f1": json.loads((run / "test.json").read_text())["micro"]["f1"], "peak_mb": memory,
            "trained": trained, "total": total}


def again(what, tuning, seed, options, folder):
    """Runs this file's `peer` or `steps` in a process of its own; returns what it wrote and its peak memory in MB."""
    file = Path(folder) / "found.json"
    memory = measure([sys.executable, __file__, f"--{what}", tuning, "--data", str(options.data), "--pretrained",
                      options.pretrained, "--epochs", str(options.epochs), "--seeds", str(seed), "--json", str(file)])
    return json.loads(file.read_text()), memory


def sampled(source, sentences, seed, folder):
    """Writes at most so many sentences of train, and a third of that of dev and test, to a folder; returns it."""
    from ner import formats
    from ner.corpus import sample
    from data import msra
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
    return 2 * 2048 ** 3 / best


def encoder_weights(pretrained):
    """Number of weights that multiply each token: all matrices of the encoder but its embeddings."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(config.resolve_path(pretrained), dtype=torch.float32)
    return sum(m.weight.numel() for name, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and "pooler" not in name)


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
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.peer:
        return peer(options)
    if options.steps:
        return steps(options)

    import torch

    from ner import kernels as fast
    from ner.precision import choose_dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, reason = choose_dtype("auto", device)
    weights = encoder_weights(options.pretrained)
    result, source = {}, options.data
    for tuning in options.tuning:
        peak, mine, other = 0, [], []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                options.data = sampled(source, options.sentences, seed, Path(folder))
                peak = max(peak, matrix_peak(dtype, device))
                mine.append(ours(tuning, seed, options, folder))
                peak = max(peak, matrix_peak(dtype, device))
                single, _ = again("steps", tuning, seed, options, folder)
                mine[-1] |= {"step_tokens_per_second": single["tokens_per_second"], "step_peak": single["peak"]}
                found, memory = again("peer", tuning, seed, options, folder)
                other.append(found | {"peak_mb": memory})
            print(f"{tuning}, seed {seed}: F1 {mine[-1]['f1']:.4f} against {other[-1]['f1']:.4f}", flush=True)
        mine, other = ({key: mean(run[key] for run in runs) for key in runs[0]} for runs in (mine, other))
        # Operations a token: 4 a frozen and 6 a trained weight (forward 2, input gradient 2, weight gradient 2).
        adapter = mine["trained"] if tuning == "lora" else 0
        operations = 4 * weights + 6 * adapter if tuning == "lora" else 6 * weights
        result[tuning] = {
            "ratio": mine["tokens_per_second"] / other["tokens_per_second"],
            "tokens_per_second": mine["tokens_per_second"], "peer_tokens_per_second": other["tokens_per_second"],
            "seconds_per_epoch": mine["seconds_per_epoch"], "peer_seconds_per_epoch": other["seconds_per_epoch"],
            "f1": mine["f1"], "peer_f1": other["f1"],
            "peak_share": mine["tokens_per_second"] * operations / peak, "matrix_peak_gflops": peak / 1e9,
            "step_peak_share": mine["step_tokens_per_second"] * operations / mine["step_peak"],
            "peak_mb": mine["peak_mb"], "peer_peak_mb": other["peak_mb"]}
    print(f"\n{device}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')} ({reason}), "
          f"{options.epochs} epochs of {source}, at most {options.sentences} sentences, seeds {options.seeds}")
    print(f"{'':24}" + "".join(f"{tuning:>12}" for tuning in result))
    for key in next(iter(result.values()), {}):
        print(f"{key:24}" + "".join(f"{row[key]:12.3f}" if row[key] < 100 else f"{row[key]:12.0f}"
                                    for row in result.values()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
