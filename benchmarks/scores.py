"""Trains runs of main.py over seeds, and prints mean and standard deviation of their test scores as a table.

    python benchmarks/scores.py --data ner_data --tuning lora full --seeds 1 2 3 -- --epochs 8
    python benchmarks/scores.py --data ner_data --seeds 1 2 3 4 5 -- --epochs 8 --head softmax

What stands after `--` goes to main.py as it is. Runs land under --output, and one that has finished with the same
arguments is not trained again.

Two counts: `strict` is test.json's. `first49` leaves out entities of a single character and everything after the 49th
character of a sentence, as the figures do that ner_data's are compared with.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ner import scores as scoring  # noqa: E402
from ner.tunings import TUNINGS  # noqa: E402

RUN_LINE = re.compile(r" - INFO - run (.+)$", re.MULTILINE)  # what main.py logs first


def finished_run(output: Path, name: str) -> Path | None:
    """Return the run of that name that has finished: main.py adds -2, -3, … where an earlier one was broken off."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    runs = [path.parent for path in output.glob(f"{name}*/test.json") if pattern.fullmatch(path.parent.name)]
    return max(runs, key=lambda run: (run / "test.json").stat().st_mtime_ns, default=None)


def train(data: Path, tuning: str, seed: int, rest: list[str], output: Path) -> Path:
    """Return the folder of a finished run, trained now unless it is there. Ends the program where main.py fails."""
    digest = hashlib.sha256(" ".join([str(data), *rest]).encode()).hexdigest()[:6]
    name = f"scores-{data.name}-{tuning}-{seed}-{digest}"
    if run := finished_run(output, name):
        return run
    command = [sys.executable, str(ROOT / "main.py"), "--tuning", tuning, "--seed", str(seed)]
    command += ["--run", name, "--output", str(output)]
    for part in ("train", "dev", "test"):
        command += [f"--{part}", str(data / part)]
    done = subprocess.run(command + rest, cwd=ROOT, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"{' '.join(command + rest)}\nended with code {done.returncode}:\n{log[-2000:]}")
    return ROOT / RUN_LINE.findall(log)[0]  # the folder that this very run wrote, whatever else has its name


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def results(run: Path) -> dict[str, Any]:
    """Return the scores of a run by either count, its best dev F1, and what it cost."""
    rows = read_lines(run / "predictions.jsonl")
    epochs = read_lines(run / "metrics.jsonl")
    gold, predicted = ([scoring.clip(row[side]) for row in rows] for side in ("gold", "predicted"))
    trained = re.findall(r"trainable params: ([\d,]+)", (run / "train.log").read_text("utf-8"))[0]
    return {
        "run": run.name,
        "strict": json.loads((run / "test.json").read_text("utf-8")),
        "first49": scoring.score(gold, predicted),
        "dev_f1": max(epoch["dev"]["micro"]["f1"] for epoch in epochs),
        "trained_weights": int(trained.replace(",", "")),
        "seconds_per_epoch": mean(epoch["seconds"] for epoch in epochs),
        "saved_mb": sum(file.stat().st_size for file in (run / "model").glob("*.safetensors")) / 1e6,
    }


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation, with every value behind where there are several."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def row(name: str, count: str, seeds: list[dict]) -> list[str]:
    """Return the cells of one line of the table: a tuning by one count, over its seeds."""
    types = sorted(seeds[0][count]["types"])
    by_type = [f"{kind} {mean(seed[count]['types'][kind]['f1'] for seed in seeds):.3f}" for kind in types]
    return [
        name,
        count,
        spread([seed[count]["micro"]["f1"] for seed in seeds]),
        f"{mean(seed[count]['macro']['f1'] for seed in seeds):.4f}",
        ", ".join(by_type),
        spread([seed["dev_f1"] for seed in seeds]),
        f"{seeds[0]['trained_weights']:,}",
        f"{mean(seed['seconds_per_epoch'] for seed in seeds):.1f}",
        f"{seeds[0]['saved_mb']:.2f}",
    ]


COLUMNS = ["tuning", "count", "test micro-F1 (seeds)", "macro-F1", "by type", "best dev micro-F1, strict (seeds)",
           "trained weights", "seconds an epoch", "MB saved"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    folder = "A folder with the files train, dev and test. [data/msra]"
    add("--data", type=Path, metavar="FOLDER", default=ROOT / "data/msra", help=folder)
    methods = "Tuning methods, one line of the table each. [lora full]"
    add("--tuning", nargs="+", choices=TUNINGS, metavar="METHOD", default=["lora", "full"], help=methods)
    add("--seeds", nargs="+", type=int, metavar="SEED", default=[1, 2, 3], help="A run for each seed. [1 2 3]")
    counts = ["strict", "first49"]
    add("--count", nargs="+", choices=counts, default=counts, help="What counts as an entity, as above. [both]")
    add("--output", type=Path, metavar="FOLDER", default=ROOT / "output", help="The folder of the runs. [output]")
    add("--json", type=Path, metavar="FILE", help="Write every run's scores there too.")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, rest = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    data, output = options.data.resolve(), options.output.resolve()

    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    everything = {}
    for tuning in options.tuning:
        everything[tuning] = [results(train(data, tuning, seed, rest, output)) for seed in options.seeds]
        for count in options.count:
            print(f"| {' | '.join(row(tuning, count, everything[tuning]))} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1), "utf-8")


if __name__ == "__main__":
    main()
