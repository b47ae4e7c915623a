"""A run folder → one self-contained HTML page: curves, scores, errors. `python report.py output/RUN`.

The page is one file without scripts, fonts or images from elsewhere, and its content policy forbids the browser to load
any; everything from the run (texts, types, config) reaches it through Jinja2's autoescape. Charts are SVG drawn by the
template, so that no plotting library is needed and the page follows the reader's light or dark theme.
Whatever a run has not written yet is left out: an interrupted run has a report as well.
"""

import argparse
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

from ner.errors import UserError, command
from ner.markup import LONGEST_GAP, hues, language, segments, templates, visible

WORST = 50  # sentences shown

CORRECT, BOUNDARY, TYPE, BOTH, MISSED, SPURIOUS = KINDS = (
    "correct", "wrong boundary", "wrong type", "wrong both", "missed", "spurious")


def pairs(gold: list[tuple], predicted: list[tuple]) -> list[tuple]:
    """Matches gold and predicted entities of one sentence, each at most once, so that all counts add up.

    gold, predicted: (type, start, end), half-open. Returns (kind, gold or None, predicted or None). The kinds are
    nervaluate's: same span and type; overlap with the right type (wrong boundary); same span with another type (wrong
    type); overlap with another type (wrong both); gold alone (missed); predicted alone (spurious). Where several would
    match, the better kind goes first, then the longer overlap.
    """
    candidates = []
    gold, predicted = sorted(gold, key=lambda e: e[1:]), sorted(predicted, key=lambda e: e[1:])
    first = 0
    for j, guess in enumerate(predicted):
        while first < len(gold) and gold[first][2] <= guess[1]:
            first += 1
        for i in range(first, len(gold)):
            overlap = min(gold[i][2], guess[2]) - max(gold[i][1], guess[1])
            if overlap <= 0:
                break
            same_span, same_type = gold[i][1:] == guess[1:], gold[i][0] == guess[0]
            rank = 0 if same_span and same_type else 1 if same_span else 2 if same_type else 3
            candidates.append((rank, -overlap, i, j))
    free_gold, free_predicted, matched = set(range(len(gold))), set(range(len(predicted))), []
    for rank, _, i, j in sorted(candidates):
        if i in free_gold and j in free_predicted:
            free_gold.remove(i)
            free_predicted.remove(j)
            matched.append(((CORRECT, TYPE, BOUNDARY, BOTH)[rank], gold[i], predicted[j]))
    matched += [(MISSED, gold[i], None) for i in free_gold] + [(SPURIOUS, None, predicted[j]) for j in free_predicted]
    return sorted(matched, key=lambda m: (m[1] or m[2])[1:])


def write(run: Path) -> Path:
    """Writes run/report.html from what the run folder holds and returns its path; UserError if there is no folder."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run}: not a folder; give a run's folder, such as output/20240506-104917")
    epochs, dev = _epochs(run)
    test, environment = _json(run / "test.json"), _json(run / "environment.json")
    errors = _errors(run / "predictions.jsonl")
    if scores := _scores(test):
        scored = "test"
    elif dev:
        best = max(dev, key=lambda line: _number(line["dev"]["micro"].get("f1")) or 0.0)
        scores, scored = _scores(best["dev"]), f"dev, epoch {best.get('epoch', '?')}, the best so far"
    else:
        scored = ""
    page = {
        "name": run.resolve().name, "scores": scores, "scored": scored,
        "finished": bool(_scores(test)) or (run / "finished.json").is_file(),
        "charts": [chart for chart in (
            _chart("Loss", epochs, [("train", lambda line: line.get("train_loss")),
                                    ("dev", lambda line: line.get("dev_loss"))]),
            _chart("F1 on dev", epochs, [("micro", lambda line: _f1(line, "micro")),
                                         ("macro", lambda line: _f1(line, "macro"))])) if chart],
        "epochs": epochs, "errors": errors, "kinds": KINDS, "worst_limit": WORST,
        "hues": hues([*(scores or {"types": {}})["types"], *(errors["types"] if errors else ())]),
        "config": "\n".join(visible(line) for line in _text(run / "config.yaml").splitlines()),
        "environment": _flat(environment or {}),
        "warnings": _warnings(run / "train.log"),
    }
    return _replace(run / "report.html", str(templates().report(page)).lstrip())


def _replace(path: Path, text: str) -> Path:
    """Writes text to path at once: a reader sees the old page or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); the run itself is untouched") from None
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict | None:
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lines(path: Path):
    """The objects of a .jsonl file; lines that are none (the last of an interrupted run) are skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def _number(value) -> float | None:
    """The value if it can be drawn: a finite number."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e300 and math.isfinite(value) else None


def _scores(value) -> dict | None:
    """The scores in the shape the template draws, every number checked; None where there are none."""
    if not isinstance(value, dict) or not isinstance(value.get("micro"), dict):
        return None

    def row(numbers):
        numbers = numbers if isinstance(numbers, dict) else {}
        return {key: _number(numbers.get(key)) for key in ("precision", "recall", "f1", "support")}

    types = value.get("types") if isinstance(value.get("types"), dict) else {}
    return {"types": {str(name): row(types[name]) for name in sorted(types)},
            "accuracy": _number(value.get("accuracy")),
            **{mean: row(value.get(mean)) for mean in ("micro", "macro", "weighted")}}


def _f1(line: dict, mean: str):
    dev = line.get("dev")
    return dev[mean].get("f1") if isinstance(dev, dict) and isinstance(dev.get(mean), dict) else None


