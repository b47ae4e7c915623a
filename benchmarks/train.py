"""main.py's training against transformers' Trainer + peft, on the same encoder, sentences and rates.

    python benchmarks/train.py [--data FOLDER] [--sentences 1500] [--epochs 1] [--tuning lora full]
        [--seeds 1] [--json FILE]

Each side trains in a process of its own, in turn, so that each has the machine and its peak memory to itself.
There are two peers, both of benchmarks/train_peer.py. `trainer` is written as the PEFT token-classification guide has
it: DataCollatorForTokenClassification, the Trainer's defaults for everything not named, so float32 on a CPU.
`trainer_tuned` is what a practitioner would switch on: length-grouped batches, and bf16=True where the device
multiplies it natively (emulated, it is several times slower than float32). Encoder, sentences, epochs, batch size,
learning rate, weight decay and the adapter's rank and alpha are the same on all sides; DIFFERENCES below is what is
not, printed and written too. Against `trainer` the figures are `ratio`, `peer_f1` and so on; against `trainer_tuned`
they begin with `tuned_`.

Speed counts real tokens (no padding) over the training time alone. `peak_share` is the share of the matrix peak that
the whole loop reaches, `step_peak_share` that of single steps, which benchmarks/train_steps.py times.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from train_setup import RATES, ROOT, Setup, encoder_folder, measured
from train_steps import matrix_peak

from ner.precision import choose_dtype

PEERS = {"trainer": "peer_", "trainer_tuned": "tuned_"}  # what their figures begin with
SHOWN = ("tokens_per_second", "seconds_per_epoch", "f1", "peak_mb")  # of every side
DIFFERENCES = {
    "precision": "main.py: auto, bfloat16 weights with float32 master copies where the device multiplies it natively; "
    "trainer: float32 on a CPU, bf16=True on a GPU; trainer_tuned: bf16=True (autocast over float32 weights) where the "
    "device multiplies it natively",
    "batches": "main.py: windows of like length together; trainer: any together; trainer_tuned: length-grouped",
    "head": "main.py: learns ten times as fast (head_factor 10); the Trainer: at the common learning rate",
    "weights scored": "main.py: a running mean of the weights (averaging); the Trainer: the last ones",
    "schedule": "main.py: a tenth of the steps warm up; the Trainer: no warm-up",
    "decoding": "main.py: Viterbi over well-formed IOB2; the Trainer: argmax",
    "long sentences": "main.py: several windows; the Trainer: cut off at 512 tokens",
}

Figures = dict[str, Any]


def ours(setup: Setup, folder: Path) -> Figures:
    """Train with main.py; return its figures, and the numbers of trained and of all weights."""
    arguments = [*setup.of_main(), "--output", str(folder), "--run", setup.tuning]
    memory = measured([sys.executable, str(ROOT / "main.py"), *arguments])
    run = folder / setup.tuning
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    log = (run / "train.log").read_text("utf-8").splitlines()
    counts = next(line for line in log if "trainable params:" in line).split("||")[:2]
    trained, total = (int(part.split(":")[-1].replace(",", "")) for part in counts)
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return {
        "tokens_per_second": sum(epoch["tokens_per_second"] * epoch["seconds"] for epoch in epochs) / seconds,
        "seconds_per_epoch": seconds / len(epochs),
        "f1": json.loads((run / "test.json").read_text("utf-8"))["micro"]["f1"],
        "peak_mb": memory,
        "trained": trained,
        "total": total,
    }


def side(script: str, setup: Setup, folder: Path, *more: str) -> Figures:
    """Run one of the scripts beside this one in a process of its own; return its figures and its peak memory."""
    file = folder / "figures.json"
    memory = measured([sys.executable, str(Path(__file__).with_name(script)), *setup.of_side(file), *more])
    return json.loads(file.read_text("utf-8")) | {"peak_mb": memory}


def write_sample(source: Path, sentences: int, seed: int, folder: Path) -> None:
    """Write at most so many sentences of train, and a third of that of dev and test, to a folder."""
    from data import msra
    from ner import formats
    from ner.corpus import sample

    if source == ROOT / "data/msra":
        msra.ensure(say=print)
    for part, most in {"train": sentences, "dev": sentences // 3, "test": sentences // 3}.items():
        msra.write(folder / part, sample(formats.read(str(source / part)).sentences, most, seed))


def encoder_weights(pretrained: str) -> int:
    """Return the number of weights that multiply each token: all matrices of the encoder but its embeddings."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(encoder_folder(pretrained), dtype=torch.float32)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return sum(module.weight.numel() for name, module in linear if "pooler" not in name)


