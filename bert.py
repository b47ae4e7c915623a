"""A saved BERT tagger without transformers, for predict.py: importing that takes longer than tagging a page.

Only what the default encoder and its kin need: BERT, one token a character, trained in full or by LoRA. `load` answers
None for all else, and for a folder that is damaged in any way, so that model.load reads it, or says what is wrong with it.
tests/test_bert.py holds its logits to those of transformers.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

FULL, MERGED = ("full", "bitfit", "freeze"), ("lora", "rslora")  # tunings whose weights are one plain BERT's


def _block(hidden, inner, eps):
    """The weights of one layer, under transformers' names."""
    def normed(width):
        return nn.ModuleDict({"dense": nn.Linear(width, hidden), "LayerNorm": nn.LayerNorm(hidden, eps)})
    return nn.ModuleDict({
        "attention": nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}),
            "output": normed(hidden)}),
        "intermediate": nn.ModuleDict({"dense": nn.Linear(hidden, inner)}),
        "output": normed(inner)})


class Bert(nn.Module):
    """BertForTokenClassification's weights, names and logits; inference only."""

    base_model_prefix = "bert"

    def __init__(self, settings: dict, labels: int):
        super().__init__()
        hidden, eps = settings["hidden_size"], settings["layer_norm_eps"]
        self.heads = settings["num_attention_heads"]
        self.bert = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(settings["vocab_size"], hidden),
                "position_embeddings": nn.Embedding(settings["max_position_embeddings"], hidden),
                "token_type_embeddings": nn.Embedding(settings["type_vocab_size"], hidden),
                "LayerNorm": nn.LayerNorm(hidden, eps)}),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(
                _block(hidden, settings["intermediate_size"], eps) for _ in range(settings["num_hidden_layers"]))})})
        self.classifier = nn.Linear(hidden, labels)

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask int64 [batch, length] -> .logits [batch, length, labels]."""
        table = self.bert["embeddings"]
        x = table["word_embeddings"](input_ids) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + table["position_embeddings"].weight[:input_ids.shape[1]])
        mask = None if attention_mask.all() else attention_mask.bool()[:, None, None, :]
        for layer in self.bert["encoder"]["layer"]:
            parts, output = layer["attention"]["self"], layer["attention"]["output"]
            query, key, value = (parts[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                                 for name in ("query", "key", "value"))
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
            x = output["LayerNorm"](output["dense"](found) + x)
            inner = F.gelu(layer["intermediate"]["dense"](x))
            x = layer["output"]["LayerNorm"](layer["output"]["dense"](inner) + x)
        return SimpleNamespace(logits=self.classifier(x))


class Tokenizer:
    """What loader.Units asks of a transformers tokenizer, answered by the tokenizers library alone."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Fast

        self.fast = Fast.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        named = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
        ids = {name: self.convert_tokens_to_ids(token["content"] if isinstance(token, dict) else token)
               for name, token in named.items() if token}
        self.all_special_ids = list(dict.fromkeys(i for i in ids.values() if i is not None))
        self.unk_token_id, self.pad_token_id = ids.get("unk"), ids.get("pad")

    def convert_tokens_to_ids(self, token: str) -> int | None:
        found = self.fast.token_to_id(token)
        return self.fast.token_to_id("[UNK]") if found is None else found

    def __call__(self, texts, add_special_tokens=True, **_):
        if isinstance(texts, str):
            return {"input_ids": self.fast.encode(texts, add_special_tokens=add_special_tokens).ids}
        return {"input_ids": [e.ids for e in self.fast.encode_batch(texts, add_special_tokens=add_special_tokens)]}


def load(folder: Path):
    """(model in eval mode and float32, tokenizer, meta) of a run's model folder, or None where it is not of this kind."""
    import model as models

    folder = Path(folder) / "model" if (Path(folder) / "model" / "ner.json").exists() else Path(folder)
    try:
        meta = models.read_meta(folder)
        merged = meta["tuning"] in MERGED
        if meta["unit"] != "character" or not (merged or meta["tuning"] in FULL):
            return None
        source = folder / "encoder" if merged else folder
        settings = json.loads((source / "config.json").read_text("utf-8"))
        if settings["model_type"] != "bert" or settings["hidden_act"] != "gelu" or settings.get("is_decoder"):
            return None
        if list(settings["id2label"].values()) != meta["labels"]:
            return None
        with torch.device("meta"):
            model = Bert(settings, len(meta["labels"]))
        tensors = load_file(source / "model.safetensors")
        tensors = {name if name.startswith(("bert.", "classifier.")) else f"bert.{name}": tensor.float()
                   for name, tensor in tensors.items() if "pooler." not in name}
        if merged:
            for name, weight in model.classifier.named_parameters():
                tensors[f"classifier.{name}"] = torch.zeros(weight.shape)
        model.load_state_dict(tensors, assign=True)
        model.requires_grad_(False)
        if merged:
            adapter = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            if any(adapter.get(key) for key in models.UNUSUAL):
                return None
            model = models.merge_lora(model, load_file(folder / "adapter_model.safetensors"), adapter, folder)
        return model.eval(), Tokenizer(folder), meta
    except Exception:  # whatever a damaged folder raises: model.load finds the words for it
        return None
