"""The third teacher: models that were fine-tuned on the gold tags, and the soft labels they give all the text."""

from pathlib import Path

import numpy as np
from lac import of_one_length, posteriors, top

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
            of_models = [marginals(tagger, [pieces[i] for i in batch], self.tags) for tagger in self.taggers]
            for i, of_piece in zip(batch, zip(*of_models, strict=True), strict=True):
                labels[i] = top(sum(of_piece))
        return labels


def marginals(tagger: Tagger, pieces: list[str], tags: list[str]) -> list[np.ndarray]:
    """Return a model's probabilities of these tags for each piece: float32 [characters, tags].

    A CRF's are those of a tag over all sequences of tags."""
    log_probs = tagger.log_probs([list(piece) for piece in pieces])
    columns = [tagger.labels.index(tag) for tag in tags]
    if tagger.transitions is None:
        return [np.exp(rows[:, columns]) for rows in log_probs]
    steps = Crf(tagger.labels, tagger.transitions).steps().detach().numpy()
    result: list = [None] * len(pieces)
    for indices in of_one_length(pieces):
        probability = posteriors(np.stack([log_probs[i] for i in indices]), steps)[..., columns]
        for i, rows in zip(indices, probability, strict=True):
            result[i] = rows
    return result
