"""The layers of BERT and its kin without padding compute what transformers' own compute, gradients too."""

from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import TOLERANCE, distance, with_adapters
from torch import nn

from ner import kernels
from ner.kernels import packing
from ner.kernels.attention import Attention, attend
from ner.kernels.dropout import PredrawnDropout
from ner.kernels.packing import PackedBatch

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
            model = with_adapters(model, **TUNED[tuned])
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


@pytest.mark.parametrize("tuned", TUNED)
def test_the_stack_gives_the_plain_logits_and_every_gradient(tuned, packed):
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
