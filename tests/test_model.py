"""Config and labels → a model: each tuning trains what it says; logits, labels and positions fit."""

import built_model
import pytest
import torch
from built_model import LABELS, batch, built, logits

from ner import meta as meta_file
from ner import model
from ner.errors import UserError
from ner.tunings import TUNINGS


@pytest.fixture(scope="session")
def encoders():
    return built_model.encoders()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_only_what_the_tuning_trains_is_trained(encoders, tuning):
    network, _, _ = built(encoders["bert"], "--tuning", tuning)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert any("classifier" in name for name in trained)
    rest = {name for name in trained if "classifier" not in name}
    assert model.head_weights(network) == trained - rest
    assert {
        "full": len(rest) == len(list(network.bert.parameters())) if tuning == "full" else None,
        "bitfit": bool(rest) and all(name.endswith("bias") for name in rest),
        "freeze": not rest,
        "ia3": bool(rest) and all("ia3_" in name for name in rest),
    }.get(tuning, bool(rest) and all("lora_" in name or "prompt_encoder" in name for name in rest))


@pytest.mark.parametrize("tuning", ["lora", "prompt", "full"])
def test_the_trainable_line_is_pefts(encoders, tuning, capsys):
    network, _, _ = built(encoders["bert"], "--tuning", tuning)
    line = model.trainable_line(network)
    if tuning == "full":
        count = sum(weight.numel() for weight in network.parameters())
        assert line == f"trainable params: {count:,d} || all params: {count:,d} || trainable%: 100.0000"
    else:
        network.print_trainable_parameters()
        assert capsys.readouterr().out.strip() == line


@pytest.mark.parametrize("tuning", [name for name, tuning in TUNINGS.items() if tuning.virtual_tokens])
@pytest.mark.parametrize("kind, positions", [("bert", 128), ("roberta", 64)])
def test_virtual_tokens_fit_labels_and_positions(encoders, tuning, kind, positions):
    argv = ("--tuning", tuning, "--virtual_tokens", "5", "--max_length", "200")
    network, _, meta = built(encoders[kind], *argv)
    assert (meta["max_length"], meta["virtual_tokens"]) == (positions - 5, 5)
    longest = torch.full((2, meta["max_length"]), 7)
    assert network(input_ids=longest, attention_mask=torch.ones_like(longest)).logits.shape == (2, positions - 5, 5)
    assert network(longest, torch.ones_like(longest)).logits.shape == (2, positions - 5, 5)
    inputs = batch()
    alone = {"input_ids": inputs["input_ids"][1:2, :6], "attention_mask": inputs["attention_mask"][1:2, :6]}
    with torch.no_grad():
        torch.testing.assert_close(network(**inputs).logits[1, :6], network(**alone).logits[0], atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=f"give at most {positions - 8}"):
        built(encoders[kind], "--tuning", tuning, "--virtual_tokens", str(positions - 7))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_runs_in_bfloat16(encoders, tuning):
    network, _, _ = built(encoders["bert"], "--tuning", tuning)
    wanted = logits(network)
    torch.testing.assert_close(logits(network.to(torch.bfloat16)).float(), wanted, atol=0.15, rtol=0.1)


def test_labels_and_dropout_are_in_the_model(encoders, tmp_path):
    network, tokenizer, meta = built(encoders["bert"], "--tuning", "full", "--dropout", "0.3")
    assert network.config.id2label == dict(enumerate(LABELS)) and network.config.label2id["I-PER"] == 4
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    kept = built(encoders["bert"])[0]  # dropout: null
    assert {module.p for module in kept.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    assert set(meta) == set(meta_file.KEYS)
