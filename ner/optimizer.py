"""AdamW on float32 master weights: clipping, loss scale, averaged weights."""

import contextlib

import torch
from torch import nn


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on float32 copies of a model's trained weights.

    Where the model is float32 the copies are the weights themselves. With float16 the loss is scaled, and a
    step whose gradients overflow is left out and the scale halved.

    `scored` are the weights that an epoch is judged by and that are saved: with `averaging` the mean over about the
    last ninth of all steps so far (polynomial-decay averaging, Shamir & Zhang 2013, with eta 8), else the last ones."""

    def __init__(self, model, learning_rate, weight_decay, averaging=False, head=(), head_factor=1.0):
        """`head`: names of weights whose learning rate is `head_factor` times that of the others."""
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
                        for name, p in self.weights.items()}
        self.scored = {n: p.detach().clone() for n, p in self.masters.items()} if averaging else self.masters
        groups = {}
        for name, p in self.masters.items():
            groups.setdefault((name in head, p.ndim > 1), []).append(p)
        self.adamw = torch.optim.AdamW([
            {"params": params, "weight_decay": weight_decay if is_matrix else 0.0,
             "factor": head_factor if is_head else 1.0}
            for (is_head, is_matrix), params in groups.items()], lr=learning_rate, fused=True)  # fmt: skip
        self.scale = 2.0 ** 15 if any(p.dtype == torch.float16 for p in self.weights.values()) else 1.0

    def backward(self, loss):
        """Adds the gradients of a scalar loss."""
        (loss * self.scale if self.scale != 1 else loss).backward()

    @torch.no_grad()
    def step(self, learning_rate, max_norm):
        """Clips the gradients to `max_norm`, takes one step and clears them. Returns the norm before (a float)."""
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                gradient = None if weight.grad is None else weight.grad.float()
                self.masters[name].grad = gradient if gradient is None or self.scale == 1 else gradient.div_(self.scale)
                weight.grad = None
        trained = list(self.masters.values())
        norm = float(nn.utils.clip_grad_norm_(trained, max_norm, foreach=True))
        if self.scale != 1 and not norm < float("inf"):
            self.scale /= 2
        else:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate * group["factor"]
            self.adamw.step()
            self.write_back()
        self.adamw.zero_grad()
        return norm

    @torch.no_grad()
    def average(self, step):
        """Moves the averages towards the weights as they are after `step` (from 1): every eighth time, once that many
        are a small part of the mean, as over all weights of an encoder it takes a fiftieth of a step."""
        every = min(8, 1 + step // 64)
        if self.scored is self.masters or step % every:
            return
        share = min(1.0, 9 * every / (step + 8))
        torch._foreach_lerp_(list(self.scored.values()), [p.detach() for p in self.masters.values()], share)
        for name, average in self.scored.items():
            if "lora_E" in name:  # adalora masks ranks by zeros
                average.masked_fill_(self.masters[name] == 0, 0)

    @contextlib.contextmanager
    def using(self, weights):
        """Has the model compute with these weights, by name, and then with its own again."""
        own = [weight.detach().clone() for weight in self.weights.values()]
        try:
            self._put(weights[name] for name in self.weights)
            yield
        finally:
            self._put(own)

    def write_back(self):
        """Copies the float32 weights into the model."""
        self._put(self.masters.values())

    @torch.no_grad()
    def _put(self, weights):
        pairs = [(own, new) for own, new in zip(self.weights.values(), weights, strict=True) if own is not new]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs)))
