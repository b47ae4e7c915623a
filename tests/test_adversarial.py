"""The fast gradient method: how embeddings are moved, with trained and with frozen ones, with every kind of tuning."""

import pytest
import runs
import torch
from torch import nn

import main
from ner import config, distributed, formats
from ner.adversarial import FastGradient
from ner.training import build


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


def built(tmp_path, **keys):
    """Return the training of a tiny run without dropout, and its first batch."""
    settings, _ = config.load(runs.argv(tmp_path, dropout=0, adversarial="fgm", adversarial_epsilon=2.0, **keys))
    training = build(settings, formats.read(str(settings.train)), distributed.start(settings))
    if training.config.tuning == "lora":  # its B is 0 at first, and A has no gradient
        for name, weight in training.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    training.model.train()
    return training, training.batches_of(0)[0]


def gradients(training, batch, micro_batch):
    """Return the gradients that main.py's loop adds for a batch, by name."""
    training.optimizer.clear_gradients()
    main.forward_backward(training, batch, units=100, micro_batch=micro_batch)
    return {name: weight.grad.clone() for name, weight in training.optimizer.weights.items()}


def by_hand(training, batch):
    """Return what gradients() does, by a pass on the embeddings and one on embeddings moved window by window."""
    inputs, labels = training.collate(batch)
    embeddings = training.model.get_input_embeddings()
    weights = training.optimizer.weights

    def loss(embedded):
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        return training.loss(training.model(inputs_embeds=embedded, **others).logits, labels) / 100

    training.adversary.close()
    embedded = nn.functional.embedding(inputs["input_ids"], embeddings.weight).detach().requires_grad_()
    (up,) = torch.autograd.grad(loss(embedded), embedded)
    shift = torch.stack([2.0 * window / window.norm() for window in up])
    clean, moved = (loss(nn.functional.embedding(inputs["input_ids"], embeddings.weight) + by) for by in (0.0, shift))
    found = torch.autograd.grad(clean + moved, list(weights.values()), allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(weights.items(), found, strict=True)}


@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("keys", [
    {"tuning": "lora", "head": "crf"}, {"tuning": "lora"}, {"tuning": "full", "loss": "focal"},
])  # fmt: skip
def test_the_loop_adds_both_gradients_however_the_batch_is_accumulated_and_scaled(tmp_path, keys, kernels):
    training, batch = built(tmp_path, kernels=kernels, **keys)
    table = training.model.get_input_embeddings().weight
    assert table.requires_grad == (keys["tuning"] == "full")
    before = table.detach().clone()
    whole, parts = gradients(training, batch, len(batch)), gradients(training, batch, 3)
    training.optimizer.scale.float16, training.optimizer.scale.value = True, 1024.0
    scaled = {name: gradient / 1024 for name, gradient in gradients(training, batch, 5).items()}
    assert torch.equal(table, before)  # nothing is moved that would have to be moved back
    for name, gradient in by_hand(training, batch).items():
        for ours in (whole, parts, scaled):
            assert torch.allclose(ours[name], gradient, atol=2e-5, rtol=1e-3), name


@pytest.mark.parametrize("keys", [
    {"tuning": "lora", "learning_rate": 2e-2, "precision": "bf16"},  # embeddings are frozen
    {"tuning": "lora", "learning_rate": 5e-3, "precision": "fp16"},
    {"tuning": "full"},
    {"tuning": "ptuning", "learning_rate": 2e-2},  # the embeddings' output is joined to virtual tokens
    {"tuning": "full", "head": "crf"},
])  # fmt: skip
def test_runs_train_by_it(tmp_path, keys):
    losses = {}
    for adversarial in ("none", "fgm"):
        main.main(runs.argv(tmp_path / adversarial, adversarial=adversarial, **keys))
        losses[adversarial] = [line["train_loss"] for line in runs.metrics(tmp_path / adversarial / "run")]
    assert losses["fgm"][1] < losses["fgm"][0]
    assert losses["fgm"] != losses["none"]
