"""bert.py gives the logits and the token ids that transformers gives, and leaves to model.py what is not its own."""

import json
import shutil

import pytest
import tiny
import torch

import bert
import config
import model
import predict

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
    quick = predict.load(saved[tuning])
    assert isinstance(quick.tagger.model, bert.Bert)
    found = quick.predict(TEXTS)
    monkeypatch.setattr(bert, "load", lambda folder: None)
    plain = predict.load(saved[tuning]).predict(TEXTS)
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


def test_transformers_is_not_imported(saved):
    import subprocess
    import sys
    code = ("import sys, predict; predict.load(sys.argv[1]).predict(['北京']); "
            "sys.exit(any(name in sys.modules for name in ('transformers', 'peft')))")
    assert subprocess.run([sys.executable, "-c", code, str(saved["lora"])], cwd=config.ROOT).returncode == 0
