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
from torch.nn.utils.rnn import pad_sequence

from ner import kernels as fast

SENTENCES = (  # of many kinds, for Int8Layer to see how large activations become
    "昨天下午，市长王建国在南京会见了来访的法国汽车公司总裁皮埃尔·杜邦一行。",
    "据新华社上海3月15日电（记者李娜）今年前两个月，全市进出口总额达2,368.5亿元，同比增长7.2%。",
    "我觉得这部电影不太好看，情节拖沓，演员也没什么演技……你说呢？",
    "求购：二手iPhone 13 Pro（256GB），北京海淀区可面交，价格不超过￥3000，联系微信：abc_123。",
    "《红楼梦》第五回写道：“世事洞明皆学问，人情练达即文章。”",
    "患者张某，男，62岁，因反复胸闷、气促两周入院，既往有高血压、2型糖尿病病史。",
    "第十二条　合同当事人一方不履行义务的，应当承担继续履行、采取补救措施或者赔偿损失等责任；",
    "晚上8:30，中国女排在东京以3∶1战胜巴西队，朱婷独得28分！",
)
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
    """A linear layer that multiplies bytes: its input in levels of a step for each channel, its weight in 127 either way
    of a scale for each output."""

    ROUND = 1.5 * 2**23  # a float32 near it has no fraction, and its low byte counts in ones

    def __init__(self, linear: nn.Linear, step: torch.Tensor | float, zero: int = 128, shift: torch.Tensor | float = 0):
        """step: float32 [in], or one number for all; zero: the level of an input of `shift` steps, a whole number."""
        super().__init__()
        weight = linear.weight.detach().float() * step
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        packed = torch.ops.onednn.qlinear_prepack((weight / scale[:, None]).round().to(torch.int8), None)
        self.weight = 1.0, zero, packed, scale, torch.zeros(len(weight), dtype=torch.int32)
        self.bias = linear.bias.detach().float() + (weight * shift).sum(1)
        self.per_step, self.zero = 1 / step, self.ROUND + zero - shift

    @classmethod
    def smoothed(cls, linear: nn.Linear, low: torch.Tensor, high: torch.Tensor, alpha: float):
        """With steps for inputs from low to high, float32 [in], the middle of which is the middle level. Where some of
        these ranges are far wider than others, some of that becomes the weight's: SmoothQuant, Xiao et al. 2023, eq. 4."""
        largest = (high - low) / 2
        largest = largest.clamp(min=float(largest.median()) / 10)
        share = largest**alpha / linear.weight.detach().abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
        step = share * (largest / share).max() / 127
        return cls(linear, step, shift=((high + low) / 2 / step).round())

    def levels(self, x):
        """float32 [rows, in] -> uint8: the nearest level, which is the last one for all beyond it."""
        x = torch.addcmul(self.zero, x, self.per_step).clamp_(self.ROUND, self.ROUND + 255)
        return x.view(torch.int32).to(torch.uint8)

    def forward(self, levels, dtype=torch.float32):
        """uint8 [rows, in] -> dtype [rows, out]."""
        return torch.ops.onednn.qlinear_pointwise(levels, *self.weight, self.bias, 1.0, 0, dtype, "none", [], "")

    def gelu(self, levels, step, zero):
        """uint8 [rows, in] -> uint8 [rows, out]: the levels of the product's GELU, of this step and zero."""
        return torch.ops.onednn.qlinear_pointwise(
            levels, *self.weight, self.bias, step, zero, torch.uint8, "gelu", [], "none")  # fmt: skip

    def add(self, levels, x):
        """Adds the product of levels, uint8 [rows, in], to float32 x [rows, out]."""
        return torch.ops.onednn.qlinear_pointwise.binary(
            levels, *self.weight, x, self.bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")  # fmt: skip


class Int8Layer(nn.Module):
    """A Layer whose products are of bytes, with the steps that a few sentences call for.

    The step of an input is the same for all texts, so that a product can end in the bytes that the next one takes. What
    would stretch the steps are a few channels in which some tokens have values ten times those of all others: of
    the inputs that a normalization leaves, Int8.smoothed takes care; of a GELU's outputs those stay in float32."""

    ODD = 0.99  # the quantile of a GELU's largest outputs beyond which they are odd
    ZERO = 16  # the level of 0 after a GELU, below whose -0.17 nothing lies: most of the range is what is positive

    def __init__(self, layer: Layer, ranges: dict):
        """ranges: for each linear layer of `layer` the lowest and the highest number that each channel of its input is to
        hold."""
        super().__init__()
        up, most = layer.up[0], torch.maximum(*(end.abs() for end in ranges[layer.out]))
        self.dtype = fast.choose("auto", "cpu")[0]  # of attention
        # 0.8, 0.6 and a middle of 0 here gave the least error of those tried, on runs of LoRA and of full tuning.
        self.qkv, self.up = (Int8.smoothed(linear, *ranges[linear], 0.8) for linear in (layer.qkv, up))
        self.out = Int8.smoothed(layer.out, -most, most, 0.6)
        inner = ranges[layer.down][1]
        odd = inner > inner.quantile(self.ODD)
        self.odd = (up.weight[odd], up.bias[odd], layer.down.weight[:, odd].t().contiguous()) if odd.any() else None
        self.step = max(float(inner[~odd].max()) / (255 - self.ZERO), 0.17 / self.ZERO)
        even = _linear(layer.down.weight.masked_fill(odd, 0), layer.down.bias)
        self.down = Int8(even, self.step, self.ZERO)
        self.out_norm, self.norm = layer.out_norm, layer.norm

    def forward(self, x, rows):
        """x float32 [rows, hidden], which is overwritten."""
        seen = fast.attend(self.qkv(self.qkv.levels(x), self.dtype), rows, 1.0)[0]
        x = self.out_norm(self.out.add(self.out.levels(seen.float()), x))
        inner = self.up.gelu(self.up.levels(x), self.step, self.ZERO)
        if self.odd:
            weight, bias, down = self.odd
            x = x.addmm_(nn.functional.gelu(nn.functional.linear(x, weight, bias)), down)
        return self.norm(self.down.add(inner, x))


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
    """BertForTokenClassification's logits, without padding's; inference on a CPU only.

    `exact`, where there is one, is the same model in a more exact type, for what an 8-bit one is not sure of."""

    ROUND = 16  # rows
    BEYOND = 1.1  # in 8 bits, how far a range goes on the way from one end of the numbers seen to the other

    def __init__(self, weights: nn.ModuleDict, heads: int):
        super().__init__()
        self.heads, self.exact, self.error = heads, None, 0.0
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

    def to_int8(self, sentences: list[list[int]]):
        """Has the layers multiply in 8 bits where int8_is_native(), with the steps that these sentences, token ids, call
        for; what else is float32 stays so.

        `error` becomes the root mean square, over their tokens, of what that changes in the lead of the best label over
        the next, in logits."""
        ranges, hooks = {}, []

        def look(linear, inputs):
            low, high = inputs[0].aminmax(dim=0)
            ranges[linear] = torch.lerp(high, low, self.BEYOND), torch.lerp(low, high, self.BEYOND)

        for layer in self.layers:
            hooks += [linear.register_forward_pre_hook(look) for linear in layer.modules() if type(linear) is nn.Linear]
        before = self._logits(sentences)
        for hook in hooks:
            hook.remove()
        self.layers = nn.ModuleList(Int8Layer(layer, ranges) for layer in self.layers)
        best = before.topk(2).indices
        self.error = float((self._logits(sentences) - before).gather(1, best).diff().square().mean().sqrt())
        return self

    @torch.no_grad()
    def _logits(self, sentences):
        """[tokens of all sentences, labels]"""
        most = self.embeddings["position_embeddings"].num_embeddings
        ids = [torch.tensor(sentence[:most]) for sentence in sentences]
        ids, mask = (pad_sequence(rows, batch_first=True) for rows in (ids, [torch.ones_like(row) for row in ids]))
        return self(ids, mask).logits[mask.bool()]

    def to_type(self, dtype: torch.dtype):
        """Has all of it compute in this type."""
        if dtype == torch.bfloat16 and bfloat16_is_native():
            for layer in self.layers:
                layer.qkv, layer.out, layer.down = Bfloat16(layer.qkv), Bfloat16(layer.out), Bfloat16(layer.down)
                layer.up = Bfloat16(layer.up[0], gelu=True)
        return self.to(dtype)


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
    from ner import model as models

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
