"""What is made of the sentences of a corpus before training: a sample, the label list."""

from random import Random

from ner.formats import Corpus, Sentence


def sample(sentences: list[Sentence], n: int | None, seed: int) -> list[Sentence]:
    """`n` sentences drawn without replacement by `seed`, in their old order; all where n is None or not smaller."""
    if n is None or n >= len(sentences):
        return list(sentences)
    return [sentences[i] for i in sorted(Random(seed).sample(range(len(sentences)), n))]


def label_list(*parts: Corpus | list[Sentence]) -> list[str]:
    """The labels of a model for these sentences: O, then B- and I- of each type, types sorted."""
    tags = {tag for part in parts for sentence in getattr(part, "sentences", part) for tag in sentence.tags}
    types = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O"] + [prefix + kind for kind in types for prefix in ("B-", "I-")]
