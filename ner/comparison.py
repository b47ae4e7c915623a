"""Several runs → one HTML page: scores, types, curves, cost, settings, and the test sentences on which they differ.

`python -m ner.report --compare RUN RUN...` writes it. As with the page of one run, nothing is loaded from elsewhere and
everything from the runs is escaped.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ner import mistakes, run_files
from ner.chart import chart
from ner.config_file import read
from ner.config_schema import FIELDS
from ner.decoding import spans
from ner.errors import UserError
from ner.markup import LONGEST_GAP, hues, language, segments, templates, visible
from ner.run_files import Prediction

FEWEST, MOST = 2, 8  # runs on a page; the curves have as many colours
MOST_SENTENCES = 50  # shown
PLACES = ("output", "run")  # keys that say where a run lies, not how it was made

Sentences = dict[tuple, Prediction]  # see _by_key


class Difference(NamedTuple):
    """A sentence on which the runs differ: for each run its prediction, gold matched with predicted, and errors."""

    sentences: list[Prediction]
    matches: list[list[mistakes.Pair]]
    errors: list[int]


def write(runs: Sequence[Path], output: str | os.PathLike | None = None) -> Path:
    """Write the page of the runs to `output`, else beside the first run; return its path. Raises UserError."""
    runs = [Path(run).expanduser() for run in runs]
    if not FEWEST <= len(runs) <= MOST:
        raise UserError(f"--compare: {len(runs)} run(s) given; expected {FEWEST} to {MOST} folders of runs")
    for run in runs:
        run_files.check_is_run(run)
    target = Path(output).expanduser() if output else runs[0].resolve().parent / "comparison.html"
    macros = templates("comparison.html.j2")
    return run_files.write_page(target, str(macros.comparison(page(runs))).lstrip())


def page(runs: Sequence[Path]) -> dict[str, Any]:
    """Return what the template shows of the runs."""
    names = _names(runs)
    scores = [run_files.best_scores(run) for run in runs]
    differences = differing([_by_key(run_files.predictions(run)) for run in runs])
    types = sorted({name for row, _ in scores if row for name in row["types"]} | differences.pop("types"))
    return {
        "names": names,
        "rows": [_summary(run, name, *score) for run, name, score in zip(runs, names, scores, strict=True)],
        "same_test": len({scored for _, scored in scores}) == 1,
        "types": [(name, [_type_row(row, name) for row, _ in scores]) for name in types],
        "charts": _charts(runs, names),
        "settings": _settings(runs),
        "differences": differences,
        "hues": hues(types),
    }


def differing(runs: list[Sentences]) -> dict[str, Any]:
    """Return the sentences on which the runs differ, those first where the best and the worst run lie furthest apart.

    runs: the sentences of each by a key that is the same for the same sentence. Only those that all runs have count.
    """
    common = [key for key in runs[0] if all(key in run for run in runs[1:])]
    units = [unit for key in common for unit in runs[0][key].units]
    separator = mistakes.separator_of(sum(len(unit) > 1 for unit in units), len(units))
    differences: list[Difference] = []
    types: set[str] = set()
    faultless = [0] * len(runs)  # sentences without an error, for each run
    for key in common:
        sentences = [run[key] for run in runs]
        matches = [mistakes.pairs(spans(each.gold), spans(each.predicted)) for each in sentences]
        errors = [mistakes.errors(pairs) for pairs in matches]
        faultless = [total + (count == 0) for total, count in zip(faultless, errors, strict=True)]
        types |= {entity[0] for pairs in matches for pair in pairs for entity in (pair.gold, pair.predicted) if entity}
        if len({tuple(spans(each.predicted)) for each in sentences}) > 1:
            differences.append(Difference(sentences, matches, errors))
    differences.sort(key=lambda each: (min(each.errors) - max(each.errors), each.sentences[0].line))
    return {
        "common": len(common),
        "all": max(len(run) for run in runs),
        "count": len(differences),
        "faultless": faultless,
        "types": types,
        "shown": [_shown(difference, separator) for difference in differences[:MOST_SENTENCES]],
    }


def _shown(difference: Difference, separator: str) -> dict[str, Any]:
    first = difference.sentences[0]
    all_correct = [pair._replace(kind=mistakes.CORRECT) for pair in difference.matches[0]]
    return {
        "number": first.line,
        "lang": language("".join(first.units[:LONGEST_GAP])),
        "gold": segments(first.units, mistakes.gold_with_kinds(all_correct), separator),
        "runs": [
            (errors, segments(first.units, mistakes.predicted_with_kinds(pairs), separator))
            for pairs, errors in zip(difference.matches, difference.errors, strict=True)
        ],
    }


def _by_key(predictions: Iterable[Prediction]) -> Sentences:
    """The sentences by (units, how many of the same units came before), as a text may stand in a file twice."""
    sentences: Sentences = {}
    repeats: Counter[tuple[str, ...]] = Counter()
    for sentence in predictions:
        units = tuple(sentence.units)
        sentences[units, repeats[units]] = sentence
        repeats[units] += 1
    return sentences


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with those above them where two runs have the same."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.resolve()) for run in runs]
    return [visible(name) for name in names]


def _summary(run: Path, name: str, scores: dict[str, Any] | None, scored: str) -> dict[str, Any]:
    """One run's row of scores and cost."""
    epochs = run_files.epochs(run)
    seconds = [run_files.number(line.get("seconds")) or 0.0 for line in epochs]
    speeds = [speed for line in epochs if (speed := run_files.number(line.get("tokens_per_second")))]
    parameters = run_files.trainable(run)
    machine = run_files.json_object(run / "environment.json")
    return {
        "name": name,
        "scores": scores,
        "scored": scored,
        "epochs": len(epochs),
        "seconds": sum(seconds) if epochs else None,
        "speed": sum(speeds) / len(speeds) if speeds else None,
        "trained": parameters[0] if parameters else None,
        "parameters": parameters[1] if parameters else None,
        "device": visible(" ".join(str(machine[key]) for key in ("gpu", "device", "precision") if key in machine)),
    }


def _type_row(scores: dict[str, Any] | None, name: str) -> dict[str, float | None] | None:
    return scores["types"].get(name) if scores else None


def _charts(runs: Sequence[Path], names: list[str]) -> list[dict[str, Any]]:
    """The curves over the epochs, a line a run, without those that have no point."""
    epochs = [run_files.epochs(run) for run in runs]

    def lines(value: Any) -> list[tuple[str, int, list]]:
        return [(name, i, run_files.curve(epochs[i], value)) for i, name in enumerate(names)]

    charts = [
        chart("Micro F1 on dev", lines(run_files.dev_f1)),
        chart("Loss on dev", lines(lambda line: line.get("dev_loss"))),
        chart("Loss on train", lines(lambda line: line.get("train_loss"))),
    ]
    return [data for data in charts if data]


def _settings(runs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """The keys of config.yaml whose values differ, with the value in each run."""
    configs = [_config(run / "config.yaml") for run in runs]
    keys = [key for key in FIELDS if key not in PLACES and any(key in config for config in configs)]
    rows = [(key, [config.get(key, "–") for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _config(file: Path) -> dict[str, str]:
    """The values of a config file as text, {} where it cannot be read."""
    try:
        values, _ = read(file)
    except UserError:
        return {}
    return {key: visible("null" if value is None else str(value)) for key, value in values.items()}
