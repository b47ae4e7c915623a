"""A linear-chain CRF on a model's logits (Lafferty et al. 2001; for tagging Lample et al. 2016, section 2.2).

It scores the step from one label to the next beside the logits of each label. Steps that IOB2 forbids are fixed, the
others are learned. There are no scores for the first and the last label: a window need not be a whole sentence, and
its first label may be an I. Where a sentence begins is known when decoding (ner/decoding.py finds the best path), and
there an I is forbidden.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ner import decoding
from ner.batches import IGNORED

SENTENCES_AT_ONCE = 64
FORBIDDEN = -1e4  # finite, so that a gradient of it is 0 and not undefined; exp of it is 0 in float32


class Crf(nn.Module):
    """The transition scores between `labels`. `transitions`: float32 [labels, labels], from the row to the column."""

    forbidden: torch.Tensor

    def __init__(self, labels: list[str], transitions: np.ndarray | None = None):
        super().__init__()
        start = torch.zeros(len(labels), len(labels)) if transitions is None else torch.from_numpy(transitions.copy())
        self.transitions = nn.Parameter(start)
        self.register_buffer("forbidden", torch.from_numpy(~decoding.allowed_steps(labels)), persistent=False)

    def steps(self) -> torch.Tensor:
        """Return the transition scores, float32 [labels, labels], with those of forbidden steps fixed."""
        return self.transitions.masked_fill(self.forbidden, FORBIDDEN)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the negative log likelihood of the labels, a float32 scalar, summed over all windows."""
        return self.window_losses(logits, labels).sum()

    def window_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the negative log likelihood of each window's labels, float32 [windows].

        logits: float [windows, length, labels]. labels: int64 [windows, length]; positions of label -100 (padding,
        special tokens, further tokens of a word) are left out, and those before and after them are neighbours.
        """
        emissions, gold, real = _without_ignored(logits.float(), labels)
        steps = self.steps()
        emitted = emissions.gather(2, gold[:, :, None]).squeeze(2).where(real, 0)
        stepped = steps[gold[:, :-1], gold[:, 1:]].where(real[:, 1:], 0)
        return _log_partition(emissions, steps, real) - emitted.sum(1) - stepped.sum(1)

    def numpy(self) -> np.ndarray:
        """Return the transition scores as ner.decoding and ner.meta take them, float32 [labels, labels]."""
        return self.transitions.detach().cpu().numpy().copy()


@torch.no_grad()
def sentence_losses(
    scores: list[np.ndarray], gold: list[list[int]], labels: list[str], transitions: np.ndarray
) -> list[float]:
    """Return the negative log likelihood of each sentence's label indices, by scores float32 [n, labels]."""
    crf, losses = Crf(labels, transitions), [0.0] * len(scores)
    order = sorted((index for index, tags in enumerate(gold) if tags), key=lambda index: len(gold[index]))
    for start in range(0, len(order), SENTENCES_AT_ONCE):
        chosen = order[start : start + SENTENCES_AT_ONCE]  # of like length, so that there is little padding
        padded = [
            pad_sequence([torch.as_tensor(part[index]) for index in chosen], batch_first=True, padding_value=IGNORED)
            for part in (scores, gold)
        ]
        for index, loss in zip(chosen, crf.window_losses(*padded).tolist(), strict=True):
            losses[index] = loss
    return losses


def _without_ignored(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [windows, n, labels] and labels [windows, n] moved together, and bool [windows, n]: which are real.

    n is the most labelled positions of a window, at least 1. What is not real comes last and has label 0.
    """
    keep = labels != IGNORED
    order = keep.byte().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(keep.sum(1).max()))]
    real = keep.gather(1, order)
    gold = labels.gather(1, order).where(real, 0)
    return logits.gather(1, order[:, :, None].expand(-1, -1, logits.shape[2])), gold, real


def _log_partition(emissions: torch.Tensor, steps: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the log of the sum over all paths of exp(emissions + steps), float32 [windows]; 0 where nothing is real.

    The forward algorithm, in time linear in the length. emissions: float32 [windows, n, labels]. steps: float32
    [labels, labels]. real: bool [windows, n], real positions first.
    """
    log_alpha = emissions[:, 0]  # [windows, labels]: the log of the sum over the paths to each label
    for t in range(1, emissions.shape[1]):
        following = torch.logsumexp(log_alpha[:, :, None] + steps, dim=1) + emissions[:, t]
        log_alpha = following.where(real[:, t, None], log_alpha)
    return torch.logsumexp(log_alpha, dim=1).where(real[:, 0], 0)
