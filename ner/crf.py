"""A linear-chain CRF on a model's logits (Lafferty et al. 2001; for tagging Lample et al. 2016, section 2.2).

It scores the step from one label to the next beside the logits of each label. Steps that IOB2 forbids are fixed, the
others are learned. There are no scores for the first and the last label: a window need not be a whole sentence, and
its first label may be an I. Where a sentence begins is known when decoding (ner/decoding.py finds the best path), and
there an I is forbidden.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ner import decoding
from ner.errors import UserError

FILE = "crf.safetensors"
IGNORED = -100
FORBIDDEN = -1e4  # finite, so that a gradient of it is 0 and not undefined; exp of it is 0 in float32


class Crf(nn.Module):
    """The transition scores between `labels`. `transitions`: float32 [labels, labels], from the row to the column."""

    forbidden: torch.Tensor

    def __init__(self, labels: list[str]):
        super().__init__()
        self.labels = list(labels)
        self.transitions = nn.Parameter(torch.zeros(len(labels), len(labels)))
        self.register_buffer("forbidden", torch.from_numpy(~decoding.allowed_steps(labels)), persistent=False)

    def steps(self) -> torch.Tensor:
        """Return the transition scores, float32 [labels, labels], with those of forbidden steps fixed."""
        return self.transitions.masked_fill(self.forbidden, FORBIDDEN)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the negative log likelihood of the labels, in float32, summed over all windows.

        logits: float [windows, length, labels]. labels: int64 [windows, length]; positions of label -100 (padding,
        special tokens, further tokens of a word) are left out, and those before and after them are neighbours.
        """
        emissions, gold, real = _without_ignored(logits.float(), labels)
        steps = self.steps()
        emitted = emissions.gather(2, gold[:, :, None]).squeeze(2)
        stepped = steps[gold[:, :-1], gold[:, 1:]]
        gold_score = emitted[real].sum() + stepped[real[:, 1:]].sum()
        return _log_partition(emissions, steps, real).sum() - gold_score

    def numpy(self) -> np.ndarray:
        """Return the transition scores as decoding.decode takes them, float32 [labels, labels]."""
        return self.steps().detach().cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write the transition scores to crf.safetensors in a model's folder."""
        safetensors.torch.save_file({"transitions": self.transitions.detach().cpu().contiguous()}, folder / FILE)


def load(folder: Path, labels: list[str]) -> Crf:
    """Return the CRF of a saved model with these labels. Raises UserError where its file is missing or damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder}: {FILE} is missing, so the model is not whole; train again or restore it")
    try:
        transitions = safetensors.torch.load_file(path)["transitions"]
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read, the file is damaged ({error})") from None
    crf = Crf(labels)
    if transitions.shape != crf.transitions.shape or not transitions.isfinite().all():
        raise UserError(
            f"{path}: expected finite scores of {len(labels)} x {len(labels)} labels, as ner.json names them, found "
            f"{' x '.join(map(str, transitions.shape))}; they are not of one model"
        )
    crf.transitions.data.copy_(transitions)
    return crf


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
    reached = emissions[:, 0]  # [windows, labels]: the log of the sum over the paths to each label
    for t in range(1, emissions.shape[1]):
        following = torch.logsumexp(reached[:, :, None] + steps, dim=1) + emissions[:, t]
        reached = following.where(real[:, t, None], reached)
    return torch.logsumexp(reached, dim=1).where(real[:, 0], 0)
