"""Every kind of encoder that users have: tiny random ones train, save, load and predict, with lora and in full."""

import json

import pytest
import tiny
import torch
import transformers

from ner import config, export, kernels, model, saved_model
from ner.tagging import Tagger

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}

# name -> (config class, its settings)
ARCHITECTURES = {
    "roberta": ("RobertaConfig", SIZES),
    "electra": ("ElectraConfig", SIZES | {"embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "deberta": ("DebertaConfig", SIZES | RELATIVE),
    "deberta-v2": ("DebertaV2Config", SIZES | RELATIVE),
    "modernbert": ("ModernBertConfig", SIZES),
    "albert": ("AlbertConfig", SIZES | {"embedding_size": 16}),
    "xlm-roberta": ("XLMRobertaConfig", SIZES),
    "mpnet": ("MPNetConfig", SIZES),
    "xlnet": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    "roformer": ("RoFormerConfig", SIZES | {"embedding_size": 32}),
    "funnel": (
        "FunnelConfig",
        {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "block_sizes": [1, 1], "block_repeats": [1, 1]},
    ),
    "ernie": ("ErnieConfig", SIZES),
}
EXPORTED = ("roberta", "electra")


def encoder(folder, name):
    """Save a random encoder of this architecture with a character tokenizer."""
    tokenizer = tiny.wordpiece(folder)
    class_name, sizes = ARCHITECTURES[name]
    class_ = getattr(transformers, class_name)
    special = (
        {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3} if name == "modernbert" else {}
    )
    settings = class_(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **special)
    torch.manual_seed(0)
    transformers.AutoModelForTokenClassification.from_config(settings).base_model.save_pretrained(folder)
    return folder


def trained(folder, *argv):
    """Build a model on the encoder and train it for two steps, as the loop does on a CPU."""
    settings = config.load(
        ["--pretrained", str(folder), "--lora.r", "4", "--max_length", "32", "--head", "softmax", *argv]
    )[0]
    torch.manual_seed(0)
    network, tokenizer, meta = model.build(settings, LABELS, "character", kernels.attention_implementation("cpu"))
    kernels.prepare(network.train(), torch.float32, "cpu")
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, len(LABELS), ids.shape, generator=torch.Generator().manual_seed(2))
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-2)
    before = [weight.detach().clone() for weight in weights]
    for _ in range(2):
        logits = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    return network.eval(), tokenizer, meta


@pytest.mark.parametrize("tuning", ["lora", "rslora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_saves_loads_and_predicts(tmp_path, name, tuning):
    network, tokenizer, meta = trained(encoder(tmp_path / "encoder", name), "--tuning", tuning)
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    texts = [list("江泽民在北京会见了比尔·盖茨。"), list("上海")]
    expected = Tagger(network, tokenizer, meta).log_probs(texts)
    found = Tagger(*saved_model.load(tmp_path / "model")).log_probs(texts)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), atol=2e-5, rtol=0)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_files_tag_as_pytorch_does(tmp_path, name, tuning):
    from ner.engines import OnnxEngine

    network, tokenizer, meta = trained(encoder(tmp_path / "encoder", name), "--tuning", tuning)
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    row = export.write_onnx(tmp_path / "model", "fp32")
    texts = [chars for chars, _ in tiny.sentences(40)]
    engine = OnnxEngine(tmp_path / "model" / row.file, LABELS)
    expected = [tags for tags, *_ in Tagger(*saved_model.load(tmp_path / "model")).tag(texts)]
    assert [tags for tags, *_ in Tagger(engine, tokenizer, meta).tag(texts)] == expected
    assert json.loads((tmp_path / "model" / "onnx.json").read_text())["file"] == "model.onnx"
    row = export.write_onnx(tmp_path / "model", "int8")
    assert row.same_tags > 0.8 and not (tmp_path / "model" / "model.onnx").exists()
