"""What makes a training step fast on a CPU, behind one function. With `kernels: plain` nothing here is used.

    packing      drops the padding, so that linear layers compute on real tokens only
    bert_layers  runs the encoder's layers on these tokens, with query, key and value as one product
    attention    computes attention sentence by sentence, in blocks that fit the caches
    dropout      takes masks from a predrawn one, instead of drawing one for each call
    lora         computes a linear layer and its adapter as one operation with one gradient

Each computes what transformers and peft compute, up to rounding; tests/test_kernels.py compares them. A LoRA step takes
1.3 times as long without the first three, 1.2 times without dropout and 1.5 times without lora, a step of full
fine-tuning 1.4 and 1.15 times (embedded encoder, a CPU with AVX2; `python benchmarks/kernels.py`, whose figures are in
docs/performance.md). Weights live in the compute type and the optimizer works on float32 copies of those that train
(ner/optimizer.py).
"""

import torch
from torch import nn


def attention_implementation(device: torch.device | str, kernels: str = "auto") -> str | None:
    """Return the attention to load a model with; None is transformers' own choice.

    On CPUs the backward pass of PyTorch's fused attention is slower than the eager one.
    """
    if kernels == "plain":
        return None
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device | str, kernels: str = "auto") -> None:
    """Move a model to a device and type, in place, and on a CPU have it compute with the kernels of this package.

    kernels: "auto" or "plain". On a GPU only LoRA layers are fused.
    """
    model.to(device=device, dtype=dtype)
    if kernels == "plain":
        return
    from ner.kernels.lora import fuse_lora_layer, is_lora

    for module in list(model.modules()):
        if is_lora(module):
            fuse_lora_layer(module)
    if torch.device(device).type != "cpu":
        return
    from ner.kernels.bert_layers import PackedLayers
    from ner.kernels.dropout import replace_dropouts

    replace_dropouts(model, dtype)
    for module in list(model.modules()):
        if PackedLayers.supports(module):
            module.forward = PackedLayers(module)
