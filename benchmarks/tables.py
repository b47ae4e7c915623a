"""Measure what the documents state, and write the documents' tables from the measurements.

    python benchmarks/tables.py list                          # every measurement with its command, and whether it is there
    python benchmarks/tables.py measure scores-msra           # run its command, write benchmarks/results/scores-msra.json
    python benchmarks/tables.py measure predict-msra --times 3
    python benchmarks/tables.py fill                          # write the tables into README and docs
    python benchmarks/tables.py check                         # exit 1 where a table is not what the measurements give

A file under benchmarks/results/ is one measurement: {"command", "commit", "date", "machine", "threads", "versions",
"runs"}, where "runs" holds what the benchmark's --json wrote, once for each of --times. Speeds are shown as the median
of the runs with the lowest and the highest, scores as mean and standard deviation over the seeds.

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
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "README.zh.md", *(f"docs/{name}.md" for name in ("results", "performance", "tuning", "cluster", "zh/tuning")))
SEEDS = "--seeds 1 2 3 4 5"
METHODS = "lora full dora rslora adalora ia3 bitfit freeze prompt prefix ptuning"
NER_EPOCHS = "-- --epochs 8"

# Name of a measurement -> its command, without `python` and `--json`.
MEASUREMENTS = {
    "scores-ner_data": f"benchmarks/scores.py --data ner_data --tuning lora full {SEEDS} {NER_EPOCHS}",
    "scores-ner_data-300": f"benchmarks/scores.py --data ner_data --tuning lora {SEEDS} {NER_EPOCHS} "
    "--max_train_sentences 300",
    "scores-msra": f"benchmarks/scores.py --tuning lora full {SEEDS}",
    "scores-msra-all": "benchmarks/scores.py --tuning lora --seeds 1 -- --max_train_sentences null --epochs 3",
    "crf-ner_data": f"benchmarks/scores.py --data ner_data --tuning lora full {SEEDS} {NER_EPOCHS} --head crf",
    "crf-msra": f"benchmarks/scores.py --tuning lora full {SEEDS} -- --head crf",
    "fgm-ner_data": f"benchmarks/scores.py --data ner_data --tuning lora {SEEDS} {NER_EPOCHS} --adversarial fgm",
    "smoothing-ner_data": f"benchmarks/scores.py --data ner_data --tuning lora {SEEDS} {NER_EPOCHS} "
    "--label_smoothing 0.1",
    "focal-ner_data": f"benchmarks/scores.py --data ner_data --tuning lora {SEEDS} {NER_EPOCHS} --loss focal",
    "methods-ner_data": f"benchmarks/scores.py --data ner_data --tuning {METHODS} --seeds 1 {NER_EPOCHS}",
    "methods-msra": f"benchmarks/scores.py --tuning {METHODS} --seeds 1",
    "train-ner_data": "benchmarks/train.py --data ner_data --epochs 2",
    "train-msra": "benchmarks/train.py",
    "predict-msra": "benchmarks/predict.py --sentences 300",
    "predict-ner_data": "benchmarks/predict.py --data ner_data/test --sentences 300",
}

Rows = list[list[str]]


def load(name: str) -> dict | None:
    """Return a measurement, or None where it has not been made."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


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
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(circumstances(name) | {"runs": runs}, ensure_ascii=False, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def circumstances(name: str) -> dict:
    """Return what a figure means nothing without: command, commit, date, machine, threads, versions."""
    import torch
    import transformers

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
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def figure(values: Iterable[float], digits: int = 0) -> str:
    """Return the median, with the lowest and the highest where there are several: `3,542 (3,401–3,600)`."""
    values = list(values)
    shown = f"{median(values):,.{digits}f}"
    if len(values) == 1:
        return shown
    return f"{shown} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def spread(values: Iterable[float]) -> str:
    """Return mean ± standard deviation of scores over seeds, and how many: `0.874 ± 0.002 (3)`."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.3f} (1)"
    return f"{mean(values):.3f} ± {stdev(values):.3f} ({len(values)})"


def source(measurement: dict) -> str:
    """Return the commit and the date of a measurement, for a table's last column."""
    return f"{measurement['commit']}, {measurement['date']}"


def score_rows(names: dict[str, str], by_type: bool) -> Rows:
    """Return a row for each tuning of each measurement: what was trained on, tuning, scores, command, commit."""
    rows = []
    for name, data in names.items():
        if not (measurement := load(name)):
            continue
        for tuning, row in measurement["runs"][0].items():
            cells = [data, f"`{tuning}`", spread(row["seeds"])]
            first49 = row.get("first49")
            cells += [spread(first49) if first49 else "–", f"{row['macro_f1']:.3f}"]
            if by_type:
                cells += [", ".join(f"{kind} {f1:.3f}" for kind, f1 in row["types"].items())]
            rows.append([*cells, f"`{measurement['command']}`", source(measurement)])
    return rows


def scores(chinese: bool) -> tuple[list[str], Rows]:
    """The table of README: what a user gets by default."""
    names = {
        "scores-ner_data": "ner_data，1,412 句，8 轮" if chinese else "ner_data, 1,412 sentences, 8 epochs",
        "scores-msra": "MSRA，抽样 8,000 句，4 轮" if chinese else "MSRA, a sample of 8,000 sentences, 4 epochs",
        "scores-msra-all": "MSRA，全部，3 轮" if chinese else "MSRA, all of train, 3 epochs",
    }
    head = ["数据", "tuning", "测试集 micro-F1（种子数）"] if chinese else ["data", "tuning", "test micro-F1 (seeds)"]
    rows = [row[:3] for row in score_rows(names, by_type=False)]
    return head, rows


def all_scores(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/results.md."""
    names = {
        "scores-ner_data": "ner_data",
        "scores-ner_data-300": "ner_data, 300 sentences",
        "crf-ner_data": "ner_data, `head: crf`",
        "fgm-ner_data": "ner_data, `adversarial: fgm`",
        "smoothing-ner_data": "ner_data, `label_smoothing: 0.1`",
        "focal-ner_data": "ner_data, `loss: focal`",
        "scores-msra": "MSRA, 8,000 sentences",
        "crf-msra": "MSRA, 8,000 sentences, `head: crf`",
        "scores-msra-all": "MSRA, all of train",
    }
    head = ["trained on", "tuning", "micro-F1 (seeds)", "first49", "macro-F1", "F1 by type", "command", "measured"]
    return head, score_rows(names, by_type=True)


def methods(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/tuning.md: all tuning methods, one run each."""
    head = ["tuning", "F1, ner_data", "F1, MSRA", "trained weights", "s/epoch, ner_data", "s/epoch, MSRA", "saved"]
    if chinese:
        head = ["方法", "F1，ner_data", "F1，MSRA", "可训练参数量", "秒/轮，ner_data", "秒/轮，MSRA", "保存大小"]
    small, large = load("methods-ner_data"), load("methods-msra")
    if not small or not large:
        return head, []
    rows = []
    for tuning, one in small["runs"][0].items():
        two = large["runs"][0][tuning]
        size = f"{one['model_mb']:.1f} MB" if one["model_mb"] >= 1 else f"{one['model_mb'] * 1000:.0f} kB"
        f1, seconds = ([f"{row[key]:.{digits}f}" for row in (one, two)] for key, digits in
                       (("micro_f1", 3), ("seconds_per_epoch", 0)))  # fmt: skip
        rows.append([f"`{tuning}`", *f1, f"{one['trained']:,}", *seconds, size])
    return head, rows


def training_speed(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: main.py against the Trainer."""
    head = ["training", "tokens/s", "Trainer + peft, tokens/s", "ratio", "F1", "peak memory, MB", "command", "measured"]
    rows = []
    for name in ("train-ner_data", "train-msra"):
        if not (measurement := load(name)):
            continue
        for tuning in measurement["runs"][0]:
            runs = [run[tuning] for run in measurement["runs"]]

            def column(key: str, digits: int = 0, runs: list[dict] = runs) -> str:
                return figure([run[key] for run in runs], digits)

            cells = [f"{name.removeprefix('train-')}, `{tuning}`", column("tokens_per_second")]
            cells += [column("peer_tokens_per_second"), column("ratio", 1)]
            cells += [f"{column('f1', 3)} / {column('peer_f1', 3)}", f"{column('peak_mb')} / {column('peer_peak_mb')}"]
            rows.append([*cells, f"`{measurement['command']}`", source(measurement)])
    return head, rows


def tagging_speed(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: predict.py against transformers' pipeline."""
    head = ["tagging", "characters/s", "pipeline at its best batch size", "ratio", "command", "measured"]
    rows = []
    for name in ("predict-msra", "predict-ner_data"):
        if measurement := load(name):
            columns = {
                key: figure([run[key] for run in measurement["runs"]], 1 if key == "ratio" else 0)
                for key in ("characters_per_second", "peer_characters_per_second", "ratio")
            }
            rows.append(
                [name.removeprefix("predict-"), *columns.values(), f"`{measurement['command']}`", source(measurement)]
            )
    return head, rows


def cost(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/cluster.md: hours of one machine, from the measured rate."""
    head = ["to tag", "hours", "at characters a second", "measured"]
    rows = []
    if measurement := load("predict-msra"):
        rate = median(run["characters_per_second"] for run in measurement["runs"])
        for text, characters in (("a million sentences of 43 characters", 43e6), ("a billion characters", 1e9)):
            rows.append([text, f"{characters / rate / 3600:.2f}", f"{rate:,.0f}", source(measurement)])
    return head, rows


TABLES: dict[str, Callable[[bool], tuple[list[str], Rows]]] = {
    "scores": scores,
    "all scores": all_scores,
    "methods": methods,
    "training speed": training_speed,
    "tagging speed": tagging_speed,
    "cost": cost,
}


def as_markdown(head: list[str], rows: Rows, chinese: bool) -> str:
    """Return a Markdown table; a sentence where nothing was measured."""
    if not rows:
        return "尚未测量。\n" if chinese else "Not measured yet.\n"
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def filled(text: str, chinese: bool) -> str:
    """Return a document's text with every table between its markers made anew. Raises KeyError for unknown tables."""

    def table(match: re.Match) -> str:
        head, rows = TABLES[match[1]](chinese)
        return f"<!-- table: {match[1]} -->\n{as_markdown(head, rows, chinese)}<!-- end of table -->"

    return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end of table -->", table, text, flags=re.S)


def stale_documents() -> dict[Path, str]:
    """Return the documents whose tables are not what the measurements give, with the text they should have."""
    stale = {}
    for name in DOCUMENTS:
        file = ROOT / name
        text = file.read_text("utf-8")
        if (fresh := filled(text, chinese="zh" in name)) != text:
            stale[file] = fresh
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "fill", "check"):
        commands.add_parser(name)
    one = commands.add_parser("measure")
    one.add_argument("name", choices=MEASUREMENTS)
    one.add_argument("--times", type=int, default=1, help="how often the command is run (default: 1)")
    options = parser.parse_args()
    if options.command == "list":
        for name, command in MEASUREMENTS.items():
            there = load(name)
            print(f"{name:22}{source(there) if there else 'not measured':22}python {command}")
    elif options.command == "measure":
        measure(options.name, options.times)
    else:
        stale = stale_documents()
        for file, text in stale.items():
            print(f"{file.relative_to(ROOT)}: {'filled' if options.command == 'fill' else 'not what the results give'}")
            if options.command == "fill":
                file.write_text(text, encoding="utf-8")
        sys.exit(options.command == "check" and bool(stale))


if __name__ == "__main__":
    main()
