"""A tiny run that knows the names of tiny.py, with its 8-bit export, made once for all tests of tagging."""

import functools
import shutil
from pathlib import Path

import folders
import tiny
import torch
from hypothesis import strategies as st

from ner import batches, config, export, model, saved_model
from ner.corpus import Sentence
from ner.predictor import Entity, Predictor, Result
from ner.tagging import Tagger
from ner.windows import Windower

LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
TEXT = "王芳出生于北京，现在住在武汉；"
ENTITIES = [("王芳", "PER", 0, 2), ("北京", "LOC", 5, 7), ("武汉", "LOC", 12, 14)]


def build(folder, tokenizer, unit="character", seed=0):
    """Return a random model on a tiny encoder: (model, tokenizer, meta)."""
    arguments = ["--pretrained", str(tiny.encoder(folder, tokenizer)), "--tuning", "full", "--max_length", "64"]
    arguments += ["--head", "softmax"]
    settings, _ = config.load([*arguments, "--dropout", "0"])
    torch.manual_seed(seed)
    return model.build(settings, LABELS, unit)


@functools.cache
def run() -> Path:
    """Return the folder of a run without an export."""
    folder = folders.until_exit("ner-trained-")
    network, tokenizer, meta = build(folder / "encoder", tiny.wordpiece())
    sentences = tiny.sentences(240)
    windows = Windower(tokenizer, "character", True, 64).windows([chars for chars, _ in sentences])
    gold = [[LABELS.index(tag) for tag in tags] for _, tags in sentences]
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    network.train()
    for epoch in range(6):
        for batch in batches.shuffled(windows, 16, seed=epoch):
            inputs = batches.collate(batch, tokenizer.pad_token_id, gold)
            logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    saved_model.save(network, tokenizer, meta, folder / "run" / "model")
    return folder / "run"


@functools.cache
def exported() -> Path:
    """Return the folder of the same run with model_int8.onnx in its model folder."""
    folder = folders.until_exit("ner-exported-")
    shutil.copytree(run(), folder / "run")
    dev = [Sentence(chars, tags, line) for line, (chars, tags) in enumerate(tiny.sentences(40, seed=2), 1)]
    export.write_onnx(folder / "run", "int8", dev)
    return folder / "run"


def plain(entities) -> list[tuple]:
    return [(e.text, e.type, e.start, e.end) for e in entities]


KINDS = {
    "wordpiece": ("character", tiny.wordpiece),
    "sentencepiece": ("character", tiny.sentencepiece),
    "bytelevel": ("character", tiny.bytelevel),
    "words": ("word", tiny.bytelevel),
}


@functools.cache
def random_predictor(kind: str) -> Predictor:
    """Return an untrained model: it sees entities everywhere, which makes offsets easy to get wrong."""
    unit, tokenizer = KINDS[kind]
    network, tokens, meta = build(folders.until_exit("ner-random-"), tokenizer(), unit, seed=5)
    return Predictor(Tagger(network, tokens, meta))


class Stub:
    """A predictor that finds the first character."""

    types, unit = ["PER"], "character"

    def results(self, texts):
        first = [[Entity(text[0], "PER", 0, 1, 1.0)] if text else [] for text in texts]
        return [Result(text, found, 1 / (1 + len(text))) for text, found in zip(texts, first, strict=True)]


# Characters that go wrong where characters, bytes, UTF-16 units or grapheme clusters are mistaken for each other.
ODD = ["张伟", "北京", "联合国", " ", "\u3000", "\n", "\t", "\x00", "\u200b", "\u200d", "\u202e", "\ufeff", "\u2028"]
ODD += ["e\u0301", "\u0301", "שלום", "مرحبا", "👩‍👩‍👧‍👦", "🇨🇳", "👍🏽", "\U00020000", "\ud800", "\udfff", "\ue000", "ﬁ"]
ODD += ["İ", "T-cells", "[CLS]", "<s>", "##", "▁", "。", "\u0e33", "각", "ก็", "\uffff"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=60).map("".join),
)
