"""The layers of BERT and its kin on packed tokens: no padding, and query, key and value as one product.

Padding in a linear layer, norm or activation is computed for nothing, and one product reads its input once where three
read it three times.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ner.kernels.attention import Attention
from ner.kernels.dropout import dropout_mask
from ner.kernels.lora import LinearArguments, join_linears
from ner.kernels.packing import PackedBatch

KINDS = {f"{kind}Encoder" for kind in ("Bert", "Camembert", "Electra", "Ernie", "Roberta", "XLMRoberta")}


@dataclass(slots=True)
class LayerProducts:
    """The four products of a layer."""

    qkv: LinearArguments  # hidden → 3 × hidden
    attention_out: LinearArguments  # hidden → hidden
    up: LinearArguments  # hidden → intermediate
    down: LinearArguments  # intermediate → hidden


class PackedLayers:
    """The forward pass of a transformers encoder of KINDS, on packed tokens.

    Weights are read from the model at each call, so that whatever happens to them counts at once. Unsupported layers
    and arguments fall back to transformers.
    """

    def __init__(self, encoder: Any):
        self.encoder = encoder
        self.transformers_forward = encoder.forward

    @staticmethod
    def supports(module: Any) -> bool:
        """Return whether a module is an encoder that this class computes the same as transformers."""
        kind = type(module)
        if kind.__name__ not in KINDS or not kind.__module__.startswith("transformers.models."):
            return False
        return not any(
            layer.is_decoder or layer.add_cross_attention or layer.chunk_size_feed_forward for layer in module.layer
        )

    def __call__(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: Any = None, **others: Any
    ) -> Any:
        """Return what the encoder's forward does: hidden [sentences, length, hidden] → an output of the same shape."""
        plain_call = all(value is None or value is False for value in others.values())
        plain_call = plain_call and (attention_mask is None or attention_mask.ndim == 4)
        products = self._products() if plain_call else None
        if products is None:
            return self.transformers_forward(hidden, attention_mask, position_ids=position_ids, **others)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        heads = self.encoder.layer[0].attention.self.num_attention_heads
        packed = PackedBatch(_real_tokens(hidden, attention_mask), heads)
        x = packed.pack(hidden)  # [rows, hidden], through all layers
        for layer, layer_products in zip(self.encoder.layer, products, strict=True):
            x = _layer_forward(x, layer, layer_products, packed)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=packed.unpack(x))

    def _products(self) -> list[LayerProducts] | None:
        """Return the products of all layers; None where one is not of the plain kind or is being hooked."""
        products = []
        for layer in self.encoder.layer:
            attention = layer.attention.self
            if layer._forward_hooks or attention._forward_hooks or layer.gradient_checkpointing:
                return None
            groups = (
                [attention.query, attention.key, attention.value],
                [layer.attention.output.dense],
                [layer.intermediate.dense],
                [layer.output.dense],
            )
            joined = [join_linears(linears) for linears in groups]
            plain = [arguments for arguments in joined if arguments is not None]
            if len(plain) < len(groups):
                return None
            products.append(LayerProducts(*plain))
        return products


def _real_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return bool [sentences, length] from transformers' mask, which is boolean or a number added to the scores."""
    if attention_mask is None:
        return torch.ones(hidden.shape[:2], dtype=torch.bool)
    seen = attention_mask[:, 0, 0].expand(hidden.shape[:2])
    return seen if seen.dtype == torch.bool else seen == 0


def _layer_forward(x: torch.Tensor, layer: Any, products: LayerProducts, packed: PackedBatch) -> torch.Tensor:
    """Return a layer's output for x [rows, hidden]."""
    attention = layer.attention.self
    qkv = products.qkv.product(x)  # [rows, 3 × hidden]
    context = Attention.apply(qkv, packed, attention.scaling, attention.dropout)  # [rows, hidden]
    x = _add_and_norm(x, products.attention_out.product(context), layer.attention.output)
    inner = layer.intermediate.intermediate_act_fn(products.up.product(x))  # [rows, intermediate]
    return _add_and_norm(x, products.down.product(inner), layer.output)


def _add_and_norm(x: torch.Tensor, y: torch.Tensor, output: Any) -> torch.Tensor:
    """Return LayerNorm(x + dropout(y)), [rows, hidden] all, with the norm and dropout of a BERT output module."""
    norm, mask = output.LayerNorm, dropout_mask(output.dropout, y)
    x = x + y if mask is None else torch.addcmul(x, y, mask)
    return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