def _epochs(run: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl as (its lines, those of them with dev scores)."""
    epochs = [line for line in _lines(run / "metrics.jsonl") if _number(line.get("epoch")) is not None]
    return epochs, [line for line in epochs if _scores(line.get("dev"))]


def _flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict) and prefix.count(".") < 4:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((visible(f"{prefix}{key}"), visible(value if isinstance(value, str) else json.dumps(value))))
    return rows


def _warnings(log: Path) -> list[str]:
    found = []
    for line in _text(log).splitlines():
        if match := re.match(r"\S+ \S+ - \S+ - (?:WARNING|ERROR) - (.*)", line):
            found.append(visible(match[1]))
    return list(dict.fromkeys(found))[:20]


def _chart(title: str, epochs: list[dict], series: list[tuple]) -> dict | None:
    """Geometry of a line chart for the template (in units of its 420 × 240 view box); None without a point."""
    lines = []
    for name, value in series:
        points = [(_number(line["epoch"]), _number(value(line))) for line in epochs]
        if points := [(x, y) for x, y in points if y is not None]:
            lines.append((name, points))
    if not lines:
        return None
    xs, ys = ([point[axis] for _, points in lines for point in points] for axis in (0, 1))
    ticks = _ticks(min(ys), max(ys), 5)
    low, high = ticks[0], ticks[-1]
    left, right = min(xs), max(xs)

    def place(x, y):
        return (round(48 + 356 * ((x - left) / (right - left) if right > left else 0.5), 1),
                round(204 - 188 * (y - low) / (high - low), 1))

    epochs_shown = sorted({int(x) for x in xs})
    epochs_shown = epochs_shown[::math.ceil(len(epochs_shown) / 10)]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return {"title": title, "y": [(place(left, y)[1], f"{y:.{digits}f}") for y in ticks],
            "x": [(place(x, low)[0], x) for x in epochs_shown],
            "lines": [{"name": name, "last": points[-1][1], "points": [(*place(x, y), f"epoch {x:g}: {y:.4f}")
                                                                     for x, y in points]} for name, points in lines]}


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose low and high."""
    span = (high - low) or abs(high) * 0.1 or 1.0
    step = next((m * unit for unit in [10.0 ** math.floor(math.log10(span / count))] for m in (1, 2, 5)
                 if m * unit * count >= span), 10.0 ** math.ceil(math.log10(span / count)))
    bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(bottom, max(top, bottom + 1) + 1)]


def _errors(path: Path) -> dict | None:
    """What predictions.jsonl shows: the confusion of types, the counts of each kind of error, the worst sentences."""
    from ner.decoding import spans

    cells, kinds, worst, count, long_units, units = Counter(), {}, [], 0, 0, 0
    for number, line in enumerate(_lines(path), 1):
        chars, gold, predicted = (line.get(key) for key in ("chars", "gold", "predicted"))
        lists = all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (chars, gold, predicted))
        if not lists or not len(chars) == len(gold) == len(predicted):
            continue
        count, units, long_units = count + 1, units + len(chars), long_units + sum(len(unit) > 1 for unit in chars)
        found = pairs(spans(gold), spans(predicted))
        for kind, true, guess in found:
            cells[true[0] if true else None, guess[0] if guess else None, kind] += 1
            kinds.setdefault((true or guess)[0], Counter())[kind] += 1
        if wrong := sum(kind != CORRECT for kind, _, _ in found):
            worst.append((-wrong, len(chars), number, chars, found))
            if len(worst) > 20 * WORST:
                worst = sorted(worst, key=lambda w: w[:3])[:WORST]
    if not count:
        return None
    types = sorted({name for cell in cells for name in cell[:2] if name})
    joint = " " if long_units > 0.3 * units else ""
    return {"types": types, "count": count, "wrong": sum(n for c, n in cells.items() if c[2] != CORRECT),
            "rows": [_row(cells, true, types) for true in [*types, None]],
            "kinds": [(name, [kinds.get(name, Counter())[kind] for kind in KINDS]) for name in types],
            "totals": [sum(kinds[name][kind] for name in kinds) for kind in KINDS],
            "worst": [{"number": number, "wrong": -wrong, "lang": language("".join(chars[:LONGEST_GAP])),
                       "gold": segments(chars, _side(found, 1), joint),
                       "predicted": segments(chars, _side(found, 2), joint)}
                      for wrong, _, number, chars, found in sorted(worst, key=lambda w: w[:3])[:WORST]]}


def _side(found: list[tuple], side: int) -> list[tuple]:
    """The gold (1) or predicted (2) entities of pairs(), each with the kind of its pair."""
    return sorted(((*match[side], match[0]) for match in found if match[side]), key=lambda entity: entity[1])


def _row(cells: Counter, true: str | None, types: list[str]) -> dict:
    """One row of the confusion matrix; None stands for O. A cell: (count, share of the row, counts by kind)."""
    row = [{kind: cells[true, guess, kind] for kind in KINDS if cells[true, guess, kind]} for guess in [*types, None]]
    total = sum(sum(cell.values()) for cell in row) or 1
    return {"type": true, "cells": [(sum(cell.values()), sum(cell.values()) / total, cell) for cell in row]}


@command
def main(argv: list[str] | None = None) -> None:
    """`python report.py [RUN]`: writes the page and prints its path."""
    parser = argparse.ArgumentParser(description="Writes RUN/report.html: curves, scores and errors on one page.")
    parser.add_argument("run", nargs="?", help="the run's folder (default: the newest finished one under output/)")
    run = parser.parse_args(argv).run
    if run is None:
        from ner import scores as scoring

        run = scoring.newest_run()
    print(write(Path(run)))


if __name__ == "__main__":
    main()
