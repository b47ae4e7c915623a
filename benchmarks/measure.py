"""Run a benchmark whose figures the documents state, and keep them with what they mean nothing without.

    python benchmarks/measure.py list                       # every measurement, its command, whether it is there
    python benchmarks/measure.py run scores-msra            # write benchmarks/results/scores-msra.json
    python benchmarks/measure.py run predict-msra --times 3

A file under benchmarks/results/ is one measurement: {"command", "commit", "date", "machine", "cpu", "threads",
"versions", "runs"}, where "runs" holds what the benchmark's --json wrote, once for each of --times. Speeds depend on
what the processor can do, so each kind of it has a file of its own: train-msra.avx2.json. `python benchmarks/tables.py
fill` makes the documents' tables of them.

ner_data, which is not shipped, is looked for in the folder that the variable NER_DATA names.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
SEEDS, SOFTMAX_SEEDS = "--seeds 1 2 3 4 5", "--seeds 11 12 13 14 15"
METHODS = "lora full dora rslora adalora ia3 bitfit freeze prompt prefix ptuning"
NER_LORA = "benchmarks/scores.py --data ner_data --tuning lora"
MSRA_LORA = "benchmarks/scores.py --tuning lora"
NER_EPOCHS = "-- --epochs 8"

# Name of a measurement -> its command, without `python` and `--json`.
MEASUREMENTS = {
    "scores-ner_data": f"{NER_LORA} full {SEEDS}",
    "scores-ner_data-300": f"{NER_LORA} {SEEDS} -- --max_train_sentences 300",
    "scores-msra": f"{MSRA_LORA} {SEEDS}",
    "scores-msra-all": f"{MSRA_LORA} {SEEDS} -- --max_train_sentences null --epochs 3",
    "dropout0.1-ner_data": f"{NER_LORA} full {SEEDS} -- --dropout 0.1",
    "dropout0.1-ner_data-300": f"{NER_LORA} {SEEDS} -- --dropout 0.1 --max_train_sentences 300",
    "dropout0.1-msra": f"{MSRA_LORA} {SEEDS} -- --dropout 0.1",
    "dropout0.2-ner_data": f"{NER_LORA} {SEEDS} -- --dropout 0.2",
    "epochs20-ner_data-300": f"{NER_LORA} {SEEDS} -- --epochs 20 --max_train_sentences 300",
    "epochs8-ner_data": f"{NER_LORA} full {SEEDS} {NER_EPOCHS}",
    "epochs8-ner_data-300": f"{NER_LORA} {SEEDS} {NER_EPOCHS} --max_train_sentences 300",
    "softmax-ner_data": f"{NER_LORA} {SOFTMAX_SEEDS} {NER_EPOCHS} --head softmax",
    "softmax-msra": f"{MSRA_LORA} {SEEDS} -- --head softmax",
    "fgm-ner_data": f"{NER_LORA} --seeds 1 2 3 {NER_EPOCHS} --adversarial fgm",
    "smoothing-ner_data": f"{NER_LORA} --seeds 11 12 13 {NER_EPOCHS} --head softmax --label_smoothing 0.1",
    "focal-ner_data": f"{NER_LORA} --seeds 11 12 13 {NER_EPOCHS} --head softmax --loss focal",
    "methods-ner_data": f"benchmarks/scores.py --data ner_data --tuning {METHODS} --seeds 1 {NER_EPOCHS}",
    "train-ner_data": "benchmarks/train.py --data ner_data --sentences 500",
    "train-msra": "benchmarks/train.py --sentences 500",
    "base-size": "benchmarks/base_size.py",
    "ray-msra": "benchmarks/cluster.py",
    "kernels": "benchmarks/kernels.py",
    "predict-msra": "benchmarks/predict.py --sentences 300",
    "predict-ner_data": "benchmarks/predict.py --data ner_data/test --sentences 300",
}


def load(name: str) -> list[dict]:
    """Return the measurements of that name: a score's one, a speed's one for each kind of processor; maybe none."""
    files = [*RESULTS.glob(f"{name}.json"), *sorted(RESULTS.glob(f"{name}.*.json"), reverse=True)]
    return [json.loads(file.read_text("utf-8")) for file in files]


def measure(name: str, times: int) -> None:
    """Run a measurement's command and write its file. Raises SystemExit where the command fails."""
    runs = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            words = MEASUREMENTS[name].replace("ner_data", os.environ.get("NER_DATA", "ner_data")).split()
            end = words.index("--") if "--" in words else len(words)
            command = [sys.executable, *words[:end], "--json", str(file), *words[end:]]
            if status := subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(f"{' '.join(command)}: ended with status {status}")
            runs.append(json.loads(file.read_text("utf-8")))
    measurement = circumstances(name) | {"runs": runs}
    is_score = MEASUREMENTS[name].startswith("benchmarks/scores.py")
    kind = "" if is_score else "." + re.sub(r"\W+", "-", measurement["cpu"].lower())
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(measurement, ensure_ascii=False, indent=1)
    (RESULTS / f"{name}{kind}.json").write_text(text + "\n", encoding="utf-8")


def circumstances(name: str) -> dict:
    """Return what a figure means nothing without: all of a measurement but its runs."""
    import torch
    import transformers

    from ner.precision import cpu_has_bfloat16

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text("utf-8").splitlines() if processors.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    machine = f"{model}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return {
        "command": f"python {MEASUREMENTS[name]}",
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "cpu": torch.backends.cpu.get_cpu_capability() + (", bf16" if cpu_has_bfloat16() else ""),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def source(measurement: dict) -> str:
    """Return the commit and the date of a measurement, and the kind of processor where it depends on that."""
    cpu = [measurement["cpu"]] if "cpu" in measurement else []
    return ", ".join([*cpu, measurement["commit"], measurement["date"]])


def how_measured(measurement: dict) -> list[str]:
    """Return the last two cells of a row: the command, and what source() says."""
    return [f"`{measurement['command']}`", source(measurement)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="List the measurements.", description="Lists the measurements.")
    run = actions.add_parser("run", help="Make a measurement.", description="Makes a measurement and writes its file.")
    run.add_argument("name", choices=MEASUREMENTS, metavar="NAME", help=f"One of {', '.join(MEASUREMENTS)}.")
    run.add_argument("--times", type=int, metavar="N", default=1, help="How often the command is run. [%(default)s]")
    options = parser.parse_args()
    if options.action == "run":
        return measure(options.name, options.times)
    for name, command in MEASUREMENTS.items():
        for measured in [source(measurement) for measurement in load(name)] or ["not measured"]:
            print(f"{name:22}{measured:36}  python {command}")


if __name__ == "__main__":
    main()
