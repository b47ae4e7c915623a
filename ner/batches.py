"""Windows → padded batches: shuffled for training, longest first for tagging.

Windows of like length share a batch, so little padding is computed. Batch lengths are multiples of LENGTH_STEP because
matrix products are compiled, and cached, for each length anew.
"""

from random import Random
from typing import TYPE_CHECKING

import numpy as np

from ner.windows import Window

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
LENGTH_STEP = 8  # tokens
POOL = 50  # batches whose windows are sorted by length together: little padding, and still a different mix each epoch


def shuffled(windows: list[Window], batch_size: int, seed: int) -> list[list[Window]]:
    """Return all windows in batches of `batch_size`, mixed and ordered by `seed`: the same seed, the same batches."""
    random = Random(seed)
    mixed = random.sample(windows, len(windows))
    batches = []
    for start in range(0, len(mixed), POOL * batch_size):
        pool = sorted(mixed[start : start + POOL * batch_size], key=_longest_first)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    random.shuffle(batches)
    return batches


def by_length(windows: list[Window], batch_size: int, max_tokens: int | None = None) -> list[list[Window]]:
    """Return all windows in batches of at most `batch_size`, the longest windows first.

    With `max_tokens` no batch of several windows holds more tokens than that, padding included.
    """
    ordered = sorted(windows, key=_longest_first)
    batches, start = [], 0
    while start < len(ordered):
        size = batch_size
        if max_tokens:
            size = min(size, max(1, max_tokens // _round_up(len(ordered[start].ids))))
        batches.append(ordered[start : start + size])
        start += size
    return batches


def collate(batch: list[Window], pad_id: int, gold: list[list[int]] | None) -> dict[str, "torch.Tensor"]:
    """Return input_ids, attention_mask and, with `gold`, labels: int64 tensors [batch, length].

    `gold` holds the label indices of each sentence. A label stands at the first token of each unit that a window owns;
    all other places are IGNORED.
    """
    import torch

    ids, mask = padded(batch, pad_id)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if gold is not None:
        labels = np.full(ids.shape, IGNORED, np.int64)
        for row, window in enumerate(batch):
            labels[row, window.own_tokens] = gold[window.sentence][window.own_start : window.own_end]
        arrays["labels"] = labels
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded(batch: list[Window], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and attention mask of a batch, int64 [batch, length], without importing torch.

    The length is that of the longest window, rounded up to LENGTH_STEP where the model has room for that.
    """
    longest = max(len(window.ids) for window in batch)
    rounded = _round_up(longest)
    shape = len(batch), rounded if rounded <= batch[0].max_length else longest
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = window.ids
        mask[row, : len(window.ids)] = 1
    return ids, mask


def _longest_first(window: Window) -> int:
    return -len(window.ids)


def _round_up(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
