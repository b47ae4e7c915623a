"""Gold tags + predicted tags → scores, by seqeval's strict IOB2."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ner.corpus import Sentence
from ner.decoding import spans
from ner.errors import UserError
from ner.files import whole_folder
from ner.paths import ROOT

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ner.tagging import Tagger

log = logging.getLogger("__main__")
MEASURES = ("precision", "recall", "f1")
AVERAGES = ("micro", "macro", "weighted")
AT_ONCE = 2048  # sentences whose scores are held in memory together


def score(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Return strict IOB2 scores of sentences' tags: an entity counts when type, start and end are right.

    The shape is {"micro": {"precision", "recall", "f1", "support"}, "macro": {…}, "weighted": {…}, "types":
    {type: {…}}, "accuracy"}: numbers between 0 and 1, supports in gold entities, types sorted. Raises ValueError where
    gold and predicted tags differ in number.
    """
    from seqeval.metrics.v1 import classification_report
    from seqeval.scheme import IOB2

    if [len(tags) for tags in gold] != [len(tags) for tags in predicted]:
        raise ValueError("gold and predicted tags differ in number")
    pairs = [pair for tags in zip(gold, predicted, strict=True) for pair in zip(*tags, strict=True)]
    accuracy = sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0
    if not any(tag.startswith("B-") for pair in pairs for tag in pair):  # seqeval divides by the number of entities
        nothing = {name: dict.fromkeys(MEASURES, 0.0) | {"support": 0} for name in AVERAGES}
        return nothing | {"types": {}, "accuracy": accuracy}
    report = classification_report(gold, predicted, scheme=IOB2, output_dict=True, zero_division=0)
    rows = {name: _plain(row) for name, row in report.items()}
    averages = {name: rows.pop(f"{name} avg") for name in AVERAGES}
    return averages | {"types": rows, "accuracy": accuracy}


def _plain(row: dict) -> dict[str, float]:
    """Return a row of seqeval's report in our names, as Python numbers."""
    return {
        "precision": float(row["precision"]),
        "recall": float(row["recall"]),
        "f1": float(row["f1-score"]),
        "support": int(row["support"]),
    }


def clip(tags: list[str], length: int = 49, shortest: int = 2) -> list[str]:
    """Return the first `length` tags without the entities that have fewer than `shortest` of them.

    With its defaults this is the count of models that read 49 characters and know no entity of a single one.
    """
    clipped = ["O"] * min(length, len(tags))
    for _, start, end in spans(tags[:length]):
        if end - start >= shortest:
            clipped[start:end] = tags[start:end]
    return clipped


def score_sentences(
    tagger: "Tagger", sentences: Sequence[Sentence], accelerator: "Accelerator | None" = None
) -> tuple[dict[str, Any], list[list[str]], float]:
    """Return the scores of a tagger on sentences, the tags it predicts, and its mean loss per unit.

    Units whose tag the tagger does not know are left out of the loss, out of its sum and out of its divisor. With an
    accelerator of several processes each tags a share of the sentences, and all get the same result.
    """
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    share = range(rank, len(sentences), processes)
    results: list[tuple[int, list[str], float, int]] = []  # sentence, tags, summed loss, units in that sum
    for start in range(0, len(share), AT_ONCE):
        chunk = share[start : start + AT_ONCE]
        log_probs = tagger.log_probs([sentences[index].units for index in chunk])
        losses = _losses(log_probs, [sentences[index].tags for index in chunk], tagger)
        for index, (tags, _), loss in zip(chunk, tagger.decoded(log_probs), losses, strict=True):
            results.append((index, tags, *loss))
    if processes > 1:
        from accelerate.utils import gather_object

        results = sorted(gather_object(results))
    predicted = [tags for _, tags, _, _ in results]
    scores = score([sentence.tags for sentence in sentences], predicted)
    units = sum(count for _, _, _, count in results)
    return scores, predicted, math.fsum(loss for _, _, loss, _ in results) / max(1, units)


def _losses(log_probs: list[np.ndarray], gold: list[list[str]], tagger: "Tagger") -> list[tuple[float, int]]:
    """Return for each sentence the loss summed over the units whose tag the tagger knows, and their number."""
    label2id = {label: index for index, label in enumerate(tagger.labels)}
    known = [[(unit, label2id[tag]) for unit, tag in enumerate(tags) if tag in label2id] for tags in gold]
    if tagger.transitions is not None:
        from ner.crf import sentence_losses

        rows = [scores[[unit for unit, _ in pairs]] for scores, pairs in zip(log_probs, known, strict=True)]
        losses = sentence_losses(
            rows, [[label for _, label in pairs] for pairs in known], tagger.labels, tagger.transitions
        )
    else:
        losses = [
            -math.fsum(float(scores[unit, label]) for unit, label in pairs)
            for scores, pairs in zip(log_probs, known, strict=True)
        ]
    return [(loss, len(pairs)) for loss, pairs in zip(losses, known, strict=True)]


def newest_run(output: str | Path = "output") -> Path:
    """Return the newest finished run under `output`, or where none has finished the newest with a model.

    `output` is looked for here and then in the project. Raises UserError where it holds no run.
    """
    folder = Path(output) if Path(output).is_dir() else ROOT / output
    for marks in (("*/test.json", "*/finished.json"), ("*/model/ner.json",)):
        runs = [
            (path.stat().st_mtime_ns, folder / path.relative_to(folder).parts[0])
            for mark in marks
            for path in folder.glob(mark)
        ]
        whole = [(when, run) for when, run in runs if whole_folder(run / "model").is_dir()]
        if whole:
            return max(whole)[1]
    raise UserError(f"{folder}: holds no finished run; train one with `python main.py`, or name one with --run")


def table(scores: dict[str, Any]) -> str:
    """Return the scores as an aligned text table, a line a type and a line an average."""
    rows = list(scores["types"].items()) + [(name, scores[name]) for name in AVERAGES]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}  precision    recall        F1   support"]
    for name, row in rows:
        measures = "".join(f"  {row[key]:8.6f}" for key in MEASURES)
        lines.append(f"{name:{width}}{measures}  {row['support']:8d}")
    return "\n".join([*lines, f"accuracy of the tags: {scores['accuracy']:.6f}"])


def log_scores(scores: dict[str, Any]) -> None:
    """Log precision, recall and F1 of each type, and the two averages."""
    for name, row in scores["types"].items():
        log.info("%s类实体，准确率：%f, 召回率: %f, F1: %f", name, row["precision"], row["recall"], row["f1"])
    log.info("Macro-F1: %f", scores["macro"]["f1"])
    log.info("Micro-F1 %f", scores["micro"]["f1"])
    log.info("-" * 20)
