"""The losses on tokens, checked against their formulas."""

import json

import pytest
import runs
import torch

import main
from ner import losses

GOLD = torch.tensor([[-100, 1, 2, 0], [0, -100, -100, -100]])


def logits(seed=0):
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def by_hand(rows, gold, smoothing=0.0, gamma=0.0):
    total = 0.0
    for window, labels in zip(rows, gold, strict=True):
        for row, label in zip(window, labels, strict=True):
            if label != -100:
                log_probs = row.log_softmax(-1)
                cost = -(1 - smoothing) * log_probs[label] - smoothing * log_probs.mean()
                total = total + (1 - log_probs[label].exp()) ** gamma * cost
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "gamma"), [("cross_entropy", 0.0), ("focal", 2.0)])
def test_losses_equal_their_formula_with_their_gradients(kind, gamma, smoothing):
    rows = logits()
    ours = losses.loss_function(kind, smoothing)(rows, GOLD)
    theirs = by_hand(rows, GOLD, smoothing, gamma)
    assert ours.dtype == torch.float32 and float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert torch.allclose(*(torch.autograd.grad(loss, rows)[0] for loss in (ours, theirs)), atol=1e-6)


def test_the_focal_loss_hardly_counts_what_is_easy():
    sure = torch.tensor([[[8.0, 0.0, 0.0]]])
    gold = torch.tensor([[0]])
    assert losses.token_loss(sure, gold, focal=True) < 1e-5 * losses.token_loss(sure, gold)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_nothing_labelled_costs_nothing_and_bf16_is_summed_in_float32(kind):
    loss = losses.loss_function(kind)
    assert loss(logits(), torch.full((2, 4), -100)) == 0
    assert loss(logits().bfloat16(), GOLD).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
def test_positions_that_are_left_out_have_no_part_in_the_loss(kind, smoothing):
    """Neither what stands there counts, nor is a share of the weight of other labels spread over them."""
    loss, rows = losses.loss_function(kind, smoothing), logits()
    alone = loss(rows[GOLD != -100][None], GOLD[GOLD != -100][None])
    with torch.no_grad():
        odd = rows.masked_fill((GOLD == -100)[:, :, None], float("nan"))
    padded = loss(odd.requires_grad_(), GOLD)
    assert float(padded.detach()) == pytest.approx(float(alone.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(padded, odd)
    assert not gradient[GOLD == -100].any() and gradient[GOLD != -100].all()


@pytest.mark.parametrize("keys", [{"loss": "focal"}, {"label_smoothing": 0.1}])
def test_a_run_trains_by_the_loss_that_the_config_names(tmp_path, keys):
    plain = last_loss(tmp_path / "plain")
    other = last_loss(tmp_path / "other", **keys)
    assert other < 0.9 * plain if "loss" in keys else other > plain
    scores = json.loads((tmp_path / "other" / "run" / "test.json").read_text("utf-8"))
    assert scores["micro"]["f1"] > 0.5


def last_loss(output, **keys):
    """Train a run; return the mean loss of its last epoch."""
    main.main(runs.argv(output, epochs=3, **keys))
    return runs.metrics(output / "run")[-1]["train_loss"]
