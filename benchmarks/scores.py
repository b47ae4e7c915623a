"""Trains and scores runs of main.py over seeds, and prints the mean test scores as a table.

    python benchmarks/scores.py --data ../shared/ner_data --tuning lora full --seeds 1 2 3 -- --epochs 8

What stands after `--` goes to main.py as it is. Runs land in output/ and one that has finished is not run again.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent


def one(data, tuning, seed, rest, output):
    """Runs main.py once, unless that run is there; returns its folder."""
    digest = hashlib.sha256(" ".join([str(data), *rest]).encode()).hexdigest()[:6]
    name = f"scores-{data.name}-{tuning}-{seed}-{digest}"
    run = output / name
    if not (run / "test.json").exists():
        command = [sys.executable, str(ROOT / "main.py"), "--tuning", tuning, "--seed", str(seed),
                   "--run", name, "--output", str(output)]
        for part in ("train", "dev", "test"):
            command += [f"--{part}", str(data / part)]
        subprocess.run(command + rest, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/msra", help="folder with train, dev and test")
    parser.add_argument("--tuning", nargs="*", default=["lora", "full"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "output")
    parser.add_argument("--json", type=Path)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, rest = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1:]
    table = {}
    for tuning in options.tuning:
        runs = [one(options.data.resolve(), tuning, seed, rest, options.output.resolve()) for seed in options.seeds]
        tests = [json.loads((run / "test.json").read_text(encoding="utf-8")) for run in runs]
        epochs = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        best = [max(json.loads(line)["dev"]["micro"]["f1"] for line in
                    (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) for run in runs]
        share = next(line for line in (runs[0] / "train.log").read_text(encoding="utf-8").splitlines()
                     if "trainable params:" in line)
        table[tuning] = {
            "micro_f1": mean(t["micro"]["f1"] for t in tests), "seeds": [t["micro"]["f1"] for t in tests],
            "macro_f1": mean(t["macro"]["f1"] for t in tests), "dev_f1": mean(best),
            "types": {name: mean(t["types"][name]["f1"] for t in tests) for name in tests[0]["types"]},
            "trained": int(share.split("trainable params:")[1].split("||")[0].replace(",", "")),
            "seconds_per_epoch": mean(e["seconds"] for e in epochs),
            "model_mb": sum(f.stat().st_size for f in (runs[0] / "model").glob("*.safetensors")) / 1e6}
    types = sorted({name for row in table.values() for name in row["types"]})
    print(f"| tuning | test micro-F1 (seeds) | macro-F1 | {' | '.join(types)} | dev micro-F1 | trained weights "
          "| seconds an epoch | MB saved |")
    print("|---" * (7 + len(types)) + "|")
    for tuning, row in table.items():
        seeds = ", ".join(f"{f1:.4f}" for f1 in row["seeds"])
        by_type = " | ".join(f"{row['types'][name]:.4f}" for name in types)
        print(f"| {tuning} | {row['micro_f1']:.4f} ({seeds}) | {row['macro_f1']:.4f} | {by_type} "
              f"| {row['dev_f1']:.4f} | {row['trained']:,} | {row['seconds_per_epoch']:.1f} | {row['model_mb']:.2f} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