def compare(tuning: str, options: argparse.Namespace, device: torch.device) -> Figures:
    """Train all sides with each seed; return the figures of a tuning as summary() has them."""
    dtype, _ = choose_dtype("auto", device)
    peak = 0.0
    mine: list[Figures] = []
    others: dict[str, list[Figures]] = {name: [] for name in PEERS}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_sample(options.data, options.sentences, seed, folder)
            setup = Setup(tuning, folder, options.pretrained, options.epochs, seed)
            peak = max(peak, matrix_peak(dtype, device))
            figures = ours(setup, folder)
            peak = max(peak, matrix_peak(dtype, device))
            steps = side("train_steps.py", setup, folder)
            figures |= {"step_tokens_per_second": steps["tokens_per_second"], "step_peak": steps["peak"]}
            mine.append(figures)
            others["trainer"].append(side("train_peer.py", setup, folder))
            others["trainer_tuned"].append(side("train_peer.py", setup, folder, "--tuned"))
        peers = " and ".join(f"{runs[-1]['f1']:.4f} ({name})" for name, runs in others.items())
        print(f"{tuning}, seed {seed}: F1 {figures['f1']:.4f} against {peers}", flush=True)
    return summary(tuning, mine, others, encoder_weights(options.pretrained), peak)


def summary(tuning: str, mine: list[Figures], others: dict[str, list[Figures]], weights: int, peak: float) -> Figures:
    """Return the figures of one tuning: means over the seeds, each seed's, and the ratios.

    Operations a token: 4 a frozen and 6 a trained weight (forward 2, input gradient 2, weight gradient 2).
    """
    average = {key: mean(run[key] for run in mine) for key in mine[0]}
    operations = 4 * weights + 6 * average["trained"] if tuning == "lora" else 6 * weights
    row = {key: average[key] for key in SHOWN}
    row |= {
        "peak_share": average["tokens_per_second"] * operations / peak,
        "matrix_peak_gflops": peak / 1e9,
        "step_peak_share": average["step_tokens_per_second"] * operations / average["step_peak"],
    }
    for name, prefix in PEERS.items():
        row |= {prefix + key: mean(run[key] for run in others[name]) for key in SHOWN}
        ratio = "ratio" if prefix == "peer_" else prefix + "ratio"
        row[ratio] = average["tokens_per_second"] / row[f"{prefix}tokens_per_second"]
    return row | {"seeds": {"main.py": mine, **others}, "differences": DIFFERENCES}


def table(result: dict[str, Figures]) -> str:
    """Return the figures as text: a line a figure, a column a tuning."""
    first = next(iter(result.values()), {})
    lines = [f"{'':24}" + "".join(f"{tuning:>12}" for tuning in result)]
    for key in [key for key, value in first.items() if not isinstance(value, dict)]:
        values = [row[key] for row in result.values()]
        lines.append(f"{key:24}" + "".join(f"{value:12.3f}" if value < 100 else f"{value:12.0f}" for value in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/msra", help="folder with train, dev and test")
    parser.add_argument("--pretrained", default="data/encoder")
    parser.add_argument("--sentences", type=int, default=1500, help="of train, at most; of dev and test a third")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tuning", nargs="*", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="the figures are means over these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.data = options.data.resolve()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = choose_dtype("auto", device)
    result = {tuning: compare(tuning, options, device) for tuning in options.tuning}
    print(
        f"\n{device}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')} ({reason}), "
        f"{options.epochs} epochs of {options.data}, at most {options.sentences} sentences, seeds {options.seeds}"
    )
    print(table(result))
    print("\nNot the same on all sides:", *(f"  {what}: {text}" for what, text in DIFFERENCES.items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
