"""A run folder as main.py leaves it, with a model whose trained weights are random, and ways to tag with it."""

import json
from pathlib import Path

import pytest
import torch

from ner import config, decoding, model, saved_model
from ner.predictor import Predictor
from ner.tagging import Tagger

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TEXTS = ["江泽民在北京会见了比尔·盖茨。", "上海", "她没有回答，1998年3月。", "据新华社报道"]
SCORES = {key: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 8} for key in ("micro", "macro", "weighted")}
SCORES["types"] = {"LOC": SCORES["micro"], "PER": SCORES["micro"]}


def run_of(folder: Path, encoder: Path, *argv: str) -> Path:
    """Make the run in `folder` on this encoder; argv: more keys of the config."""
    argv = [
        "--pretrained",
        str(encoder),
        "--lora.r",
        "4",
        "--max_length",
        "64",
        "--head",
        "softmax",
        "--decode",
        "argmax",
        *argv,
    ]
    made = config.load(argv)[0]
    torch.manual_seed(0)
    network, tokenizer, meta = model.build(made, LABELS, "character")
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    saved_model.save(network, tokenizer, meta, folder / "model")
    (folder / "config.yaml").write_text(config.dump(made), "utf-8")
    (folder / "test.json").write_text(json.dumps(SCORES))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "dev": SCORES}) + "\n")
    rows = "".join(json.dumps({"chars": list(text)}) + "\n" for text in TEXTS)
    (folder / "predictions.jsonl").write_text(rows, "utf-8")
    return folder


def tagged(folder: Path, texts: list[str]) -> list:
    """The entities that predict.py finds, in float32 whatever the device does fastest."""
    found = Predictor(Tagger(*saved_model.load(folder))).predict(texts)
    return [[(one.type, one.start, one.end, pytest.approx(one.score, abs=1e-4)) for one in row] for row in found]


def piped(folder: Path, texts: list[str]) -> list:
    """The entities by strict IOB2 in the tags of transformers' pipeline, which gives one for each character."""
    from transformers import pipeline

    tagger = pipeline("token-classification", model=str(folder), ignore_labels=[])
    entities = []
    for row in tagger(texts, batch_size=16):
        assert [one["end"] - one["start"] for one in row] == [1] * len(row)
        found = decoding.spans([one["entity"] for one in row])
        scores = [float(sum(one["score"] for one in row[start:end]) / (end - start)) for _, start, end in found]
        places = [(row[start]["start"], row[end - 1]["end"]) for _, start, end in found]
        entities.append([(span[0], *place, score) for span, place, score in zip(found, places, scores, strict=True)])
    return entities


def without_scores(rows: list) -> list:
    return [[one[:3] for one in row] for row in rows]
