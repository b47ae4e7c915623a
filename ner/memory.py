"""A step that does not fit the device's memory: how many windows go through the model at once, then."""

import logging

from ner.errors import UserError
from ner.windows import Window

log = logging.getLogger("__main__")


def smaller_batch(error: RuntimeError, windows: list[Window], micro_batch: int) -> int:
    """Return half of `micro_batch`, of which some in `windows` did not fit; log it.

    Raises `error` again where it is not about memory, and UserError where a single window does not fit.
    """
    import torch

    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    longest = max(len(window.ids) for window in windows)
    if micro_batch == 1:
        raise UserError(
            f"out of memory on one window of {longest} tokens; lower max_length, or take a smaller encoder"
        ) from None
    log.warning(
        "out of memory on a batch of %d windows x %d tokens: from here on a batch is %d windows, and the "
        "accumulation doubles, which computes the same",
        min(micro_batch, len(windows)),
        longest,
        micro_batch // 2,
    )
    return micro_batch // 2
