"""The optimizer: AdamW on float32 master weights, averaging, loss scale."""

import copy

import pytest
import torch
from torch import nn

from ner.optimizer import Optimizer


def test_optimizer_in_float32_is_torchs_adamw():
    torch.manual_seed(0)
    ours = nn.Linear(6, 3)
    theirs = copy.deepcopy(ours)
    optimizer = Optimizer(ours, 0.1, 0.01)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.1
    )
    for step in range(5):
        x = torch.randn(8, 6)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        theirs(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        optimizer.backward(ours(x).square().mean())
        assert optimizer.step(0.1 / (step + 1), 0.5) == pytest.approx(norm.item(), rel=1e-5)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and torch.allclose(ours.bias, theirs.bias, atol=1e-6)


def test_small_steps_add_up_in_bfloat16():
    """A step of 1e-4 is lost on a bfloat16 weight near 1; on its float32 copy a hundred of them are not."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    model.to(torch.bfloat16)
    optimizer = Optimizer(model, 1e-4, 0.0)
    for _ in range(100):
        optimizer.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        optimizer.step(1e-4, 1.0)
    assert next(iter(optimizer.masters.values())).item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=0.005)


def test_float16_leaves_out_a_step_that_overflows():
    model = nn.Linear(2, 1, bias=False).to(torch.float16)
    optimizer = Optimizer(model, 0.1, 0.0)
    before, scale = model.weight.clone(), optimizer.scale.value
    optimizer.backward(model(torch.full((1, 2), 100.0, dtype=torch.float16)).float().sum() * 1000)
    optimizer.step(0.1, 1.0)
    assert torch.equal(model.weight, before) and optimizer.scale.value == scale / 2
    optimizer.scale.value = 1.5
    optimizer.backward(model(torch.ones(1, 2, dtype=torch.float16)).float().sum())
    optimizer.step(0.1, 1.0)
    assert not torch.equal(model.weight, before)


def test_the_head_learns_faster_by_its_factor():
    """Adam's first step is the learning rate, whatever the gradient."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = Optimizer(model, 0.001, 0.0, head={"1.weight", "1.bias"}, head_factor=10)
    optimizer.backward(model(torch.ones(1, 3)).sum())
    optimizer.step(0.001, 1e9)
    for name, weight in model.named_parameters():
        moved = (weight - before[name]).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.01 if name.startswith("1.") else 0.001), rtol=1e-2)


def test_the_average_is_a_mean_of_late_weights_and_leaves_training_alone():
    runs = {}
    for averaging in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).to(torch.bfloat16)
        optimizer, history = Optimizer(model, 0.01, 0.0, averaging), []
        for step in range(1, 201):
            x = torch.full((1, 4), step % 7 / 7, dtype=torch.bfloat16)
            optimizer.backward(model(x).square().sum())
            optimizer.step(0.01, 1.0)
            optimizer.average(step)
            history.append(optimizer.masters["weight"].detach().clone())
        runs[averaging] = model, optimizer, history
    (model, averaged, history), (_, plain, same) = runs[True], runs[False]
    assert all(map(torch.equal, history, same))
    assert plain.scored is plain.masters
    mean, steps = torch.zeros(2, 4), 0  # eta 8: of the weights after each step, or after every second, third, ...
    for step, weight in enumerate(history, 1):
        every = min(8, 1 + step // 64)
        if step % every == 0:
            mean, steps = torch.lerp(mean, weight, min(1.0, 9 * every / (step + 8))), steps + 1
    assert 64 < steps < 200 and torch.allclose(averaged.scored["weight"], mean, atol=1e-6)
    mean = averaged.scored["weight"]
    own = {name: weight.detach().clone() for name, weight in averaged.weights.items()}
    with averaged.using(averaged.scored):
        assert torch.equal(model.weight, mean.to(torch.bfloat16)) and not torch.equal(model.weight, own["weight"])
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in own.items())


def overflowing(optimizer: Optimizer, model: nn.Module) -> float:
    """Take a step whose gradients are infinite; return their norm."""
    optimizer.backward(model(torch.full((1, 2), 100.0, dtype=torch.float16)).float().sum() * 1000)
    return optimizer.step(0.1, 1.0)


def good(optimizer: Optimizer, model: nn.Module) -> float:
    optimizer.backward(model(torch.ones(1, 2, dtype=torch.float16)).float().sum() * 1e-3)
    return optimizer.step(0.1, 1.0)


def test_the_loss_scale_moves_as_grad_scalers_does(monkeypatch):
    from ner.optimizer import LossScale

    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 3)
    model = nn.Linear(2, 1, bias=False).to(torch.float16)
    optimizer = Optimizer(model, 0.1, 0.0)
    reference = torch.amp.GradScaler("cpu", growth_interval=3)
    for overflows in (True, False, False, False, False, True, False, False, True, False, False, False, False):
        norm = (overflowing if overflows else good)(optimizer, model)
        assert (norm == float("inf")) == overflows
        dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        weight = dummy.param_groups[0]["params"][0]
        reference.scale(weight.sum() * (float("inf") if overflows else 1.0)).backward()
        reference.step(dummy)
        reference.update()
        assert optimizer.scale.value == reference.get_scale()


def test_an_overflow_is_the_scales_matter_until_the_scale_is_tiny():
    model = nn.Linear(2, 1, bias=False).to(torch.float16)
    optimizer = Optimizer(model, 0.1, 0.0)
    optimizer.scale.value = 1.0
    overflowing(optimizer, model)
    assert optimizer.scale.value == 0.5 and optimizer.scale.may_overflow
    optimizer.scale.value = optimizer.scale.SMALLEST
    optimizer.scale.update(overflow=True)
    assert not optimizer.scale.may_overflow


def test_without_float16_a_gradient_that_is_not_finite_changes_no_weight():
    model = nn.Linear(2, 1)
    optimizer = Optimizer(model, 0.1, 0.0)
    before = model.weight.detach().clone()
    optimizer.backward(model(torch.ones(1, 2)).sum() * float("inf"))
    assert not optimizer.step(0.1, 1.0) < float("inf")
    assert torch.equal(model.weight, before) and optimizer.scale.value == 1 and not optimizer.scale.may_overflow


def test_restored_moments_are_tensors_of_their_own():
    """A checkpoint's tensors are its file mapped into memory, which a later checkpoint replaces."""
    model = nn.Linear(2, 1)
    optimizer = Optimizer(model, 0.1, 0.0, averaging=True)
    optimizer.backward(model(torch.ones(1, 2)).sum())
    optimizer.step(0.1, 1.0)
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    other = Optimizer(nn.Linear(2, 1), 0.1, 0.0, averaging=True)
    given = dict(saved)
    other.load_state(given)
    assert not given, "all of it was taken"
    theirs = {tensor.data_ptr() for tensor in saved.values()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state().items())
    assert not theirs & {tensor.data_ptr() for tensor in other.state().values()}
