"""AdamW on float32 master weights: clipping, loss scale, averaged weights."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight


class LossScale:
    """The factor of the loss, and so of all gradients, that keeps float16 gradients from vanishing.

    It moves as torch.amp.GradScaler's does: halved by a step that overflows, doubled after 2,000 good steps in a row.
    Without float16 it is 1 and stays so.
    """

    INITIAL, GROWTH_INTERVAL = 2.0**16, 2000
    SMALLEST = 2.0**-14  # an overflow below it is no matter of the scale

    def __init__(self, float16: bool):
        self.float16 = float16
        self.value = self.INITIAL if float16 else 1.0
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        """Count a step."""
        if not self.float16:
            return
        self.good_steps += 1
        if overflow:
            self.value, self.good_steps = self.value / 2, 0
        elif self.good_steps == self.GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def may_overflow(self) -> bool:
        """Whether an overflow is a matter of the scale, which a smaller one will cure."""
        return self.float16 and self.value >= self.SMALLEST


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on float32 copies of a model's trained weights.

    Where the model is float32 the copies are the weights themselves. A step whose gradients are not finite is left out.

    `scored` are the weights that an epoch is judged by and that are saved: with `averaging` the mean over about the
    last ninth of all steps so far (polynomial-decay averaging, Shamir & Zhang 2013, with eta 8), else the last ones.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        averaging: bool = False,
        head: Collection[str] = (),
        head_factor: float = 1.0,
        masked: Collection[str] = (),
        extra: Mapping[str, nn.Parameter] | None = None,
        extra_rate: float | None = None,
    ):
        """Take all weights of `model` that require gradients.

        head: names of weights whose learning rate is `head_factor` times that of the others. masked: names of weights
        whose zeros are masks, and so are zeros of the average too. extra: weights that are not the model's, by
        name, trained at the peak learning rate `extra_rate` and without weight decay.
        """
        extra = dict(extra or {})
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad} | extra
        self.masters = {name: _float32(weight) for name, weight in self.weights.items()}
        self.averaging = averaging
        self.scored = {name: w.detach().clone() for name, w in self.masters.items()} if averaging else self.masters
        self.masked = masked
        self.scale = LossScale(any(weight.dtype == torch.float16 for weight in self.weights.values()))
        groups: dict[tuple[float, float], list[torch.Tensor]] = {}  # (factor of the learning rate, weight decay)
        for name, weight in self.masters.items():
            if name in extra:
                key = (learning_rate if extra_rate is None else extra_rate) / learning_rate, 0.0
            else:
                key = head_factor if name in head else 1.0, weight_decay if weight.ndim > 1 else 0.0
            groups.setdefault(key, []).append(weight)
        parameters = [
            {"params": weights, "weight_decay": decay, "factor": factor} for (factor, decay), weights in groups.items()
        ]
        self.adamw = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar loss."""
        (loss * self.scale.value if self.scale.float16 else loss).backward()

    def clear_gradients(self) -> None:
        """Forget the gradients that backward() added."""
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clip the gradients to the norm `max_norm`, take a step, and clear them.

        Returns their norm before clipping. Where it is not finite no weight has changed.
        """
        for name, weight in self.weights.items():
            master = self.masters[name]
            if weight is not master:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            if master.grad is not None and self.scale.float16:
                master.grad.div_(self.scale.value)
        norm = float(nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm, foreach=True))
        finite = math.isfinite(norm)
        if finite:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate * group["factor"]
            self.adamw.step()
            self.write_back()
        self.scale.update(overflow=not finite)
        self.adamw.zero_grad()
        return norm

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move the averages towards the weights as they are after `step` (from 1).

        Every eighth step does it, once that many are a small part of the mean: over all weights of an encoder it takes
        a fiftieth of a step's time.
        """
        every = min(8, 1 + step // 64)
        if not self.averaging or step % every:
            return
        share = min(1.0, 9 * every / (step + 8))
        torch._foreach_lerp_(list(self.scored.values()), [w.detach() for w in self.masters.values()], share)
        for name in self.masked:
            self.scored[name].masked_fill_(self.masters[name] == 0, 0)

    @contextlib.contextmanager
    def using(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        """Have the model compute with these weights, by name, and then with its own again."""
        own = [weight.detach().clone() for weight in self.weights.values()]
        try:
            self._put(weights[name] for name in self.weights)
            yield
        finally:
            self._put(own)

    def write_back(self) -> None:
        """Copy the float32 weights into the model."""
        self._put(self.masters.values())

    @torch.no_grad()
    def _put(self, weights: Iterable[torch.Tensor]) -> None:
        changed = [(own, new) for own, new in zip(self.weights.values(), weights, strict=True) if own is not new]
        if changed:
            torch._foreach_copy_([own for own, _ in changed], [new for _, new in changed])

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs: weight/NAME, average/NAME and, after a first step, AdamW's moments."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"weight/{name}"] = master.detach().contiguous()
            if self.averaging:
                tensors[f"average/{name}"] = self.scored[name].contiguous()
            for kind, value in self.adamw.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value.contiguous()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what state() gave out of `tensors`. Raises ValueError naming a weight that does not fit."""
        for name, master in self.masters.items():
            master.copy_(_taken(tensors, "weight", name, master.shape))
            if self.averaging:
                self.scored[name].copy_(_taken(tensors, "average", name, master.shape))
            if not any(f"{kind}/{name}" in tensors for kind in MOMENTS):
                continue  # it has had no gradient yet
            shapes = {"step": torch.Size(), "exp_avg": master.shape, "exp_avg_sq": master.shape}
            self.adamw.state[master] = {
                kind: _taken(tensors, kind, name, shape).to(master.device, copy=True) for kind, shape in shapes.items()
            }
        self.write_back()


def _float32(weight: nn.Parameter) -> torch.Tensor:
    return weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()


def _taken(tensors: dict[str, torch.Tensor], kind: str, name: str, shape: torch.Size) -> torch.Tensor:
    """Take a tensor of this shape out. Raises ValueError where there is none."""
    tensor = tensors.pop(f"{kind}/{name}", None)
    if tensor is None or tensor.shape != shape:
        raise ValueError(name)
    return tensor
