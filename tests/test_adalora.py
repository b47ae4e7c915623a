"""AdaLoRA in the loop: what a skipped step leaves alone, what a checkpoint brings back."""

import pytest
import runs
import torch

from ner import adalora, config, distributed
from ner.corpora import read
from ner.training import build


@pytest.fixture
def training(tmp_path):
    """A tiny AdaLoRA model with its windows."""
    argv = runs.argv(tmp_path, tuning="adalora", learning_rate=1e-2, max_train_sentences=40)
    settings, _ = config.load(argv)
    accelerator = distributed.start(settings)
    corpus, _, _ = read(settings, accelerator)
    return build(settings, corpus, accelerator)


def step(training, number: int) -> None:
    """Take one step of ten as the loop does."""
    inputs, labels = training.collate(training.windows[:8])
    loss = torch.nn.functional.cross_entropy(training.model(**inputs).logits.flatten(0, 1), labels.flatten())
    training.optimizer.backward(loss)
    gradients = adalora.gradients(training.model)
    training.optimizer.step(1e-2, 1.0)
    adalora.after_step(training.model, number, 10, gradients, training.optimizer)


def masks(training) -> list[torch.Tensor]:
    return [training.optimizer.masters[name] == 0 for name in sorted(adalora.masked_weights(training.model))]


def test_ranks_are_masked_and_stay_so(training):
    for number in range(1, 9):
        step(training, number)
    before = masks(training)
    assert any(mask.any() for mask in before)
    step(training, 9)
    step(training, 10)
    assert all(torch.equal(*pair) for pair in zip(before, masks(training), strict=True))


def test_the_last_allocation_is_made_up_for_where_its_step_was_left_out(training):
    last = 10 - 10 // 4
    for number in range(1, last):
        step(training, number)
    assert adalora.allocator(training.model).ipt, "the scores are kept until the last allocation"
    step(training, last + 1)
    assert not adalora.allocator(training.model).ipt and any(mask.any() for mask in masks(training))


def test_gradients_are_free_of_the_loss_scale(training):
    training.model.base_model.model.zero_grad()
    weights = [weight for name, weight in training.model.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.grad = torch.full_like(weight, 8.0)
    assert all((gradient == 2).all() for gradient in adalora.gradients(training.model, scale=4.0).values())
    assert set(adalora.gradients(training.model)) == set(weights)


def test_state_comes_back(training, tmp_path):
    for number in range(1, 6):
        step(training, number)
    saved = {name: tensor.clone() for name, tensor in adalora.state(training.model).items()}
    assert {name.partition("/")[0] for name in saved} == {"rank", *adalora.SCORES}
    ranks = adalora.allocator(training.model)
    for kind in adalora.SCORES:
        getattr(ranks, kind).clear()
    training.model.peft_config["default"].rank_pattern = {}
    given = saved | {"ipt/none": torch.zeros(1)}
    adalora.load_state(training.model, given)
    assert list(given) == ["ipt/none"], "what fits no weight is left"
    again = adalora.state(training.model)
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


def test_other_tunings_have_none_of_it():
    model = torch.nn.Linear(2, 2)
    assert adalora.gradients(model) == {} and adalora.state(model) == {} and adalora.masked_weights(model) == set()
    adalora.after_step(model, 1, 10, {})
