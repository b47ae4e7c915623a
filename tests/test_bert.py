"""bert.py gives the logits and the token ids that transformers gives, and leaves to model.py what is not its own."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch

from ner import bert
from ner import config
from ner import model
import predict
from ner import tagging as tagger

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TEXTS = ["1998年3月，江泽民在北京会见了比尔·盖茨。", "上海", "\u3000 \u200b😀e\u0301[SEP]"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """tuning -> a model folder whose adapter and head are not zero."""
    root = tmp_path_factory.mktemp("bert")
    tokenizer = tiny.wordpiece(root / "tokenizer")
    source = tiny.encoder(root / "encoder", tokenizer)
    folders = {}
    for tuning in ("lora", "rslora", "full", "bitfit", "freeze", "dora", "prompt"):
        torch.manual_seed(0)
        made, words, meta = model.build(
            config.Config(pretrained=str(source), tuning=tuning, max_length=64, lora=config.Lora(r=4)), LABELS, "character")
        with torch.no_grad():
            for weight in made.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.1)
        folders[tuning] = root / tuning / "model"
        model.save(made, words, meta, folders[tuning])
    return folders


@pytest.mark.parametrize("tuning", ["lora", "rslora", "full", "bitfit", "freeze"])
def test_logits_and_token_ids_are_those_of_transformers(saved, tuning):
    plain, words, meta = model.load(saved[tuning])
    quick, quick_words, quick_meta = bert.load(saved[tuning])
    assert quick_meta == meta
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.inference_mode():
        for each in (mask, torch.ones_like(mask)):
            expected = plain(input_ids=ids, attention_mask=each).logits[each.bool()]
            assert torch.allclose(quick(input_ids=ids, attention_mask=each).logits[each.bool()], expected, atol=1e-5)
    for text in TEXTS:
        assert quick_words(text)["input_ids"] == words(text)["input_ids"]
        assert quick_words(list(text), add_special_tokens=False)["input_ids"] == [
            words(c, add_special_tokens=False)["input_ids"] for c in text]
    assert sorted(quick_words.all_special_ids) == sorted(words.all_special_ids)
    assert (quick_words.unk_token_id, quick_words.pad_token_id) == (words.unk_token_id, words.pad_token_id)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_predict_finds_the_same_entities_either_way(saved, tuning, monkeypatch):
    quick = predict.load(saved[tuning], precision="auto")
    assert isinstance(quick.tagger.model, bert.Bert)
    found = quick.predict(TEXTS)
    monkeypatch.setattr(bert, "load", lambda folder: None)
    plain = predict.load(saved[tuning], precision="auto").predict(TEXTS)
    assert [[(e.text, e.type, e.start, e.end) for e in row] for row in found] == [
        [(e.text, e.type, e.start, e.end) for e in row] for row in plain]


@pytest.mark.parametrize("tuning", ["dora", "prompt"])
def test_other_tunings_are_left_to_model(saved, tuning):
    assert bert.load(saved[tuning]) is None


@pytest.mark.parametrize("change", [{"model_type": "roberta"}, {"hidden_act": "relu"}, {"is_decoder": True},
                                    {"hidden_size": 64}])  # fmt: skip
def test_other_encoders_and_damage_are_left_to_model(saved, tmp_path, change):
    shutil.copytree(saved["full"], tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    assert bert.load(tmp_path) is None
    assert bert.load(tmp_path / "nothing") is None


def test_a_cut_file_is_left_to_model(saved, tmp_path):
    shutil.copytree(saved["lora"], tmp_path / "model", symlinks=True)
    file = tmp_path / "model/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert bert.load(tmp_path / "model") is None


def test_neither_transformers_nor_a_compiler_is_imported(saved):
    import subprocess
    import sys
    code = ("import sys, predict; predict.load(sys.argv[1]).predict(['北京']); "
            "sys.exit(any(name in sys.modules for name in ('transformers', 'peft', 'torch._dynamo')))")
    assert subprocess.run([sys.executable, "-c", code, str(saved["lora"])], cwd=config.ROOT).returncode == 0


# Bfloat16.

@pytest.mark.skipif(not bert.bfloat16_is_native(), reason="this CPU does not multiply bfloat16 natively")
def test_bfloat16_layers_compute_what_plain_ones_do(saved):
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(96, 40).bfloat16(), torch.randn(50, 96).bfloat16()
    with torch.inference_mode():
        expected = plain(x).float()
        assert torch.allclose(bert.Bfloat16(plain)(x).float(), expected, atol=0.02)
        gelu = torch.nn.functional.gelu(expected)
        assert torch.allclose(bert.Bfloat16(plain, gelu=True)(x).float(), gelu, atol=0.02)
    texts = [list(text) for text in TEXTS]
    quick = tagger.Tagger.of(saved["full"], precision="bf16")
    assert isinstance(quick.model.layers[0].up, bert.Bfloat16)
    for a, b in zip(tagger.Tagger.of(saved["full"], precision="fp32").log_probs(texts), quick.log_probs(texts), strict=True):
        assert np.abs(np.exp(a) - np.exp(b)).mean() < 0.02


# Eight bits.

native = pytest.mark.skipif(not bert.int8_is_native(), reason="this CPU does not multiply bytes natively")


@native
def test_an_int8_layer_is_within_its_rounding_of_the_plain_one():
    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40)
    x = torch.randn(50, 96) * torch.logspace(-1, 1, 96) + torch.randn(96) * 20
    with torch.inference_mode():
        made = bert.Int8.smoothed(plain, *x.aminmax(dim=0), alpha=0.7)
        step, zero, levels = 1 / made.per_step, made.zero - made.ROUND, made.levels(x)
        assert ((levels.float() - zero) * step - x).abs().le(step / 2 * 1.001).all()
        assert (levels.amin(0) <= 2).any() and (levels.amax(0) >= 253).any()  # the middle of a range is the middle level
        scale = (plain.weight * step).abs().amax(1) / 127
        moved = (levels.float() - 128).abs().sum(1, keepdim=True) + 96 / 2
        bound = plain.weight.abs() @ step / 2 + moved * scale / 2
        assert ((made(levels) - plain(x)).abs() <= bound * 1.001).all()
        varying = plain(x) - plain(x).mean(0)
        assert (made(levels) - plain(x)).pow(2).mean() < 1e-3 * varying.pow(2).mean()
        assert torch.allclose(made.add(levels, torch.ones(50, 40)), made(levels) + 1, atol=1e-4)
        gelu = torch.nn.functional.gelu(made(levels))
        assert ((made.gelu(levels, 0.02, 16).float() - 16) * 0.02 - gelu.clamp(max=239 * 0.02)).abs().max() < 0.0101
        assert made.levels(torch.full((1, 96), 1e6)).unique().tolist() == [255]
        assert made.levels(torch.full((1, 96), -1e6)).unique().tolist() == [0]


@native
def test_a_value_far_above_all_others_does_not_cost_them_their_steps(saved, monkeypatch):
    def layer():
        made = bert.load(saved["full"])[0]
        made.layers[0].up[0].bias[3] = 70
        return made

    ids, mask = torch.arange(5, 60)[None], torch.ones(1, 55, dtype=torch.long)
    with torch.inference_mode():
        expected = layer()(ids, mask).logits
        errors = []
        for odd in (0.99, 1):
            monkeypatch.setattr(bert.Int8Layer, "ODD", odd)
            made = layer().to_int8(ids.tolist())
            errors.append((made(ids, mask).logits - expected).abs().mean())
            best = expected[0].topk(2).indices
            leads = [logits[0].gather(1, best).diff() for logits in (made(ids, mask).logits, expected)]
            assert made.error == pytest.approx(float((leads[0] - leads[1]).pow(2).mean().sqrt()), rel=1e-3)
    assert errors[0] < errors[1] / 3


@native
def test_sentences_longer_than_the_encoder_takes_are_cut(saved):
    made = bert.load(saved["full"])[0]
    most = made.embeddings["position_embeddings"].num_embeddings
    ids = torch.full((1, 8), 7)
    assert made.to_int8([[7] * (most + 9)])(ids, torch.ones_like(ids)).logits.isfinite().all()


@native
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_int8_gives_nearly_the_same_probabilities(saved, tuning):
    """On a random model, which is sure of nothing, so most tags hang on little."""
    texts = [list(TEXTS[0] * n) for n in (1, 2, 9)] + [list(text) for text in TEXTS] + [[]]
    exact = tagger.Tagger.of(saved[tuning], precision="fp32")
    quick = tagger.Tagger.of(saved[tuning], precision="int8")
    assert isinstance(quick.model.layers[0], bert.Int8Layer) and isinstance(exact.model.layers[0], bert.Layer)
    same = total = 0
    for text, a, b in zip(texts, exact.log_probs(texts), quick.log_probs(texts), strict=True):
        assert a.shape == b.shape == (len(text), len(LABELS))
        if text:
            assert np.abs(np.exp(a) - np.exp(b)).mean() < 0.02
            same, total = same + (a.argmax(1) == b.argmax(1)).sum(), total + len(text)
    assert same / total > 0.9


@native
def test_int8_tags_do_not_depend_on_the_batch(saved):
    quick = tagger.Tagger.of(saved["lora"], precision="int8")
    texts = [list(text) for text in TEXTS] + [list(TEXTS[0] * n) for n in (2, 3, 20)]
    for alone, together in zip(texts, quick.log_probs(texts), strict=True):
        assert np.allclose(quick.log_probs([alone])[0], together, atol=0.02)


@native
def test_what_eight_bits_are_not_sure_of_is_tagged_exactly(saved):
    texts = [list(TEXTS[0][start:] * n) for start in range(9) for n in (1, 2, 9)] + [[]]
    exact = tagger.Tagger.of(saved["lora"], precision="fp32")
    quick = tagger.Tagger.of(saved["lora"], precision="int8").log_probs(texts)
    made = tagger.Tagger.of(saved["lora"], precision="auto")
    made.exact = exact.model  # in float32, so that the two are told apart on any CPU
    made.model.error = 0.01
    found, exact = made.log_probs(texts), exact.log_probs(texts)
    sides = set()
    for a, b, both in zip(quick, exact, found, strict=True):
        if len(made.units.windows([["北"] * len(a)])) == 1:
            side = "exact" if np.diff(np.sort(a, 1)[:, -2:]).min() < tagger.LEAD * 0.01 else "quick"
            sides.add(side)
            assert np.allclose(both, b if side == "exact" else a, atol=1e-5)
    assert sides == {"exact", "quick"}
    for error, all_of in ((1e9, exact), (0, quick)):
        made.model.error = error
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(made.log_probs(texts), all_of, strict=True))


@native
def test_auto_is_eight_bits_and_what_the_cpu_does_best_beside_them(saved):
    made = tagger.Tagger.of(saved["full"], precision="auto").model
    assert isinstance(made.layers[0], bert.Int8Layer) and not isinstance(made.exact.layers[0], bert.Int8Layer)
    expected = torch.bfloat16 if bert.bfloat16_is_native() else torch.float32
    assert {weight.dtype for weight in made.exact.parameters()} == {expected}
    for precision in ("int8", "fp32", "bf16"):
        assert tagger.Tagger.of(saved["full"], precision=precision).exact is None


@pytest.mark.parametrize("why", ["the CPU cannot", "another tuning", "not asked for"])
def test_where_there_is_no_int8(saved, monkeypatch, why):
    if why == "the CPU cannot":
        monkeypatch.setattr(bert, "int8_is_native", lambda: False)
    tuning, precision = "dora" if why == "another tuning" else "lora", "fp32" if why == "not asked for" else "int8"
    made = tagger.Tagger.of(saved[tuning], precision=precision)
    assert not made.exact and not any(isinstance(module, bert.Int8) for module in made.model.modules())
    tags, scores = made.tag([list(TEXTS[0])])[0]
    assert len(tags) == len(scores) == len(TEXTS[0])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_batches_on_a_cpu_are_small_and_whole(saved, precision):
    made = tagger.Tagger.of(saved["full"], precision=precision)
    windows = made.units.windows([["北"] * n for n in range(120)])
    found = list(made._batches(windows, torch.device("cpu")))
    assert sorted(id(w) for batch in found for w in batch) == sorted(map(id, windows))
    assert max(len(batch) for batch in found) <= made.batch_size
    assert max(len(batch) * len(batch[0].ids) for batch in found) <= tagger.TOKENS
    assert len(made._batches(windows[-10:], torch.device("cpu"))) > 1  # one for each thread of a small machine
    assert [len(batch) for batch in made._batches(windows, torch.device("cuda"))][:-1] == [32] * (len(windows) // 32)


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_batches_on_several_threads_give_what_one_gives(saved, tuning):
    before = torch.get_num_threads()
    texts, found = [list(TEXTS[0] * (1 + n % 3)) for n in range(90)], []
    made = tagger.Tagger.of(saved[tuning], precision="fp32")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(made.log_probs(texts))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, several) for one, several in zip(*found, strict=True))
