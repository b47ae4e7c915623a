"""The kernels compute what transformers and peft compute: losses, gradients and logits, up to rounding."""

from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from ner import kernels
from ner.kernels import packing
from ner.kernels.attention import Attention, attend
from ner.kernels.bert_layers import PackedLayers
from ner.kernels.dropout import PredrawnDropout
from ner.kernels.frozen import FrozenWeights
from ner.kernels.lora import LoraProduct, fuse_lora_layer, is_lora
from ner.kernels.packing import PackedBatch
from ner.precision import choose_dtype

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def fused_layers(model):
    """How many LoRA layers of a model can be fused."""
    return sum(fuse_lora_layer(module) for module in model.modules() if is_lora(module))


def tagger(**lora):
    """A small BERT under LoRA, without dropout, whose adapters are not zero."""
    torch.manual_seed(0)
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
    )
    return get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.TOKEN_CLS,
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            exclude_modules=["classifier"],
            init_lora_weights=False,
            **lora,
        ),
    )


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


laid_out = pytest.mark.skipif(
    not FrozenWeights.supports(torch.zeros(1)), reason="this CPU has no layout of its own for weights"
)


@laid_out
def test_a_frozen_weight_gives_the_products_and_gradients_of_a_plain_one():
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((6, 6), (2, 6), (9, 2)))
    weights, bias, dy = [torch.randn(n, 6) for n in (5, 4)], torch.randn(9), torch.randn(6, 9)
    frozen = FrozenWeights()
    assert frozen.update(weights, True)
    for adapter in ((a, b, 0.5), (None, None, 1.0)):
        found = []
        for weight in (frozen, torch.cat(weights)):
            y = LoraProduct.apply(x, weight, bias, *adapter)
            found.append([y, *torch.autograd.grad(y, [t for t in (x, *adapter[:2]) if t is not None], dy)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


@laid_out
def test_a_frozen_weight_is_laid_out_once_and_anew_when_it_is_another():
    frozen, x, weight = FrozenWeights(), torch.randn(2, 3), torch.randn(4, 3)
    assert frozen.update([weight], True)
    reordered = frozen._reordered
    assert frozen.update([weight], True) and frozen._reordered is reordered
    with torch.no_grad():
        weight.add_(1)
    assert frozen.update([weight], True)
    torch.testing.assert_close(frozen.product(x, None), x @ weight.T)
    other = torch.randn(4, 3)
    assert frozen.update([other], True)
    torch.testing.assert_close(frozen.product(x, None), x @ other.T)
    assert not frozen.update([other, torch.randn(4, 3, requires_grad=True)], True)
    assert not frozen.update([other.double()], True)


@laid_out
def test_only_weights_that_train_are_laid_out_for_each_product(monkeypatch):
    calls, product = [], FrozenWeights.product
    monkeypatch.setattr(FrozenWeights, "product", lambda self, *args: calls.append(self) or product(self, *args))
    for tuned, expected in (("full", 0), ("lora", 12), ("some layers", 12)):
        calls.clear()
        gradients(pair(tuned=tuned)[1], *padded())
        assert len(calls) == expected == len(set(calls)), tuned


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


KINDS = {
    "bert": (transformers.BertConfig, transformers.BertForTokenClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForTokenClassification),
    "electra": (transformers.ElectraConfig, transformers.ElectraForTokenClassification),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaForTokenClassification),
    "ernie": (transformers.ErnieConfig, transformers.ErnieForTokenClassification),
    "camembert": (transformers.CamembertConfig, transformers.CamembertForTokenClassification),
}
TUNED = {
    "full": None,
    "lora": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["query", "value"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "bias": {"target_modules": "all-linear", "bias": "all"},
    "scales differ": {"target_modules": "all-linear", "alpha_pattern": {"key": 3}},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 1e-9},
}
STACKED = {"full", "lora", "some layers", "rslora"}  # the others are left to peft and transformers


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
    model = get_peft_model(
        transformers.DebertaForTokenClassification(config),
        LoraConfig(
            task_type=TaskType.TOKEN_CLS,
            r=4,
            target_modules="all-linear",
            exclude_modules=["classifier"],
            init_lora_weights=False,
            use_rslora=rank_stabilized,
        ),
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


def pair(dtype=torch.float32, tuned="full", kind="bert", attention="eager", dropout=0.0):
    """The same small model twice, in training mode: as it is, and prepared."""
    made = []
    for prepared in (False, True):
        torch.manual_seed(0)
        settings, model = KINDS[kind]
        model = model(
            settings(
                vocab_size=60,
                embedding_size=32,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=64,
                num_labels=5,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                pad_token_id=0,
                max_position_embeddings=64,
                attn_implementation=attention,
            )
        )
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(weight, std=0.1)
        if TUNED[tuned]:
            model = get_peft_model(
                model,
                LoraConfig(
                    task_type=TaskType.TOKEN_CLS,
                    r=4,
                    lora_alpha=8,
                    exclude_modules=["classifier"],
                    init_lora_weights=False,
                    **TUNED[tuned],
                ),
            )
        if prepared:
            kernels.prepare(model, dtype, "cpu")
        made.append(model.train())
    return made


def padded():
    """(ids, mask) of sentences of several lengths."""
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 60, (4, 11)), torch.ones(4, 11, dtype=torch.long)
    for row, length in enumerate((4, 11, 7, 1)):
        mask[row, length:] = 0
    return ids * mask, mask


def gradients(model, ids, mask):
    """(logits of the real tokens, gradients by name) of a loss over the real tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits.float()[mask.bool()]
    torch.manual_seed(2)
    (logits * torch.randn(logits.shape)).sum().backward()
    return logits.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def packed(monkeypatch):
    """How often batches were worked through without their padding."""
    calls, pack = [], PackedBatch.pack
    monkeypatch.setattr(PackedBatch, "pack", lambda self, hidden: calls.append(self) or pack(self, hidden))
    return calls


@pytest.mark.parametrize(("tuned", "laid_out"), [(name, True) for name in TUNED] + [("lora", False)])
def test_the_stack_gives_the_plain_logits_and_every_gradient(tuned, laid_out, packed, monkeypatch):
    if not laid_out:
        monkeypatch.setattr(FrozenWeights, "supports", staticmethod(lambda weight: False))
    plain, quick = pair(tuned=tuned)
    (logits, grads), (logits2, grads2) = (gradients(model, *padded()) for model in (plain, quick))
    assert len(packed) == (tuned in STACKED)
    assert torch.allclose(logits, logits2, atol=1e-5)
    assert grads.keys() == grads2.keys() == {n for n, p in quick.named_parameters() if p.requires_grad}
    for name in grads:
        if not name.endswith("key.bias"):  # theirs is zero but for rounding
            assert distance(grads[name], grads2[name]) < 1e-4, name


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_stack_fits_berts_kin_and_either_kind_of_mask(kind, attention, packed):
    plain, quick = pair(kind=kind, attention=attention)
    (logits, grads), (logits2, grads2) = (gradients(model, *padded()) for model in (plain, quick))
    assert len(packed) == 1 and torch.allclose(logits, logits2, atol=1e-5)
    whole = [torch.cat([g[name].flatten() for name in grads]) for g in (grads, grads2)]
    assert distance(*whole) < 1e-4
    with torch.no_grad():
        ids, mask = padded()
        logits, logits2 = plain.eval()(ids, mask).logits, quick.eval()(ids, mask).logits
    assert torch.allclose(logits[mask.bool()], logits2[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_the_stack_in_bfloat16(tuned, packed):
    plain, quick = pair(torch.bfloat16, tuned)
    (logits, grads), (logits2, grads2) = (gradients(model, *padded()) for model in (plain, quick))
    assert len(packed) == 1 and distance(logits, logits2) < TOLERANCE[torch.bfloat16]
    assert distance(*(torch.cat([g[n].flatten() for n in grads]) for g in (grads, grads2))) < TOLERANCE[torch.bfloat16]


def test_without_padding_a_sentence_has_the_same_gradients_alone_and_beside_longer_ones():
    ids, mask = padded()
    _, quick = pair(tuned="lora")
    _, together = gradients(quick, ids[:1], mask[:1])
    quick.zero_grad()
    logits = quick(input_ids=ids, attention_mask=mask).logits[:1, :4].flatten(0, 1)
    torch.manual_seed(2)
    (logits * torch.randn(logits.shape)).sum().backward()
    for name, weight in quick.named_parameters():
        if weight.requires_grad:
            assert torch.allclose(weight.grad, together[name], atol=1e-5), name


def test_the_stack_drops_in_attention_and_between_layers_and_follows_the_seed(packed):
    _, quick = pair(dropout=0.3)
    inputs = dict(zip(("input_ids", "attention_mask"), padded(), strict=True))
    seeded = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        seeded.append(quick(**inputs).logits)
    assert torch.equal(seeded[0], seeded[2]) and not torch.equal(seeded[0], seeded[1])
    for module in quick.modules():  # in attention alone
        if "Attention" not in type(module).__name__ and isinstance(getattr(module, "dropout", None), PredrawnDropout):
            module.dropout = nn.Dropout(0.0)
        elif hasattr(module, "dropout"):
            module.dropout = nn.Dropout(0.5)  # not one of ours
    assert not torch.equal(quick(**inputs).logits, quick(**inputs).logits)
    assert torch.equal(quick.eval()(**inputs).logits, quick(**inputs).logits)


@pytest.mark.parametrize("scores", [1, packing.MAX_SCORES])
def test_attention_has_the_gradients_of_its_formula(scores, monkeypatch):
    """With dropout, padding and rows that stand for no token, in float64; sentence by sentence and all at once."""
    monkeypatch.setattr(packing, "MAX_SCORES", scores)
    torch.manual_seed(0)
    monkeypatch.setattr(packing, "ROW_MULTIPLE", 4)
    rows = PackedBatch(torch.tensor([[True, True, True], [True, True, False]]), 2)
    assert rows.tokens.tolist() == [0, 1, 2, 3, 4] and len(rows.blocks) == (2 if scores == 1 else 1)
    dropout = PredrawnDropout(0.5).double()

    def attended(three):
        torch.manual_seed(1)
        return Attention.apply(nn.functional.pad(three, (0, 0, 0, 3)), rows, 0.7, dropout)[:5]

    assert torch.autograd.gradcheck(attended, torch.randn(5, 12, dtype=torch.float64, requires_grad=True))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=13, max_size=13).filter(any), min_size=1, max_size=9),
    st.sampled_from([1, 300, 1000, packing.MAX_SCORES]),
)
def test_attention_is_each_sentences_own_however_they_stand_in_blocks(real, most_scores):
    real, heads, head_size = torch.tensor(real), 2, 3
    with mock.patch.object(packing, "MAX_SCORES", most_scores):
        packed = PackedBatch(real, heads)
    assert sum(block.end - block.begin for block in packed.blocks) == packed.blocks[-1].end == len(packed.by_head)
    qkv = torch.randn(*real.shape, 3, heads, head_size, generator=torch.Generator().manual_seed(0))
    context = packed.unpack(attend(packed.pack(qkv.flatten(2)), packed, 0.7)[0])
    for sentence, is_token, ours in zip(qkv, real, context, strict=True):
        query, key, value = sentence.permute(1, 2, 0, 3)
        attention_probs = torch.softmax((query @ key.mT * 0.7).masked_fill(~is_token, -torch.inf), -1)
        theirs = (attention_probs @ value).transpose(0, 1).flatten(1)
        assert torch.allclose(ours[is_token], theirs[is_token], atol=1e-5)
        assert not ours[~is_token].any()


def test_hidden_states_that_are_asked_for_are_transformers_own(packed):
    plain, quick = pair()
    ids, mask = padded()
    theirs, ours = (m(input_ids=ids, attention_mask=mask, output_hidden_states=True) for m in (plain, quick))
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
    assert torch.allclose(ours.hidden_states[2], theirs.hidden_states[2], atol=1e-5)


def test_adapters_that_are_merged_disabled_or_taken_off_count_at_once():
    plain, quick = pair(tuned="lora")
    ids, mask = padded()

    def logits(model):
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]

    tuned = logits(quick)
    with plain.disable_adapter(), quick.disable_adapter():
        assert torch.allclose(logits(plain), logits(quick), atol=1e-5)
        assert not torch.allclose(tuned, logits(quick), atol=1e-3)
    quick.merge_adapter()
    assert torch.allclose(logits(quick), tuned, atol=1e-5)
    quick.unmerge_adapter()
    assert torch.allclose(logits(quick), tuned, atol=1e-5)
    assert torch.allclose(logits(quick.merge_and_unload()), tuned, atol=1e-5)


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
    torch.manual_seed(0)
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.3,
            attn_implementation="eager",
        )
    )
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
