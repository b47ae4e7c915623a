"""A saved BERT tagger without transformers, for tagger.load: importing that takes longer than tagging a page.

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

import fast

FULL, MERGED = ("full", "bitfit", "freeze"), ("lora", "rslora")  # tunings whose weights are one plain BERT's


def _weights(settings: dict, labels: int) -> nn.Module:
    """The weights of a BertForTokenClassification without a pooler, under transformers' names."""
    hidden, inner, eps = settings["hidden_size"], settings["intermediate_size"], settings["layer_norm_eps"]

    def normed(width):
        return nn.ModuleDict({"dense": nn.Linear(width, hidden), "LayerNorm": nn.LayerNorm(hidden, eps)})

    def layer():
        return nn.ModuleDict({
            "attention": nn.ModuleDict({
                "self": nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")}),
                "output": normed(hidden)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(hidden, inner)}),
            "output": normed(inner)})

    def table(size):
        """An embedding that draws no weights: drawing them here makes torch import its compiler, over a second."""
        return nn.Embedding(settings[size], hidden, _weight=torch.empty(settings[size], hidden))

    tables = {"word_embeddings": table("vocab_size"), "position_embeddings": table("max_position_embeddings"),
              "token_type_embeddings": table("type_vocab_size")}
    made = nn.ModuleDict({
        "bert": nn.ModuleDict({
            "embeddings": nn.ModuleDict(tables | {"LayerNorm": nn.LayerNorm(hidden, eps)}),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(
                layer() for _ in range(settings["num_hidden_layers"]))})}),
        "classifier": nn.Linear(hidden, labels)})  # fmt: skip
    made.base_model_prefix = "bert"
    return made


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """An nn.Linear of these tensors."""
    made = nn.Linear(*weight.shape[::-1], device="meta")
    made.weight, made.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return made


class Layer(nn.Module):
    """One layer of BERT. Query, key and value are one product, in which the scaling of the scores is contained."""

    def __init__(self, weights: nn.ModuleDict, heads: int):
        super().__init__()
        parts, output = [weights["attention"]["self"][name] for name in ("query", "key", "value")], weights["output"]
        scales = (parts[0].out_features / heads) ** -0.5, 1.0, 1.0
        self.qkv = _linear(*(torch.cat([getattr(part, name) * scale for part, scale in zip(parts, scales)])
                             for name in ("weight", "bias")))  # fmt: skip
        self.out, self.out_norm = weights["attention"]["output"]["dense"], weights["attention"]["output"]["LayerNorm"]
        self.up = nn.Sequential(weights["intermediate"]["dense"], nn.GELU())
        self.down, self.norm = output["dense"], output["LayerNorm"]

    def forward(self, x, rows):
        """x [rows, hidden], the tokens of a batch as fast.Rows has them."""
        x = self.out_norm(self.out(fast.attend(self.qkv(x), rows, 1.0)[0].to(x.dtype)).add_(x))
        return self.norm(self.down(self.up(x)).add_(x))


class Int8(nn.Module):
    """A linear layer in 8 bits, with a scale for each output of the weight and one for each row of the input.

    One scale for a whole input would cost up to a point of F1 (a few tokens have values twenty times those of the
    others) and make the tags of a sentence depend on its batch. After a GELU, below whose -0.17 nothing lies, most of
    the range is left to what is positive.
    """

    ROUND = 1.5 * 2**23  # added to a float32 it leaves no fraction, and the low byte counts in ones

    def __init__(self, linear: nn.Linear, after_gelu: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
        self.weight = packed, scale, torch.zeros(len(weight), dtype=torch.int32)
        self.bias, self.after_gelu, self.dtype = linear.bias.detach().float(), after_gelu, dtype

    def forward(self, x):
        """float32 [rows, in] -> dtype [rows, out]."""
        high = x.amax(1, keepdim=True)
        if self.after_gelu:
            zero, step = 16, high.div_(255 - 16).clamp_(min=0.17 / 16)
        else:
            zero, step = 128, torch.maximum(high, -x.amin(1, keepdim=True)).div_(127).clamp_(min=1e-12)
        levels = (x * step.reciprocal()).add_(self.ROUND + zero).view(torch.int32).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(levels, 1.0, zero, *self.weight, None, 1.0, 0, torch.float32,
                                               "none", [], "")
        return y.mul_(step).add_(self.bias).to(self.dtype)


class Bfloat16(nn.Module):
    """A linear layer whose weight lies in memory as this CPU's bfloat16 products take it, with a GELU in the same pass."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), None)
        self.bias, self.after = linear.bias.detach().bfloat16(), ("gelu", [], "none") if gelu else ("none", [], "")

    def forward(self, x):
        """bfloat16 [rows, in] -> bfloat16 [rows, out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)


class Bert(nn.Module):
    """BertForTokenClassification's logits, without padding's; inference on a CPU only."""

    ROUND = 16  # rows

    def __init__(self, weights: nn.ModuleDict, heads: int):
        super().__init__()
        self.heads = heads
        self.embeddings, self.classifier = weights["bert"]["embeddings"], weights["classifier"]
        self.layers = nn.ModuleList(Layer(layer, heads) for layer in weights["bert"]["encoder"]["layer"])

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask int64 [batch, length] -> .logits [batch, length, labels], 0 where padding is."""
        table, rows = self.embeddings, fast.Rows(attention_mask.bool(), self.heads, self.ROUND)
        x = table["word_embeddings"](rows.pack(input_ids)) + table["token_type_embeddings"].weight[0]
        x = table["LayerNorm"](x + table["position_embeddings"](rows.position))
        for layer in self.layers:
            x = layer(x, rows)
        return SimpleNamespace(logits=rows.unpack(self.classifier(x)))

    def to_int8(self):
        """Has the layers multiply in 8 bits where int8_is_native(); what else is float32 stays so."""
        dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # of attention
        for layer in self.layers:
            layer.qkv, layer.out, layer.up[0] = Int8(layer.qkv, dtype=dtype), Int8(layer.out), Int8(layer.up[0])
            layer.down = Int8(layer.down, after_gelu=True)
        fast.hold_memory()  # clearing new memory takes a third of the time
        return self

    def to_bfloat16(self):
        """Has all of it compute in bfloat16 where bfloat16_is_native()."""
        for layer in self.layers:
            layer.qkv, layer.out, layer.down = Bfloat16(layer.qkv), Bfloat16(layer.out), Bfloat16(layer.down)
            layer.up = Bfloat16(layer.up[0], gelu=True)
        return self.to(torch.bfloat16)


def bfloat16_is_native() -> bool:
    """Whether this CPU multiplies bfloat16 natively and this PyTorch has the operators."""
    return fast.choose("auto", "cpu")[0] == torch.bfloat16 and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def int8_is_native() -> bool:
    """Whether this CPU multiplies bytes natively (VNNI) and this PyTorch has the operators."""
    return torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qlinear_prepack")


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
            model = _weights(settings, len(meta["labels"]))
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
        return Bert(model, settings["num_attention_heads"]).eval(), Tokenizer(folder), meta
    except Exception:  # whatever a damaged folder raises: model.load finds the words for it
        return None
