"""The fast gradient method (Miyato et al. 2017): a second backward pass on embeddings moved the way that hurts most.

The embeddings' output is moved, not their weights, so it works where these are frozen, as under LoRA, and with every
encoder. It costs about one more pass through the model.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class FastGradient:
    """Moves the output of a model's token embeddings along the gradient of its last backward pass.

    Each window is moved by the length `epsilon`. Usage:

        optimizer.backward(loss(batch))
        with adversary.moved():
            optimizer.backward(loss(batch))    # adds its gradient to the first one's
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", epsilon: float):
        self.epsilon = epsilon
        self._embedded: torch.Tensor | None = None  # of the last forward pass; its gradient is kept
        self._shift: torch.Tensor | None = None
        self._hook = model.get_input_embeddings().register_forward_hook(self._on_embedding)

    @contextlib.contextmanager
    def moved(self) -> Iterator[None]:
        """Have the model compute on moved embeddings, for the batch that went through it last, backwards too."""
        embedded = self._embedded
        if embedded is None or embedded.grad is None:
            raise RuntimeError("there was no backward pass through the embeddings")
        gradient = embedded.grad.float()
        length = gradient.flatten(1).norm(dim=1)[:, None, None]
        shift = self.epsilon * gradient / length
        finite = shift.where(shift.isfinite(), 0)  # a gradient that is zero or overflowed moves nothing
        self._shift = finite.to(embedded.dtype)
        try:
            yield
        finally:
            self._shift = self._embedded = None

    def close(self) -> None:
        """Leave the model alone from here on."""
        self._hook.remove()

    def _on_embedding(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Keep the output and its gradient, or move it; only while training."""
        if not module.training or not torch.is_grad_enabled():
            return None
        if self._shift is not None:
            return output + self._shift
        if output.requires_grad:
            output.retain_grad()
        else:
            output = output.detach().requires_grad_()
        self._embedded = output
        return output
