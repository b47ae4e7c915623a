"""What a run that has ended holds: its scores and predictions on test, and which of its epochs is the best."""

import json
import logging
from pathlib import Path
from typing import Any

from ner.corpus import Sentence
from ner.files import write_text

log = logging.getLogger("__main__")
TEST, PREDICTIONS, FINISHED = "test.json", "predictions.jsonl", "finished.json"


def write_test(run: Path, test: list[Sentence], predicted: list[list[str]], scores: dict[str, Any]) -> None:
    """Write the scores of the test sentences, and the tags that were predicted for them. Raises OSError."""
    rows = [
        {"chars": sentence.units, "gold": sentence.tags, "predicted": tags}
        for sentence, tags in zip(test, predicted, strict=True)
    ]
    _write_lines(run / PREDICTIONS, rows)
    _write_lines(run / TEST, [scores])


def write_finished(run: Path, best_epoch: int | None, epochs: int) -> None:
    """Write that the run has ended, which of its epochs is the best, and how many it had. Raises OSError."""
    _write_lines(run / FINISHED, [{"best_epoch": best_epoch, "epochs": epochs}])


def discard(run: Path) -> None:
    """Delete the scores of an earlier end of the run, which is to end otherwise now."""
    names = [name for name in (TEST, PREDICTIONS, FINISHED) if (run / name).exists()]
    for name in names:
        (run / name).unlink()
    if names:
        log.info("deleted, as the run goes on: %s", ", ".join(names))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by JSON, a line a row."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
