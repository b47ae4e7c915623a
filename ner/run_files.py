"""What a run's folder holds, for the pages made of it: each piece checked, empty where it is missing or damaged.

An interrupted run has a report as well, so nothing here raises but for a folder that is no run.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ner.errors import UserError
from ner.files import write_text
from ner.markup import visible

FILES = ("config.yaml", "metrics.jsonl", "test.json", "predictions.jsonl", "environment.json", "train.log")
NUMBERS = ("precision", "recall", "f1", "support")
MEANS = ("micro", "macro", "weighted")
MOST_WARNINGS = 20
WARNING = re.compile(r"\S+ \S+ - \S+ - (?:WARNING|ERROR) - (.*)")
TRAINABLE = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)")
LARGEST_NUMBER = 1e300
DEEPEST = 4  # levels of nested JSON that get rows of their own


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl: the units of a test sentence, its gold and its predicted IOB2 tags."""

    line: int
    units: list[str]
    gold: list[str]
    predicted: list[str]


def check_is_run(run: Path) -> None:
    """Raise UserError where the folder is no run's."""
    if not run.is_dir():
        raise UserError(f"{run}: not a folder; give a run's folder, such as output/2024-05-06_10-49-17")
    if not any((run / name).is_file() for name in FILES):
        raise UserError(f"{run}: not the folder of a run, which holds {', '.join(FILES[:3])} and others; give one")


def text(path: Path) -> str:
    """Return a file's text, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def json_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file, {} where it holds none."""
    try:
        value = json.loads(text(path))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a .jsonl file; what is no object (an interrupted run's last line) is skipped."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    yield number, value
    except OSError:
        return


def number(value: Any) -> float | None:
    """Return the value as a float where it can be drawn, else None: finite and below LARGEST_NUMBER."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < LARGEST_NUMBER and math.isfinite(value) else None


def scores(value: Any) -> dict[str, Any] | None:
    """Return scores in the shape that the pages draw, every number checked; None where there are none."""
    if not isinstance(value, dict) or not isinstance(value.get("micro"), dict):
        return None
    types = value["types"] if isinstance(value.get("types"), dict) else {}
    checked: dict[str, Any] = {"types": {str(name): _row(types[name]) for name in sorted(types)}}
    checked["accuracy"] = number(value.get("accuracy"))
    return checked | {mean: _row(value.get(mean)) for mean in MEANS}


def epochs(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that name their epoch."""
    return [line for _, line in json_lines(run / "metrics.jsonl") if number(line.get("epoch")) is not None]


def curve(lines: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> list[tuple[float, float]]:
    """Return the points (epoch, value(line)) of those lines of metrics.jsonl whose value can be drawn."""
    points = [(number(line["epoch"]), number(value(line))) for line in lines]
    return [(x, y) for x, y in points if x is not None and y is not None]


def dev_f1(line: dict[str, Any], mean: str = "micro") -> float | None:
    """Return the F1 on dev of a line of metrics.jsonl, None where it has none."""
    checked = scores(line.get("dev"))
    return checked[mean]["f1"] if checked else None


def best_scores(run: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the scores on test, else those of the best epoch on dev; and what they were computed on, in words."""
    on_test = scores(json_object(run / "test.json"))
    if on_test:
        return on_test, "test"
    scored = [line for line in epochs(run) if scores(line.get("dev"))]
    if not scored:
        return None, ""
    best = max(scored, key=lambda line: dev_f1(line) or 0.0)
    return scores(best["dev"]), f"dev, epoch {best['epoch']}, the best so far"


def is_finished(run: Path) -> bool:
    """Return whether the run came to its end."""
    return scores(json_object(run / "test.json")) is not None or (run / "finished.json").is_file()


def predictions(run: Path) -> Iterator[Prediction]:
    """Yield the sentences of predictions.jsonl; lines that are damaged are skipped."""
    for line, value in json_lines(run / "predictions.jsonl"):
        units, gold, predicted = (_texts(value.get(key)) for key in ("chars", "gold", "predicted"))
        if units is None or gold is None or predicted is None:
            continue
        if len(units) == len(gold) == len(predicted):
            yield Prediction(line, units, gold, predicted)


def warnings(run: Path) -> list[str]:
    """Return the first warnings and errors of train.log, each once, safe to show."""
    matches = [WARNING.match(line) for line in text(run / "train.log").splitlines()]
    return list(dict.fromkeys(visible(match[1]) for match in matches if match))[:MOST_WARNINGS]


def trainable(run: Path) -> tuple[int, int] | None:
    """Return the numbers of trained and of all parameters by train.log, None where it does not say."""
    match = TRAINABLE.search(text(run / "train.log"))
    return (int(match[1].replace(",", "")), int(match[2].replace(",", ""))) if match else None


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as rows of (dotted key, value), safe to show."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict) and prefix.count(".") < DEEPEST:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((visible(f"{prefix}{key}"), visible(value if isinstance(value, str) else json.dumps(value))))
    return rows


def write_page(path: Path, page: str) -> Path:
    """Write a page whole or not at all; return its path. Raises UserError."""
    try:
        write_text(path, page, errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); the runs themselves are untouched") from None
    return path


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _row(numbers: Any) -> dict[str, float | None]:
    numbers = numbers if isinstance(numbers, dict) else {}
    return {key: number(numbers.get(key)) for key in NUMBERS}
