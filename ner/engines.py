"""What computes when tagging: PyTorch or ONNX Runtime, behind one call. Padded token ids in, logits out.

PyTorch runs every model on every device, in the precision asked for. ONNX Runtime runs the file that an export left in
the model's folder, on a CPU, starts without importing torch and multiplies in 8 bits. A test compares the two.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """One loaded model. `on_cpu`: batches are kept small enough for the caches, and `threads` of them run at a time."""

    on_cpu: bool
    threads: int

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return logits, float32 [batch, length, labels], of token ids and attention mask, int64 [batch, length]."""

    def workers(self) -> contextlib.AbstractContextManager[Callable[..., Iterator]]:
        """Open a `map` that calls a function on several batches at a time and gives the results in order."""


class TorchEngine:
    """A PyTorch model on whatever device it is, in whatever precision it has. It may be one that is being trained."""

    def __init__(self, model: "torch.nn.Module"):
        self.model = model

    @property
    def device(self) -> "torch.device":
        return next(self.model.parameters()).device

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def threads(self) -> int:
        import torch

        return torch.get_num_threads() if self.on_cpu else 1

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            output = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
            return output.logits.float().cpu().numpy()

    @contextlib.contextmanager
    def workers(self) -> Iterator[Callable[..., Iterator]]:
        """Give whole batches to as many threads as torch has: less waiting than with all of them in each product."""
        import torch

        was_training, threads = self.model.training, self.threads
        self.model.eval()
        try:
            if threads == 1:
                yield map
                return
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool.map
        finally:
            self.model.train(was_training)
            if threads > 1:
                torch.set_num_threads(threads)
