"""Linear layers with LoRA adapters as one product with one gradient.

peft computes a LoRA layer as four operations with a gradient each. `LoraProduct` is one function whose backward pass
takes the thin products first, while their input is still in the caches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class LinearArguments:
    """What a linear layer, or several that read the same input, compute with: x Wᵀ + b + s (x Aᵀ) Bᵀ."""

    weight: torch.Tensor  # W [out, in]
    bias: torch.Tensor | None  # b [out]
    down: torch.Tensor | None = None  # A [r, in]; None where no layer has an adapter
    up: torch.Tensor | None = None  # B [out, r]
    scale: float = 1.0  # s

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layers' output: x [rows, in] → [rows, out]."""
        return LoraProduct.apply(x, self.weight, self.bias, self.down, self.up, self.scale)


class LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, equation 3), all of one dtype.

    x [rows, in], W [out, in], b [out] or None, A [r, in] and B [out, r] or None, s a float.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor | None,
        up: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Return the product and keep what its gradient needs."""
        ctx.scale = scale
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())  # [rows, out]
        low = None
        if down is not None and up is not None:
            low = (x @ down.t()).mul_(scale)  # [rows, r]
            y.addmm_(low, up.t())
        ctx.save_for_backward(x, low, weight, down, up)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:  # type: ignore[override]
        """Return the gradients of x, weight, bias, down and up, each None where it is not needed."""
        x, low, weight, down, up = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_down, needs_up, _ = ctx.needs_input_grad
        dx = dweight = dbias = ddown = dup = None
        if down is not None:
            dlow = (dy @ up).mul_(ctx.scale)  # [rows, r]
            ddown = dlow.t() @ x if needs_down else None  # [r, in]
            dup = (low.t() @ dy).t() if needs_up else None  # [out, r]; faster than dyᵀ low
        if needs_x:
            dx = dy @ weight  # [rows, in]
            if down is not None:
                dx.addmm_(dlow, down)
        if needs_weight:
            dweight = dy.t() @ x  # [out, in]
        if needs_bias:
            dbias = dy.sum(0)  # [out]
        return dx, dweight, dbias, ddown, dup, None


@dataclass(slots=True)
class Adapter:
    """The LoRA weights of one linear layer."""

    down: torch.Tensor  # A [r, in]
    up: torch.Tensor  # B [out, r]
    scale: float


def is_lora(module: Any) -> bool:
    """Return whether a module is a LoRA layer of peft."""
    return hasattr(module, "lora_variant") and hasattr(module, "base_layer")


def plain_adapter(module: Any) -> Adapter | None:
    """Return the adapter of a peft LoRA layer of the plain kind; None for any other, or while it is merged or disabled.

    Plain: one active adapter without dropout, bias or variant (DoRA, AdaLoRA …), on an nn.Linear that does not train.
    """
    base, names = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear or len(names) != 1 or module.lora_variant:
        return None
    if module.merged or module.disable_adapters:
        return None
    name = names[0]
    if name not in module.lora_bias or module.lora_bias[name]:  # AdaLoRA's layers have no entry there
        return None
    base_trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if base_trains or not isinstance(module.lora_dropout[name], nn.Identity):
        return None
    return Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def join_linears(linears: list[Any]) -> LinearArguments | None:
    """Return the arguments of linear layers that read the same input as one product; None where one is not plain.

    The outputs stand side by side: W, b and A are stacked, and B holds each layer's B on its diagonal.
    """
    adapters: list[Adapter | None] = []
    bases: list[nn.Linear] = []
    for linear in linears:
        adapter = plain_adapter(linear) if is_lora(linear) else None
        base = linear.base_layer if adapter else linear
        if type(base) is not nn.Linear:
            return None
        adapters.append(adapter)
        bases.append(base)
    present = [adapter for adapter in adapters if adapter]
    if len({adapter.scale for adapter in present}) > 1 or len({base.bias is None for base in bases}) > 1:
        return None
    weight = _stack([base.weight for base in bases])
    bias = None if bases[0].bias is None else _stack([base.bias for base in bases])
    if not present:
        return LinearArguments(weight, bias)
    down = _stack([adapter.down for adapter in present])
    return LinearArguments(weight, bias, down, _diagonal(bases, adapters), present[0].scale)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the tensors below each other; one alone as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _diagonal(bases: list[nn.Linear], adapters: list[Adapter | None]) -> torch.Tensor:
    """Return the layers' B as one block-diagonal matrix [out of all, r of all]; a layer without adapter adds none."""
    if len(adapters) == 1 and adapters[0]:
        return adapters[0].up
    blocks = [
        adapter.up if adapter else base.weight.new_zeros(base.out_features, 0)
        for base, adapter in zip(bases, adapters, strict=True)
    ]
    return torch.block_diag(*blocks)


def fuse_lora_layer(module: Any) -> bool:
    """Have a peft LoRA layer compute with LoraProduct where it is plain; return whether it can.

    The choice is made anew at each call, so that merging or disabling the adapter counts at once.
    """
    if plain_adapter(module) is None:
        return False
    peft_forward = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        arguments = None if args or kwargs else join_linears([module])
        if arguments is None:
            return peft_forward(x, *args, **kwargs)
        # Reshaped out here: some models change a layer's output in place, which is allowed on a view that autograd
        # knows, but not on one that is made inside a Function.
        return arguments.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    module.forward = forward
    return True
