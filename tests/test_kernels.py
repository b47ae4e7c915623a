"""The kernels compute what transformers and peft compute: LoRA's products and dropout."""

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from ner import kernels
from ner.kernels.bert_layers import PackedLayers
from ner.kernels.dropout import PredrawnDropout
from ner.kernels.lora import LoraProduct, fuse_lora_layer, is_lora
from ner.precision import choose_dtype

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def fused_layers(model):
    """How many LoRA layers of a model can be fused."""
    return sum(fuse_lora_layer(module) for module in model.modules() if is_lora(module))


def small_bert(attention_dropout: float = 0.0) -> BertForTokenClassification:
    """Return a random BERT (hidden 32, 2 layers, 4 heads, 5 labels), the same on every call."""
    torch.manual_seed(0)
    return BertForTokenClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=attention_dropout,
            attn_implementation="eager",
        )
    )


def with_adapters(model, **lora):
    """The model under LoRA, with adapters that are not zero."""
    settings = {"task_type": TaskType.TOKEN_CLS, "r": 4, "lora_alpha": 8, "exclude_modules": ["classifier"]}
    return get_peft_model(model, LoraConfig(**settings, init_lora_weights=False, **lora))


def tagger(**lora):
    """A small BERT under LoRA, without dropout, whose adapters are not zero."""
    return with_adapters(small_bert(), target_modules="all-linear", **lora)


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
    assert fused_layers(quick) == 12
    kernels.prepare(quick, dtype, "cpu")
    loss, logits, gradients = pass_through(plain)
    loss2, logits2, gradients2 = pass_through(quick)
    assert loss2 == pytest.approx(loss, rel=TOLERANCE[dtype])
    assert distance(logits, logits2) < TOLERANCE[dtype]
    assert gradients.keys() == gradients2.keys()
    whole = [torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, gradients2)]
    assert distance(*whole) < TOLERANCE[dtype]


def test_the_product_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 6), (2, 6), (5, 2)))
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: LoraProduct.apply(t[0], weight, bias, t[1], t[2], 0.5), (x, a, b))
    plain = x @ weight.T + bias + 0.5 * (x @ a.T) @ b.T
    assert torch.allclose(LoraProduct.apply(x, weight, bias, a, b, 0.5), plain)
    assert torch.allclose(LoraProduct.apply(x, weight, None, a, b, 0.5), plain - bias)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "all"}])
def test_other_kinds_of_lora_are_left_to_peft(lora):
    model = tagger(**lora)
    assert fused_layers(model) == 0


def test_a_merged_layer_is_not_added_twice():
    model = tagger()
    _, before, _ = pass_through(model)
    kernels.prepare(model, torch.float32, "cpu")
    model.merge_adapter()
    with torch.no_grad():
        torch.manual_seed(1)
        ids = torch.randint(0, 60, (3, 9))
        assert distance(before, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits) < 1e-4


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_model_that_changes_a_layers_output_in_place_still_trains(rank_stabilized):
    """DeBERTa v1 adds its biases to the joined query, key and value in place."""
    torch.manual_seed(0)
    config = transformers.DebertaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=5,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = with_adapters(
        transformers.DebertaForTokenClassification(config), target_modules="all-linear", use_rslora=rank_stabilized
    )
    _, logits, gradients = pass_through(model)
    model.zero_grad()
    kernels.prepare(model, torch.float32, "cpu")
    _, logits2, gradients2 = pass_through(model)
    assert torch.allclose(logits, logits2, atol=1e-5)
    assert gradients.keys() == gradients2.keys()
    assert all(torch.allclose(gradients[name], gradients2[name], atol=1e-4) for name in gradients)


def test_plain_kernels_leave_the_model_as_it_is():
    model = tagger()
    forwards = {name: module.forward for name, module in model.named_modules()}
    kernels.prepare(model, torch.bfloat16, "cpu", "plain")
    assert all(module.forward == forwards[name] for name, module in model.named_modules())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert kernels.attention_implementation("cpu", "plain") is None


def test_other_architectures_are_left_alone():
    settings = transformers.DistilBertConfig(vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=5)
    model = transformers.DistilBertForTokenClassification(settings).eval()
    ids = torch.randint(0, 60, (2, 5))
    before = model(input_ids=ids).logits
    kernels.prepare(model, torch.float32, "cpu")
    assert not any(isinstance(module.forward, PackedLayers) for module in model.modules())
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)


def test_dropout_drops_its_share_keeps_the_mean_and_changes():
    torch.manual_seed(0)
    dropout = PredrawnDropout(0.1)
    x = torch.ones(200, 500)
    first, second = dropout(x), dropout(x)
    for y in (first, second):
        assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
        assert y.mean().item() == pytest.approx(1, abs=0.01)
        assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_follows_the_seed_and_serves_inputs_larger_than_its_mask():
    dropout, x = PredrawnDropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))
    dropout.masks = dropout.masks[:100]
    assert 0.3 < (dropout(x) == 0).float().mean() < 0.7


def test_prepare_replaces_dropout_on_a_cpu_and_the_gradient_passes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Dropout(0.0))
    kernels.prepare(model, torch.float32, "cpu")
    assert type(model[1]) is PredrawnDropout and type(model[2]) is nn.Dropout
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_what_is_chosen_has_a_reason():
    assert choose_dtype("fp32", "cpu") == (torch.float32, "as configured")
    assert choose_dtype("bf16", "cpu")[0] is torch.bfloat16
    dtype, reason = choose_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16) and "CPU" in reason
    assert kernels.attention_implementation("cpu") == "eager" and kernels.attention_implementation("cuda") == "sdpa"


def test_attention_dropout_is_drawn_beforehand_and_changes_nothing_when_tagging():
    model = small_bert(attention_dropout=0.3)
    ids = torch.randint(0, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    before = model.eval()(input_ids=ids, attention_mask=mask).logits
    kernels.prepare(model, torch.float32, "cpu")
    assert model.config._attn_implementation == "eager_predrawn"
    after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(after[mask.bool()], before[mask.bool()], atol=1e-6)
    model.train()
    torch.manual_seed(5)
    first = model(input_ids=ids, attention_mask=mask).logits
    second = model(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(input_ids=ids, attention_mask=mask).logits) and not torch.equal(first, second)
