"""Devices and processes, by way of accelerate: one GPU, several, or CPUs, with the same loop."""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from ner.errors import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from ner.config import Config
    from ner.optimizer import Optimizer

Value = TypeVar("Value")

# What `accelerate launch` or its saved configuration may ask for, and this program would not do: variable, what it is
# set to where nothing is asked for, what it stands for, and what to do instead
LAUNCH_SETTINGS = (
    ("ACCELERATE_MIXED_PRECISION", ("", "no"), "mixed precision", "set precision in config.yaml"),
    ("ACCELERATE_USE_FSDP", ("", "false"), "FSDP", "each process holds the whole model here"),
    ("ACCELERATE_USE_DEEPSPEED", ("", "false"), "DeepSpeed", "each process holds the whole model here"),
    ("ACCELERATE_USE_MEGATRON_LM", ("", "false"), "Megatron-LM", "each process holds the whole model here"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("", "false"), "a parallelism", "each process holds the whole model here"),
    ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "torch.compile", "nothing is compiled here"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "accumulation", "set accumulation in config.yaml"),
)


def start(config: "Config") -> "Accelerator":
    """Return the Accelerator of this process, with the run's trackers.

    Raises UserError for a tracker that is not there, and for settings of `accelerate launch` that are not followed.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import LoggerType, get_available_trackers

    check_launch_settings(os.environ)
    known = sorted(set(LoggerType.list()) - {"all"})
    for name in config.trackers:
        if name not in known:
            raise UserError(f"trackers: {name!r} is unknown; expected some of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"trackers: {name} is not installed; `pip install {name}`, or leave it out")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=config.trackers or None,
        project_dir=config.output,
    )


def check_launch_settings(environment: Mapping[str, str]) -> None:
    """Raise UserError for what `accelerate launch` was told and this program would ignore."""
    for variable, unset, what, instead in LAUNCH_SETTINGS:
        value = environment.get(variable, "")
        if value.lower() not in unset:
            raise UserError(
                f"accelerate launch asks for {what} ({variable}={value}), which main.py does not follow: {instead}, "
                "and leave it out of the command and of `accelerate config`"
            )


def from_first(accelerator: "Accelerator", work: Callable[[], Value]) -> Value:
    """Return work(), which the first process does, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([work() if accelerator.is_main_process else None])[0]


def sum_over_processes(accelerator: "Accelerator", loss: "torch.Tensor", optimizer: "Optimizer") -> float:
    """Return the sum of a scalar over the processes, and replace their gradients by their sums, in one message.

    DistributedDataParallel would want every process to have an equal share of a step.
    """
    import torch

    if accelerator.num_processes == 1:
        return loss.item()
    weights = list(optimizer.weights.values())
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights] + [loss]
    summed = accelerator.reduce(torch.cat([part.float().flatten() for part in parts]), "sum")
    *gradients, total = summed.split([part.numel() for part in parts])
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.view_as(weight).to(weight.dtype)
    return total.item()
