"""Gold tags and predicted tags in, scores out; as a command, the scores of a saved run.

Nothing heavy is imported up here and importing does nothing, so that a package which looks for the library of the
same name finds a harmless module.
"""

import math
from pathlib import Path

from ner.config import ROOT
from ner.errors import UserError

NUMBERS = ("precision", "recall", "f1", "support")


def score(gold: list[list[str]], predicted: list[list[str]]) -> dict:
    """Strict IOB2 scores by seqeval of sentences' tags: an entity counts when type, start and end are right.

    Returns {"micro": {"precision", "recall", "f1", "support"}, "macro": {…}, "weighted": {…}, "types": {type: {…}},
    "accuracy"}: numbers between 0 and 1, supports in gold entities, types sorted. Raises ValueError on other lengths.
    """
    from seqeval.metrics.v1 import classification_report
    from seqeval.scheme import IOB2

    if [len(tags) for tags in gold] != [len(tags) for tags in predicted]:
        raise ValueError("gold and predicted tags differ in number")
    pairs = [pair for tags in zip(gold, predicted) for pair in zip(*tags)]
    accuracy = sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
    none = dict.fromkeys(NUMBERS[:3], 0.0) | {"support": 0}
    if not any(tag.startswith("B-") for pair in pairs for tag in pair):  # seqeval divides by their number
        return {"micro": none, "macro": dict(none), "weighted": dict(none), "types": {}, "accuracy": accuracy}
    report = classification_report(gold, predicted, scheme=IOB2, output_dict=True, zero_division=0)
    plain = {
        name: {number: float(row["f1-score" if number == "f1" else number]) for number in NUMBERS[:3]}
        | {"support": int(row["support"])}
        for name, row in report.items()
    }  # fmt: skip
    averages = {name: plain.pop(f"{name} avg") for name in ("micro", "macro", "weighted")}
    return averages | {"types": plain, "accuracy": accuracy}


def score_sentences(tagger, sentences: list, devices=None) -> tuple[dict, list[list[str]], float]:
    """Scores of a tagger on sentences, the tags it predicts, and its mean loss per unit.

    With several `devices` (an Accelerator) each process tags a share; all get the same result.
    """
    rank, ranks = (devices.process_index, devices.num_processes) if devices else (0, 1)
    mine, number = range(rank, len(sentences), ranks), {label: index for index, label in enumerate(tagger.labels)}
    log_probs = tagger.log_probs([sentences[index].chars for index in mine])
    found = []
    for index, rows, (tags, _) in zip(mine, log_probs, tagger.decoded(log_probs)):
        known = [(row, number[tag]) for row, tag in zip(rows, sentences[index].tags) if tag in number]
        found.append((index, tags, -math.fsum(float(row[label]) for row, label in known)))
    if ranks > 1:
        from accelerate.utils import gather_object

        found = sorted(gather_object(found))
    predicted = [tags for _, tags, _ in found]
    units = sum(len(tags) for tags in predicted)
    return (
        score([sentence.tags for sentence in sentences], predicted),
        predicted,
        math.fsum(loss for *_, loss in found) / max(1, units),
    )


def newest_run(output: str | Path = "output") -> Path:
    """The newest finished run under `output` (where it is not here, beside this file), or the newest with a model.

    Raises UserError where there is none.
    """
    folder = Path(output) if Path(output).is_dir() else ROOT / output
    for marks in (("*/test.json", "*/finished.json"), ("*/model/ner.json",)):
        found = [(path.stat().st_mtime_ns, folder / path.relative_to(folder).parts[0])
                 for mark in marks for path in folder.glob(mark)]  # fmt: skip
        if whole := [(when, run) for when, run in found if (run / "model").is_dir()]:
            return max(whole)[1]
    raise UserError(f"{folder}: holds no finished run; train one with `python main.py`, or name one with --run")


def table(scores: dict) -> str:
    """The scores as an aligned text table, a line a type and a line an average."""
    rows = list(scores["types"].items()) + [(name, scores[name]) for name in ("micro", "macro", "weighted")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  precision    recall        F1   support"]
    for name, row in rows:
        lines.append(
            f"{name:{width}}" + "".join(f"  {row[key]:8.6f}" for key in NUMBERS[:3]) + f"  {row['support']:8d}"
        )
    return "\n".join(lines + [f"accuracy of the tags: {scores['accuracy']:.6f}"])

