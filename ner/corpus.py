"""A corpus in memory: sentences with IOB2 tags, a sample of them, the label list of a model.

`ner.formats` reads files into these classes; nothing here knows how a file looks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from ner.errors import UserError


@dataclass(slots=True)
class Sentence:
    """One block of a file: n units (characters or words), their n IOB2 tags, and the line of the first (from 1)."""

    units: list[str]
    tags: list[str]
    line: int
    file: str = ""  # where it stands, if a corpus has several files


@dataclass
class Corpus:
    """The sentences of one file, its tag scheme and unit, and what was repaired or left out while reading it."""

    path: str
    sentences: list[Sentence]
    scheme: str  # "BIO", "IOB1", "BIOES", "BMES", "BILOU", or "offsets" where entities are given by their offsets
    repairs: int = 0  # orphan tags that were made to start an entity
    unit: str = "character"  # "word" when tokens of several characters are common
    skipped: int = 0  # entities dropped because they overlap another, which tags cannot express
    repair_line: int = 0  # where the first of the repairs stands
    unit_per_line: bool = True  # False where a line holds a whole sentence
    notes: list[str] = field(default_factory=list)  # what else the user should know of how the file was read
    file_types: frozenset[str] | None = None  # of a part of a file: the types of the whole file

    @property
    def unit_count(self) -> int:
        """The number of units in all sentences."""
        return sum(len(sentence.units) for sentence in self.sentences)

    def entities(self) -> Counter[str]:
        """Return how many entities there are of each type."""
        return Counter(tag[2:] for sentence in self.sentences for tag in sentence.tags if tag[0] == "B")

    def describe(self) -> str:
        """Return one log line: what was recognised, and the counts."""
        types = ", ".join(f"{type_} {count:,}" for type_, count in sorted(self.entities().items())) or "none"
        return (
            f"{self.path}: {len(self.sentences):,} sentences, {self.unit_count:,} {self.unit}s, "
            f"scheme {self.scheme}, entities: {types}, {self.repairs:,} repairs"
        )

    def warnings(self) -> list[str]:
        """Return what in this file was not as it should be, a line each."""
        warnings = []
        if self.repairs:
            warnings.append(
                f"{self.path}:{self.repair_line}: first of {self.repairs:,} orphan tags (an I-, M-, E- or L- "
                "without the beginning of its entity): each was made to start an entity"
            )
        if self.skipped:
            warnings.append(f"{self.path}: {self.skipped:,} entities dropped, as they overlap a longer or earlier one")
        if not self.entities():
            warnings.append(f"{self.path}: no entity in the whole file")
        return self.notes + warnings

    def part(self, sentences: list[Sentence], path: str | None = None) -> "Corpus":
        """Return some of the sentences as a corpus of their own, which knows the types of the whole file.

        With a `path`, the part's own name, the part does not repeat the file's repairs, skipped entities and notes.
        """
        types = self.file_types if self.file_types is not None else frozenset(self.entities())
        part = replace(self, sentences=sentences, file_types=types)
        return replace(part, path=path, repairs=0, repair_line=0, skipped=0, notes=[]) if path else part

    def place(self, sentence: Sentence, index: int = 0) -> str:
        """Return file:line of a sentence, or of the unit at `index` in it where each has a line of its own."""
        return f"{sentence.file or self.path}:{sentence.line + index * self.unit_per_line}"


def check_trainable(train: Corpus, *others: Corpus) -> None:
    """Raise UserError where a model cannot be trained on `train` and scored on the others."""
    if not train.entities():
        raise UserError(
            f"{train.path}: no entity in the {len(train.sentences):,} sentences to train on, every tag is O; give a "
            "file with tagged entities"
        )
    for other in others:
        check_unit(other, train.unit, train.path)


def check_unit(corpus: Corpus, unit: str, source: str) -> None:
    """Raise UserError where the units of a corpus are not those of `source`, the training file or the model."""
    if corpus.unit != unit:
        raise UserError(
            f"{corpus.path}: its lines hold {corpus.unit}s, those of {source} {unit}s; bring both into one form, a "
            f"{unit} and its tag a line"
        )


def sample(sentences: Sequence[Sentence], n: int | None, seed: int) -> list[Sentence]:
    """Return `n` sentences drawn without replacement by `seed`, in their old order; all where n is None or larger."""
    if n is None or n >= len(sentences):
        return list(sentences)
    return [sentences[i] for i in sorted(Random(seed).sample(range(len(sentences)), n))]


def label_list(*parts: Corpus | list[Sentence]) -> list[str]:
    """Return the labels of a model for these sentences: O, then B- and I- of each type, types sorted."""
    types: set[str] = set()
    for part in parts:
        sentences = part.sentences if isinstance(part, Corpus) else part
        types.update(tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O")
    return ["O"] + [prefix + type_ for type_ in sorted(types) for prefix in ("B-", "I-")]
