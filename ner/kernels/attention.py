"""Scaled dot-product attention over the blocks of a PackedBatch, with its gradient.

A block is small enough for its attention probabilities to stay in the caches between their computation and their use.
The gradient is written out, as autograd would keep the probabilities after dropout for every layer too.
"""

from typing import Any

import torch
from torch import nn

from ner.kernels.dropout import dropout_mask
from ner.kernels.packing import Block, PackedBatch


def attend(
    qkv: torch.Tensor, packed: PackedBatch, scale: float, dropout: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Compute attention for query, key and value side by side: qkv [rows, 3 × hidden] → [rows, hidden].

    Also returns what the gradient needs: query, key and value by head [3, places, head_size], and of each block the
    attention probabilities [sequences, length, length] and the dropout mask applied to them (None without dropout).
    """
    head_size = qkv.shape[1] // (3 * packed.heads)
    by_head = qkv.view(-1, head_size).index_select(0, packed.qkv_by_head).view(3, -1, head_size)
    out = torch.empty_like(by_head[0])  # [places, head_size]
    probabilities: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    # A softmax in bfloat16 is less exact and takes twice as long as one in float32 with a conversion after it.
    softmax_type = torch.promote_types(qkv.dtype, torch.float32)
    for block in packed.blocks:
        query, key, value = _of_block(by_head, block)  # [sequences, length, head_size] each
        bias = block.bias.to(qkv.dtype).expand(-1, block.length, -1)  # [sequences, length, length]
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)  # [sequences, length, length]
        attention_probs = torch.softmax(scores, -1, dtype=softmax_type).to(qkv.dtype)
        mask = None if dropout is None else dropout_mask(dropout, attention_probs)
        dropped = attention_probs if mask is None else attention_probs * mask
        torch.bmm(dropped, value, out=out[block.begin : block.end].view(value.shape))
        probabilities.append(attention_probs)
        masks.append(mask)
    return out.index_select(0, packed.by_row).view(len(qkv), -1), by_head, probabilities, masks


def _of_block(by_head: torch.Tensor, block: Block) -> torch.Tensor:
    """Return a block's query, key and value: [3, sequences, length, head_size], a view."""
    return by_head[:, block.begin : block.end].unflatten(1, (block.sequences, block.length))


class Attention(torch.autograd.Function):
    """`attend` with its gradient: (qkv [rows, 3 × hidden], PackedBatch, scale, dropout) → [rows, hidden]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, qkv: torch.Tensor, packed: PackedBatch, scale: float, dropout: nn.Module | None
    ) -> torch.Tensor:
        """Return the context [rows, hidden] and keep what its gradient needs."""
        out, by_head, probabilities, masks = attend(qkv, packed, scale, dropout)
        ctx.save_for_backward(by_head, *probabilities, *masks)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # type: ignore[override]
        """Return the gradient of qkv [rows, 3 × hidden]."""
        packed = ctx.packed
        by_head, *saved = ctx.saved_tensors
        probabilities, masks = saved[: len(packed.blocks)], saved[len(packed.blocks) :]
        dout = dout.reshape(-1, by_head.shape[-1]).index_select(0, packed.by_head)  # [places, head_size]
        dby_head = torch.empty_like(by_head)  # [3, places, head_size]
        for block, attention_probs, mask in zip(packed.blocks, probabilities, masks, strict=True):
            query, key, value = _of_block(by_head, block)
            dquery, dkey, dvalue = _of_block(dby_head, block)
            dblock = dout[block.begin : block.end].view(value.shape)  # [sequences, length, head_size]
            dprobs = torch.bmm(dblock, value.transpose(1, 2))  # [sequences, length, length], as are dscores
            dropped = attention_probs
            if mask is not None:
                dprobs.mul_(mask)
                dropped = attention_probs * mask
            dscores = torch._softmax_backward_data(dprobs, attention_probs, -1, attention_probs.dtype).mul_(ctx.scale)
            torch.bmm(dscores, key, out=dquery)
            torch.bmm(dscores.transpose(1, 2), query, out=dkey)
            torch.bmm(dropped.transpose(1, 2), dblock, out=dvalue)
        dqkv = dby_head.flatten(0, 1).index_select(0, packed.qkv_by_row).view(packed.rows, -1)
        dqkv[len(packed.tokens) :] = 0  # spare rows have no place by head, so the map gave them another row's gradient
        return dqkv, None, None, None
