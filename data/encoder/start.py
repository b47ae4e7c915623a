"""What training starts from: a vocabulary of characters, its tokenizer, and e5's layers and embeddings as a BERT."""

import collections
import contextlib
import json
import unicodedata
from pathlib import Path

import torch
from batches import SPECIALS
from e5 import E5File, bert_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LAYERS = [0, 2, 4, 6, 8, 10]  # of the twelve of multilingual-e5-small
SCRIPTS = ("CJK", "LATIN", "GREEK", "CYRILLIC", "HIRAGANA", "KATAKANA", "FULLWIDTH")
OF_E5 = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>", " ": "▁"}


def choose_characters(pieces: list[str], texts: list[str]) -> list[str]:
    """Return the vocabulary: the one-character pieces of e5 in the scripts that a Chinese text holds, all of GB2312,
    ASCII, full-width forms, and what occurs three times in the training text."""
    characters = {piece for piece in pieces if len(piece) == 1 and piece != "▁" and _is_wanted(piece)}
    for high in range(0xA1, 0xF8):
        for low in range(0xA1, 0xFF):
            with contextlib.suppress(UnicodeDecodeError):
                characters.add(bytes([high, low]).decode("gb2312"))
    characters.update(map(chr, range(0x20, 0x7F)))
    characters.update(map(chr, range(0xFF01, 0xFF5F)))
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    characters.update(c for c, n in counts.items() if n >= 3 and not unicodedata.category(c).startswith("C"))
    return sorted(characters)


def _is_wanted(character: str) -> bool:
    is_symbol = unicodedata.category(character)[0] in "PSN" and ord(character) < 0x10000
    return is_symbol or unicodedata.name(character, "").startswith(SCRIPTS)


def write_tokenizer(characters: list[str], folder: Path) -> dict[str, int]:
    """Write a fast tokenizer: one token a character (code point), nothing normalised, nothing dropped. Return its
    vocabulary."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])  # fmt: skip
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", clean_up_tokenization_spaces=False)  # fmt: skip
    fast.save_pretrained(folder)
    return vocab


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Return {character: its number} of the tokenizer in a folder."""
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]


def initialise(folder: Path, file: E5File, texts: list[str]) -> None:
    """Write a folder with every second layer of e5 and the embeddings of its one-character pieces."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(exist_ok=True)
    vocab = write_tokenizer(choose_characters(file.pieces, texts), folder)
    bert_of(file, LAYERS, _word_embeddings(file, vocab), pad_token_id=vocab["[PAD]"]).save_pretrained(folder)


def _word_embeddings(file: E5File, vocab: dict[str, int]) -> torch.Tensor:
    """float32 [vocabulary, hidden]: a character that e5 lacks starts from its compatibility form (NFKC) where that is
    one character that e5 knows, else from the mean of all ideographs."""
    row = {piece: i for i, piece in enumerate(file.pieces)}
    words = file.tensors["emb.word"].view(file.header["vocab"], -1)
    ideographs = [
        row[c] for c in vocab if c in row and "CJK UNIFIED" in (unicodedata.name(c, "") if len(c) == 1 else "")
    ]
    table = words[ideographs].mean(0).repeat(len(vocab), 1)
    missing = 0
    for token, i in vocab.items():
        form = unicodedata.normalize("NFKC", token)
        like = next((name for name in (OF_E5.get(token), token, form, form[:1]) if name in row), None)
        missing += like is None
        if like is not None:
            table[i] = words[row[like]]
    print(f"start: {len(vocab)} tokens, {missing} of them unknown to e5; layers {LAYERS}", flush=True)
    return table
