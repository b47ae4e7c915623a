"""Made runs, and a page as a browser's parser sees it, for the tests of ner/report.py and what it is made of."""

import html.parser
import json
import random
from pathlib import Path

from hypothesis import strategies as st

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def numbers(f1, support=10):
    return {"precision": f1 + 0.01, "recall": f1 - 0.01, "f1": f1, "support": support}


def scores(f1=0.85, types=("LOC", "ORG", "PER")):
    return {
        "micro": numbers(f1, 30),
        "macro": numbers(f1 - 0.02),
        "weighted": numbers(f1 - 0.01),
        "accuracy": 0.97,
        "types": {name: numbers(f1 - 0.03 * i) for i, name in enumerate(types)},
    }


def sentence(text, gold, predicted):
    """A line of predictions.jsonl from entities (type, start, end)."""
    lists = []
    for entities in (gold, predicted):
        tags = ["O"] * len(text)
        for name, start, end in entities:
            tags[start:end] = [f"B-{name}"] + [f"I-{name}"] * (end - start - 1)
        lists.append(tags)
    return {"chars": list(text), "gold": lists[0], "predicted": lists[1]}


def fill(run: Path, sentences=None) -> Path:
    """A finished run's files."""
    run.mkdir(parents=True)
    draw = random.Random(3)
    if sentences is None:
        sentences = [
            sentence(
                "江泽民在北京会见比尔·盖茨",
                [("PER", 0, 3), ("LOC", 4, 6), ("PER", 8, 13)],
                [("PER", 0, 3), ("LOC", 4, 7), ("ORG", 8, 13)],
            )
            for _ in range(60)
        ]
        sentences.append(sentence("新华社北京电", [("ORG", 0, 3), ("LOC", 3, 5)], [("ORG", 0, 3), ("LOC", 3, 5)]))
    (run / "predictions.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sentences))
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "epoch": e,
                    "train_loss": 0.5 / e,
                    "dev_loss": 0.4 / e,
                    "dev": scores(0.8 + draw.random() / 10),
                    "seconds": 30.0,
                    "tokens_per_second": 8000,
                    "learning_rate": 1e-3,
                }
            )
            + "\n"
            for e in range(1, 5)
        )
    )
    (run / "test.json").write_text(json.dumps(scores(0.8765)))
    (run / "config.yaml").write_text("tuning: lora  # 调优\nlearning_rate: 0.001\n", encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"device": "cpu", "versions": {"torch": "2.13.0"}}))
    (run / "train.log").write_text(
        "2024-05-06 10:49:17,983 - __main__ - WARNING - 12 sentences of train are in test\n"
        "2024-05-06 10:49:17,983 - __main__ - INFO - epoch 1 begin\n"
    )
    return run


@st.composite
def entities(draw):
    at, found = 0, []
    for gap, length, name in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("XYZ")))):
        found.append((name, at + gap, at + gap + length))
        at += gap + length
    return found
