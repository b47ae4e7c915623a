"""Devices and processes, by way of accelerate: one GPU, several, or CPUs, with the same loop."""

import logging

from ner.errors import UserError

log = logging.getLogger("__main__")


def start(config):
    """The Accelerator of this process, with the run's trackers. Raises UserError for a tracker that is not there."""
    import torch
    from accelerate import Accelerator
    from accelerate.tracking import LoggerType, get_available_trackers

    known = sorted(set(LoggerType.list()) - {"all"})
    for name in config.trackers:
        if name not in known:
            raise UserError(f"trackers: {name!r} is unknown; expected some of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"trackers: {name} is not installed; `pip install {name}`, or leave it out")
    return Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no",
                       log_with=config.trackers or None, project_dir=config.output)  # fmt: skip


def agreed(value):
    """The first process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def add_gradients(
    model, optimizer, batch: list, gold: list[list[int]], pad_id: int, devices, at, asked: bool
) -> tuple[float, bool]:
    """Adds the gradient of the mean loss over all labelled units of a batch of windows, which the processes share out.

    Each process works through its share at.micro_batch windows at a time, fewer where memory does not suffice. As every
    sum is divided by the units of the whole batch, any way to share it gives the same gradient. Gradients are summed
    over the processes here, in one message; DistributedDataParallel would want equal shares. Returns the mean loss, and
    whether any process was `asked` to stop. Raises UserError where memory does not suffice for a single window.
    """
    import torch

    from ner import checkpoint

    share, units = batch[devices.process_index :: devices.num_processes], checkpoint.units(batch)
    while (total := _worked_through(model, optimizer, share, units, gold, pad_id, devices.device, at)) is None:
        for weight in optimizer.weights.values():
            weight.grad = None
        if devices.device.type == "cuda":
            torch.cuda.empty_cache()
    if devices.num_processes == 1:
        return total.item() / units, asked
    weights = list(optimizer.weights.values())
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    parts += [total, torch.tensor(float(asked), device=total.device)]
    summed = devices.reduce(torch.cat([part.float().flatten() for part in parts]), "sum")
    *gradients, total, asked = summed.split([part.numel() for part in parts])
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.view_as(weight).to(weight.dtype)
        if hasattr(model.base_model, "rankallocator"):  # adalora must cut off the same ranks in all processes
            weight.last_grad = weight.grad
    return total.item() / units, asked.item() > 0


def _worked_through(model, optimizer, share: list, units: int, gold, pad_id: int, device, at):
    """The loss summed over a share of windows, divided by `units` before its gradient is added; None: out of memory.

    In that case at.micro_batch is halved, so that the next try takes less.
    """
    import torch

    from ner import batches
    from ner import model as models

    total, shape = torch.zeros((), device=device), (0, 0)
    try:
        for start in range(0, len(share), at.micro_batch):
            inputs = batches.collate(share[start : start + at.micro_batch], pad_id, gold)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            labels = inputs.pop("labels")
            shape = tuple(labels.shape)
            loss, _ = models.loss_sum(model(**inputs).logits, labels)
            optimizer.backward(loss / units)
            total += loss.detach()
        return total
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    if at.micro_batch == 1:
        raise UserError(
            f"out of memory on one window of {shape[1]} tokens; lower max_length, or take a smaller encoder"
        )
    log.warning("out of memory on a batch of %d windows x %d tokens: from here on a batch is %d windows, and the "
                "accumulation doubles, which computes the same", *shape, at.micro_batch // 2)  # fmt: skip
    at.micro_batch //= 2
    return None


def after_step(model, optimizer, step: int, steps: int) -> None:
    """What comes after an optimizer step (from 1): what the tuning does, also to the optimizer's float32 copies of the
    weights, and their average."""
    import torch

    from ner import model as models

    models.after_step(model, step, steps)
    with torch.no_grad():
        for name, weight in optimizer.weights.items():
            if "lora_E" in name and weight is not optimizer.masters[name]:  # adalora masks ranks by zeros
                optimizer.masters[name].masked_fill_(weight == 0, 0)
    optimizer.average(step)
