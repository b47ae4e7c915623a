"""Windows → padded batches."""

from random import Random

import numpy as np

from ner.windows import Window

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


LENGTHS = 8  # batches have lengths of this step: matrix products are compiled, and cached, for each length anew


POOL = 50  # batches whose windows are sorted by length together: little padding, and still a different mix each epoch


def batches(windows: list[Window], batch_size: int, seed: int | None, tokens: int | None = None) -> list[list[Window]]:
    """Windows of like length together, in an order drawn from `seed`; None: strictly by length, longest first, and then
    with `tokens` no batch of several windows has more of them, padding counted."""
    def length(window):
        return -len(window.ids)

    if seed is None:
        ordered, made, done = sorted(windows, key=length), [], 0
        while done < len(ordered):
            fitting = max(1, tokens // _rounded(len(ordered[done].ids))) if tokens else batch_size
            made.append(ordered[done:done + min(batch_size, fitting)])
            done += len(made[-1])
        return made
    draw = Random(seed)
    shuffled = draw.sample(windows, len(windows))
    made = []
    for pool in range(0, len(shuffled), POOL * batch_size):
        ordered = sorted(shuffled[pool:pool + POOL * batch_size], key=length)
        made += [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]
    draw.shuffle(made)
    return made


def _rounded(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


def collate(batch: list[Window], pad_id: int, gold: list[list[int]] | None) -> dict:
    """input_ids, attention_mask and, with `gold` (label indices of each sentence), labels: int64 tensors [B, L].

    L is the longest window of the batch, rounded up to LENGTHS where the model has room for that. labels is -100 but at
    the first token of each unit that the window owns.
    """
    import torch

    ids, mask = padded(batch, pad_id)
    arrays = {"input_ids": ids, "attention_mask": mask}
    if gold is not None:
        labels = arrays["labels"] = np.full(ids.shape, IGNORED, np.int64)
        for row, window in enumerate(batch):
            own = window.first[window.own_start - window.start:window.own_end - window.start]
            labels[row, own] = gold[window.sentence][window.own_start:window.own_end]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padded(batch: list[Window], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and attention mask of a batch, int64 [B, L], as collate has them, without torch."""
    longest = max(len(window.ids) for window in batch)
    rounded = _rounded(longest)
    shape = len(batch), rounded if rounded <= batch[0].limit else longest
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(batch):
        ids[row, :len(window.ids)] = window.ids
        mask[row, :len(window.ids)] = 1
    return ids, mask
