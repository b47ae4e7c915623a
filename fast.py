"""What makes a training step and a tagging pass as fast as the machine allows, and nothing else.

Each piece computes what the plain one does, up to rounding; tests/test_fast.py holds it to that, and
benchmarks/ shows what each is for. The trade-off: weights live in the compute type (bfloat16 where the
hardware multiplies it natively), and the optimizer works on float32 copies of those that train. That costs
six bytes a trained weight more than autocast's scheme and saves converting every weight at every step.
"""

import torch
from torch import nn

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(precision, device):
    """Picks the type to compute in.

    precision: "auto" or a key of NAMES; device: a torch.device or its name. Returns (torch.dtype, reason)."""
    if precision != "auto":
        return NAMES[precision], "as configured"
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16"
    if device.type == "cpu":
        # Emulated bfloat16 is slower than float32, so only native instructions count.
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "this CPU multiplies bfloat16 natively"
        return torch.float32, "this CPU has no native bfloat16"
    return torch.float32, f"nothing faster is known to be safe on {device.type}"


def attention(device):
    """The attention implementation to load a model with: PyTorch's fused one is slow backward on CPUs."""
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


class LowRankProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ (LoRA, Hu et al. 2021, eq. 3) for frozen W and b, adding in place.

    x [..., in], W [out, in], b [out] or None, A [r, in], B [out, r] of one dtype; s a float."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        low = flat @ a.t()
        y.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, low, weight, a, b = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        dlow = (dy @ b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            dx.addmm_(dlow, a)
            dx = dx.view(*grad.shape[:-1], -1)
        return dx, None, None, dlow.t() @ flat, (dy.t() @ low).mul_(ctx.scale), None


def _fuse_lora(module):
    """Replaces the forward of one peft LoRA layer, where it is the plain kind: one adapter, no dropout,
    no variant, frozen nn.Linear underneath. Returns whether it did."""
    base, names = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear or len(names) != 1 or module.lora_variant or module.merged:
        return False
    name = names[0]
    if name not in module.lora_bias:  # adalora's layers, which are no two products
        return False
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    if trained or module.lora_bias[name] or not isinstance(module.lora_dropout[name], nn.Identity):
        return False
    plain, a, b, scale = module.forward, module.lora_A[name], module.lora_B[name], module.scaling[name]

    def forward(x, *args, **kwargs):
        if module.merged or module.disable_adapters or args or kwargs:
            return plain(x, *args, **kwargs)
        return LowRankProduct.apply(x, base.weight, base.bias, a.weight, b.weight, scale)

    module.forward = forward
    return True


class Dropout(nn.Module):
    """nn.Dropout for CPUs, where drawing a mask costs as much as a matrix product: the mask is a slice, at a
    random offset, of one drawn beforehand."""

    SIZE = 1 << 22

    def __init__(self, p):
        super().__init__()
        self.p = p
        generator = torch.Generator().manual_seed(0)
        keep = torch.rand(self.SIZE, generator=generator) >= p
        self.register_buffer("mask", keep.float() / (1 - p), persistent=False)

    def forward(self, x):
        if not self.training:
            return x
        if x.numel() > self.SIZE // 2:
            return nn.functional.dropout(x, self.p)
        start = int(torch.randint(self.SIZE - x.numel(), ()))
        return x * self.mask[start:start + x.numel()].view(x.shape)


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Scaled dot-product attention as transformers' eager one computes it, but for where its dropout is drawn.

    query, key, value [batch, heads, length, width]; returns [batch, length, heads, width] and the probabilities."""
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    share = nn.functional.softmax(scores, dim=-1)
    if dropout > 0:
        share = module.dropout(share)
    return torch.matmul(share, value).transpose(1, 2).contiguous(), share


def _draw_attention_dropout_beforehand(model):
    """Has an eager attention with an nn.Dropout of its own use that (by then a Dropout) instead of the functional."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("eager_drawn", _attend)
    AttentionMaskInterface.register("eager_drawn", eager_mask)
    for module in model.modules():
        config = getattr(module, "config", None)
        if (isinstance(getattr(module, "dropout", None), Dropout) and hasattr(module, "scaling")
                and getattr(config, "_attn_implementation", None) == "eager"):  # fmt: skip
            config._attn_implementation = "eager_drawn"


def prepare(model, dtype, device):
    """Readies a model in place: moved to `device`, all floating-point weights in `dtype`, LoRA layers fused, and on
    a CPU the dropout masks drawn beforehand. Returns the number of fused LoRA layers."""
    model.to(device=device, dtype=dtype)
    fused = 0
    masks = {}
    for module in list(model.modules()):
        if hasattr(module, "lora_variant") and hasattr(module, "base_layer"):
            fused += _fuse_lora(module)
        if torch.device(device).type == "cpu":
            for name, child in module.named_children():
                if type(child) is nn.Dropout and child.p > 0:
                    if child.p not in masks:
                        masks[child.p] = Dropout(child.p).to(dtype)
                    setattr(module, name, masks[child.p])
    if masks:
        _draw_attention_dropout_beforehand(model)
    return fused


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on float32 copies of a model's trained weights.

    Where the model is float32 the copies are the weights themselves. With float16 the loss is scaled, and a
    step whose gradients overflow is left out and the scale halved."""

    def __init__(self, model, learning_rate, weight_decay):
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
                        for name, p in self.weights.items()}
        decay = [p for p in self.masters.values() if p.ndim > 1]
        rest = [p for p in self.masters.values() if p.ndim <= 1]
        self.adamw = torch.optim.AdamW([{"params": decay, "weight_decay": weight_decay},
                                        {"params": rest, "weight_decay": 0.0}], lr=learning_rate, fused=True)
        self.scale = 2.0 ** 15 if any(p.dtype == torch.float16 for p in self.weights.values()) else 1.0

    def backward(self, loss):
        """Adds the gradients of a scalar loss."""
        (loss * self.scale if self.scale != 1 else loss).backward()

    @torch.no_grad()
    def step(self, learning_rate, max_norm):
        """Clips the gradients to `max_norm`, takes one step and clears them. Returns the norm before (a float)."""
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                self.masters[name].grad = None if weight.grad is None else weight.grad.float().div_(self.scale)
                weight.grad = None
        trained = list(self.masters.values())
        norm = float(nn.utils.clip_grad_norm_(trained, max_norm, foreach=True))
        if self.scale != 1 and not norm < float("inf"):
            self.scale /= 2
        else:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
            self.write_back()
        self.adamw.zero_grad()
        return norm

    @torch.no_grad()
    def write_back(self):
        """Copies the float32 weights into the model."""
        pairs = [(w, self.masters[n]) for n, w in self.weights.items() if w is not self.masters[n]]
        if pairs:
            torch._foreach_copy_([w for w, _ in pairs], [m for _, m in pairs])
