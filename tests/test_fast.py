"""The fast paths compute what the plain ones do: losses, gradients, logits and steps, within the precision's tolerance."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForTokenClassification

import fast

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def tagger(**lora):
    """A small BERT under LoRA, without dropout, whose adapters are not zero."""
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"))
    return get_peft_model(model, LoraConfig(
        task_type=TaskType.TOKEN_CLS, r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["classifier"],
        init_lora_weights=False, **lora))


def pass_through(model):
    """(loss, logits, gradients by name) of one batch, in float32."""
    torch.manual_seed(1)
    ids, labels = torch.randint(0, 60, (3, 9)), torch.randint(0, 5, (3, 9))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), logits.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def distance(a, b):
    return ((a - b).norm() / a.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fused_lora_gives_the_plain_logits_and_gradients(dtype):
    plain, quick = tagger(), tagger()
    assert fast.prepare(quick, dtype, "cpu") == 12
    loss, logits, gradients = pass_through(plain)
    loss2, logits2, gradients2 = pass_through(quick)
    assert loss2 == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert distance(logits, logits2) < TOLERANCE[dtype]
    assert gradients.keys() == gradients2.keys()
    whole = [torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, gradients2)]
    assert distance(*whole) < TOLERANCE[dtype]


def test_the_product_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (2, 6), (5, 2)))
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: fast.LowRankProduct.apply(t[0], weight, bias, t[1], t[2], 0.5), (x, a, b))
    plain = x @ weight.T + bias + 0.5 * (x @ a.T) @ b.T
    assert torch.allclose(fast.LowRankProduct.apply(x, weight, bias, a, b, 0.5), plain)
    assert torch.allclose(fast.LowRankProduct.apply(x, weight, None, a, b, 0.5), plain - bias)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "all"}])
def test_other_kinds_of_lora_are_left_to_peft(lora):
    model = tagger(**lora)
    assert fast.prepare(model, torch.float32, "cpu") == 0


def test_a_merged_layer_is_not_added_twice():
    model = tagger()
    _, before, _ = pass_through(model)
    fast.prepare(model, torch.float32, "cpu")
    model.merge_adapter()
    with torch.no_grad():
        torch.manual_seed(1)
        ids = torch.randint(0, 60, (3, 9))
        assert distance(before, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits) < 1e-4


def test_dropout_drops_its_share_keeps_the_mean_and_changes():
    torch.manual_seed(0)
    dropout = fast.Dropout(0.1)
    x = torch.ones(200, 500)
    first, second = dropout(x), dropout(x)
    for y in (first, second):
        assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
        assert y.mean().item() == pytest.approx(1, abs=0.01)
        assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_follows_the_seed_and_serves_inputs_larger_than_its_mask(monkeypatch):
    dropout, x = fast.Dropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))
    monkeypatch.setattr(fast.Dropout, "SIZE", 100)
    assert 0.3 < (dropout(x) == 0).float().mean() < 0.7


def test_prepare_replaces_dropout_on_a_cpu_and_the_gradient_passes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Dropout(0.0))
    fast.prepare(model, torch.float32, "cpu")
    assert type(model[1]) is fast.Dropout and type(model[2]) is nn.Dropout
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_optimizer_in_float32_is_torchs_adamw():
    torch.manual_seed(0)
    ours = nn.Linear(6, 3)
    theirs = copy.deepcopy(ours)
    optimizer = fast.Optimizer(ours, 0.1, 0.01)
    reference = torch.optim.AdamW([{"params": [theirs.weight], "weight_decay": 0.01},
                                   {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.1)
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
    optimizer = fast.Optimizer(model, 1e-4, 0.0)
    for _ in range(100):
        optimizer.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        optimizer.step(1e-4, 1.0)
    assert next(iter(optimizer.masters.values())).item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=0.005)


def test_float16_leaves_out_a_step_that_overflows():
    model = nn.Linear(2, 1, bias=False).to(torch.float16)
    optimizer = fast.Optimizer(model, 0.1, 0.0)
    before, scale = model.weight.clone(), optimizer.scale
    optimizer.backward(model(torch.full((1, 2), 100.0, dtype=torch.float16)).float().sum() * 1000)
    optimizer.step(0.1, 1.0)
    assert torch.equal(model.weight, before) and optimizer.scale == scale / 2
    optimizer.scale = 1.5
    optimizer.backward(model(torch.ones(1, 2, dtype=torch.float16)).float().sum())
    optimizer.step(0.1, 1.0)
    assert not torch.equal(model.weight, before)


def test_what_is_chosen_has_a_reason():
    assert fast.choose("fp32", "cpu") == (torch.float32, "as configured")
    assert fast.choose("bf16", "cpu")[0] is torch.bfloat16
    dtype, reason = fast.choose("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16) and "CPU" in reason
    assert fast.attention("cpu") == "eager" and fast.attention("cuda") == "sdpa"


def test_attention_dropout_is_drawn_beforehand_and_changes_nothing_when_tagging():
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3, attn_implementation="eager"))
    ids = torch.randint(0, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    before = model.eval()(input_ids=ids, attention_mask=mask).logits
    fast.prepare(model, torch.float32, "cpu")
    assert model.config._attn_implementation == "eager_drawn"
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits, before, atol=1e-6)
    model.train()
    torch.manual_seed(5)
    first = model(input_ids=ids, attention_mask=mask).logits
    second = model(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(input_ids=ids, attention_mask=mask).logits) and not torch.equal(first, second)
