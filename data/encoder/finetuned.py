"""The third teacher: models that were fine-tuned on the gold tags, and the soft labels they give all the text."""

from pathlib import Path

import numpy as np
from lac import posteriors, top

from ner.crf import Crf
from ner.errors import UserError
from ner.tagging import Tagger

PIECES = 2048  # of which the probabilities are held in memory together


class FineTuned:
    """Finished runs of main.py as one teacher: the mean of their tag probabilities."""

    def __init__(self, folders: list[Path], tags: list[str], device: str = "cpu"):
        """tags: the gold tags, by whose numbers the text is labelled. Raises UserError where a run has others."""
        self.tags, self.taggers = tags, [Tagger.of(folder, device) for folder in folders]
        for folder, tagger in zip(folders, self.taggers, strict=True):
            if sorted(tagger.labels) != sorted(tags):
                raise UserError(f"{folder}: tags with {tagger.labels}, expected those of --gold; train it on that file")

    def label(self, pieces: list[str]) -> list[np.ndarray]:
        """Return for each piece uint8 [characters, TOP, 2]: its likeliest tags and their probabilities in 255ths."""
        by_length = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        labels: list = [None] * len(pieces)
        for begin in range(0, len(pieces), PIECES):
            batch = by_length[begin : begin + PIECES]
            totals = [sum(parts) for parts in zip(*self._probabilities([pieces[i] for i in batch]), strict=True)]
            for i, total in zip(batch, totals, strict=True):
                labels[i] = top(total)
        return labels

    def _probabilities(self, pieces: list[str]) -> list[list[np.ndarray]]:
        """Return each model's probabilities of each piece: float32 [characters, tags]."""
        return [marginals(tagger, pieces, self.tags) for tagger in self.taggers]


def marginals(tagger: Tagger, pieces: list[str], tags: list[str]) -> list[np.ndarray]:
    """Return a model's probabilities of these tags for each piece: float32 [characters, tags].

    A CRF's are those of a tag over all sequences of tags."""
    log_probs = tagger.log_probs([list(piece) for piece in pieces])
    columns = [tagger.labels.index(tag) for tag in tags]
    if tagger.transitions is None:
        return [np.exp(rows[:, columns]) for rows in log_probs]
    steps = Crf(tagger.labels, tagger.transitions).steps().detach().numpy()
    of_length: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        of_length.setdefault(len(piece), []).append(i)
    result: list = [None] * len(pieces)
    for indices in of_length.values():
        probability = posteriors(np.stack([log_probs[i] for i in indices]), steps)[..., columns]
        for i, rows in zip(indices, probability, strict=True):
            result[i] = rows
    return result
