"""Logits and gold labels → the loss: cross entropy, smoothed or focal; a CRF brings its own (ner/crf.py).

Every loss is a sum over labelled positions, so that a step may be shared out between passes and processes and divided
by the number of its labelled positions.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from ner.batches import IGNORED

FOCUS = 2.0  # the exponent gamma of the focal loss, the best one of Lin et al. 2017

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, labels) -> the summed loss, a float32 scalar


def loss_function(kind: str = "cross_entropy", label_smoothing: float = 0.0) -> Loss:
    """Return the loss that config.yaml names: `kind` "cross_entropy" or "focal", with or without smoothed labels."""
    return functools.partial(token_loss, focal=kind == "focal", label_smoothing=label_smoothing)


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, focal: bool = False, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross entropy in float32, summed over the positions whose label is not -100.

    logits: float [windows, length, labels]. labels: int64 [windows, length]. label_smoothing: the share of a label's
    weight that is spread evenly over all labels (Szegedy et al. 2016, section 7). focal: positions count by
    (1 - p)^2, p being the probability of the gold label, so that those that are easy count little (Lin et al. 2017).
    """
    keep = labels != IGNORED
    labelled, gold = logits[keep].float(), labels[keep]
    if not focal:
        return functional.cross_entropy(labelled, gold, reduction="sum", label_smoothing=label_smoothing)
    losses = functional.cross_entropy(labelled, gold, reduction="none", label_smoothing=label_smoothing)
    probability = labelled.softmax(dim=-1).gather(1, gold[:, None]).squeeze(1)
    return ((1 - probability) ** FOCUS * losses).sum()
