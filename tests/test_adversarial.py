"""The fast gradient method: how embeddings are moved, with trained and with frozen ones, with every kind of tuning."""

import json

import pytest
import runs
import torch
from torch import nn

import main
from ner.adversarial import FastGradient


class Model(nn.Module):
    """Embeds token ids and scores them by one layer."""

    def __init__(self, frozen):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)
        self.embeddings.weight.requires_grad_(not frozen)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, ids):
        return self.head(self.embeddings(ids).tanh())


IDS = torch.tensor([[1, 2, 3], [4, 5, 5]])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_second_pass_sees_embeddings_moved_by_epsilon_up_the_gradient(frozen):
    model = Model(frozen)
    adversary = FastGradient(model, epsilon=0.5)
    loss = model(IDS).square().sum()
    loss.backward()
    first = model.head.weight.grad.clone()

    embedded = model.embeddings.weight[IDS].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(embedded.tanh()).square().sum(), embedded)
    moved = embedded + 0.5 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    expected = model.head(moved.tanh()).square().sum()
    with adversary.moved():
        second = model(IDS).square().sum()
        second.backward()
    assert float(second.detach()) == pytest.approx(float(expected.detach())) and second > loss
    (own,) = torch.autograd.grad(expected, model.head.weight)
    assert torch.allclose(model.head.weight.grad, first + own, atol=1e-5)  # gradients add up
    assert (model.embeddings.weight.grad is None) == frozen
    assert torch.allclose(model(IDS).square().sum(), loss)  # and the model computes as before


def test_scoring_is_left_alone():
    model = Model(frozen=True).eval()
    FastGradient(model, epsilon=0.5)
    assert not model.embeddings(IDS).requires_grad
    with torch.no_grad():
        assert not model.train()(IDS).requires_grad


def test_a_gradient_of_zero_or_one_that_overflowed_moves_nothing():
    model = Model(frozen=True)
    adversary = FastGradient(model, epsilon=0.5)
    for factor in (0.0, float("inf")):
        expected = model(IDS)
        (expected.sum() * factor).backward()
        with adversary.moved():
            assert torch.equal(model(IDS), expected)


def test_without_a_backward_pass_there_is_nothing_to_move_by():
    with pytest.raises(RuntimeError), FastGradient(Model(frozen=True), 0.5).moved():
        pass


def test_closed_it_is_gone():
    model = Model(frozen=True)
    FastGradient(model, epsilon=0.5).close()
    assert not model.embeddings(IDS).requires_grad


@pytest.mark.parametrize("keys", [
    {"tuning": "lora", "learning_rate": 2e-2, "precision": "bf16"},  # embeddings are frozen
    {"tuning": "full"},
    {"tuning": "ptuning", "learning_rate": 2e-2},  # the embeddings' output is joined to virtual tokens
    {"tuning": "full", "head": "crf"},
])  # fmt: skip
def test_runs_train_by_it(tmp_path, keys):
    losses = {}
    for adversarial in ("none", "fgm"):
        main.main(runs.argv(tmp_path / adversarial, adversarial=adversarial, **keys))
        lines = (tmp_path / adversarial / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
        losses[adversarial] = [json.loads(line)["train_loss"] for line in lines]
    assert losses["fgm"][1] < losses["fgm"][0]
    assert losses["fgm"] != losses["none"]
