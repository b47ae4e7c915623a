"""AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512): what it needs beyond LoRA.

It begins with more ranks than it may keep and masks the least important. peft's RankAllocator scores them by weight
times gradient; this file gives it the gradients, carries its masks over to the optimizer's float32 copies, and
keeps its averages in checkpoints. Every function does nothing for models of other tunings.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ner.optimizer import Optimizer

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # RankAllocator's: importance, its mean, its mean deviation
Gradients = dict[nn.Parameter, torch.Tensor]


def allocator(model: Any) -> Any:
    """Return peft's RankAllocator of a model, or None."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def _settings(model: Any) -> Any:
    """Return the peft config of an AdaLoRA model."""
    return model.peft_config["default"]


def gradients(model: Any, scale: float = 1.0) -> Gradients:
    """Return the gradients of the adapter's weights, before the optimizer clears them.

    scale: of the loss, by which they are divided. In float32 these are the tensors that the optimizer clips.
    """
    if allocator(model) is None:
        return {}
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name and weight.grad is not None]
    return {weight: weight.grad if scale == 1 else weight.grad / scale for weight in weights}


@torch.no_grad()
def after_step(model: Any, step: int, steps: int, gradients: Gradients, optimizer: "Optimizer | None" = None) -> None:
    """Score the ranks after an optimizer step (from 1, of `steps`) and mask the least important.

    The optimizer has cleared the weights' own gradients; `gradients` are those of the step.
    Ranks are masked between a tenth and three quarters of the steps, at fifty moments; after that the masks stay.
    """
    ranks = allocator(model)
    if ranks is None:
        return
    settings = _settings(model)
    settings.total_step, settings.tinit, settings.tfinal = steps, steps // 10, steps // 4
    settings.deltaT = max(1, steps // 50)
    last = steps - settings.tfinal
    if step > last and ranks.ipt:
        step = last  # the step of the last allocation was left out, as float16 overflowed
    elif step > last and not settings.rank_pattern:
        return  # resumed past the last allocation: what it masked has stayed 0
    for weight, gradient in gradients.items():
        weight.grad = gradient
    model.base_model.update_and_allocate(step)
    for weight in gradients:
        weight.grad = None
    if optimizer is not None:
        for name in masked_weights(model):
            if optimizer.weights[name] is not optimizer.masters[name]:
                optimizer.masters[name].masked_fill_(optimizer.weights[name] == 0, 0)


def masked_weights(model: Any) -> set[str]:
    """Return the names of the weights whose zeros are masked ranks."""
    if allocator(model) is None:
        return set()
    return {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_E" in name}


def state(model: Any) -> dict[str, torch.Tensor]:
    """Return what a checkpoint needs beside the weights: rank/NAME, the mask of the ranks, and the weights' scores."""
    ranks = allocator(model)
    if ranks is None:
        return {}
    pattern = _settings(model).rank_pattern or {}
    tensors = {f"rank/{name}": torch.tensor(mask) for name, mask in pattern.items()}
    for kind in SCORES:
        tensors |= {f"{kind}/{name}": score for name, score in getattr(ranks, kind).items()}
    return tensors


def load_state(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Take what state() gave out of `tensors`; what does not fit the model stays there."""
    ranks = allocator(model)
    if ranks is None:
        return
    settings = _settings(model)
    weights = dict(model.base_model.model.named_parameters())
    for key in list(tensors):
        kind, _, name = key.partition("/")
        if kind not in ("rank", *SCORES) or name not in weights or tensors[key].numel() != weights[name].numel():
            continue
        value = tensors.pop(key)
        if kind == "rank":
            settings.rank_pattern = (settings.rank_pattern or {}) | {name: value.tolist()}
        else:
            getattr(ranks, kind)[name] = value.to(weights[name].device, copy=True)
