"""Dropout whose masks are slices of one drawn beforehand: on a CPU drawing a mask costs as much as a matrix product."""

from typing import Any

import torch
from torch import nn

PREDRAWN_NUMBERS = 1 << 22  # 4 million: 16 MB in float32, over which offsets repeat seldom


class PredrawnDropout(nn.Module):
    """nn.Dropout that takes its masks from one drawn beforehand, at an offset that torch's generator draws."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        keep = torch.rand(PREDRAWN_NUMBERS, generator=torch.Generator().manual_seed(0)) >= p
        self.masks: torch.Tensor  # [PREDRAWN_NUMBERS], 0 or 1 / (1 - p)
        self.register_buffer("masks", keep.float() / (1 - p), persistent=False)

    def draw_mask(self, x: torch.Tensor) -> torch.Tensor:
        """Return a mask of x's shape, 0 or 1 / (1 - p); a view of the predrawn one where that is large enough."""
        count, longest = x.numel(), len(self.masks) // 2
        sizes = [min(longest, count - begin) for begin in range(0, count, longest)]
        offsets = torch.randint(len(self.masks) - longest, (len(sizes),)).tolist()
        slices = [self.masks[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        return (slices[0] if len(slices) == 1 else torch.cat(slices)).view(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with dropout while training, else x."""
        return x * self.draw_mask(x) if self.training else x


def dropout_mask(dropout: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Return the mask by which a dropout module multiplies x; None where it does nothing."""
    if not dropout.training or dropout.p == 0:
        return None
    if isinstance(dropout, PredrawnDropout):
        return dropout.draw_mask(x)
    return dropout(torch.ones_like(x))


def replace_dropouts(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a PredrawnDropout in place of each nn.Dropout of a model, one for each probability."""
    replacements: dict[float, PredrawnDropout] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and child.p > 0:
                if child.p not in replacements:
                    replacements[child.p] = PredrawnDropout(child.p).to(dtype).train(child.training)
                setattr(module, name, replacements[child.p])
    if replacements:
        _use_modules_in_attention(model)


def _use_modules_in_attention(model: nn.Module) -> None:
    """Have transformers' eager attention take its dropout from the module's PredrawnDropout, not the functional one."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("eager_predrawn", _eager_attention)
    AttentionMaskInterface.register("eager_predrawn", eager_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        has_dropout = isinstance(getattr(module, "dropout", None), PredrawnDropout) and hasattr(module, "scaling")
        if has_dropout and getattr(config, "_attn_implementation", None) == "eager":
            config._attn_implementation = "eager_predrawn"


def _eager_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what transformers' eager attention does, with dropout from `module.dropout`.

    query, key, value [batch, heads, length, head_size]; returns [batch, length, heads, head_size] and probabilities.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # [batch, heads, length, length]
    if attention_mask is not None:
        scores = scores + attention_mask
    attention_probs = nn.functional.softmax(scores, dim=-1)
    if dropout > 0:
        attention_probs = module.dropout(attention_probs)
    return torch.matmul(attention_probs, value).transpose(1, 2).contiguous(), attention_probs
