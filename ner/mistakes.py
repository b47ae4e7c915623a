"""Gold and predicted entities of sentences → which kinds of error there are, how many, and in which sentences."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ner.decoding import spans
from ner.markup import LONGEST_GAP, language, segments
from ner.run_files import Prediction

WORST = 50  # sentences shown
CORRECT, BOUNDARY, TYPE, BOTH, MISSED, SPURIOUS = KINDS = (
    "correct",
    "wrong boundary",
    "wrong type",
    "wrong both",
    "missed",
    "spurious",
)
MATCHED = (CORRECT, TYPE, BOUNDARY, BOTH)  # kinds of two entities that overlap, the better first
MANY_WORDS = 0.3  # with a larger share of units of several characters, the units are words

Entity = tuple[str, int, int]  # type, start, end: half-open, in units


class Pair(NamedTuple):
    """A gold entity with the predicted one that it is matched with; one of the two is None where it has no match."""

    kind: str  # one of KINDS
    gold: Entity | None
    predicted: Entity | None


def pairs(gold: list[Entity], predicted: list[Entity]) -> list[Pair]:
    """Match gold and predicted entities of one sentence, each at most once, so that all counts add up.

    The kinds are nervaluate's: same span and type (correct); overlap with the right type (wrong boundary); same span
    with another type (wrong type); overlap with another type (wrong both); gold alone (missed); predicted alone
    (spurious). Where several would match, the better kind goes first, then the longer overlap. The pairs are in the
    order of their spans.
    """
    gold, predicted = sorted(gold, key=lambda entity: entity[1:]), sorted(predicted, key=lambda entity: entity[1:])
    free_gold, free_predicted = set(range(len(gold))), set(range(len(predicted)))
    matched: list[Pair] = []
    for rank, _, i, j in sorted(_overlaps(gold, predicted)):
        if i in free_gold and j in free_predicted:
            free_gold.remove(i)
            free_predicted.remove(j)
            matched.append(Pair(MATCHED[rank], gold[i], predicted[j]))
    matched += [Pair(MISSED, gold[i], None) for i in free_gold]
    matched += [Pair(SPURIOUS, None, predicted[j]) for j in free_predicted]
    return sorted(matched, key=lambda pair: (pair.gold or pair.predicted or ())[1:])


def gold_with_kinds(matches: list[Pair]) -> list[tuple[str, int, int, str]]:
    """Return the gold entities of the pairs as (type, start, end, kind), sorted by start."""
    return sorted(((*pair.gold, pair.kind) for pair in matches if pair.gold), key=lambda entity: entity[1])


def predicted_with_kinds(matches: list[Pair]) -> list[tuple[str, int, int, str]]:
    """Return the predicted entities of the pairs as (type, start, end, kind), sorted by start."""
    return sorted(((*pair.predicted, pair.kind) for pair in matches if pair.predicted), key=lambda entity: entity[1])


def errors(matches: list[Pair]) -> int:
    """Return how many of the pairs are errors."""
    return sum(pair.kind != CORRECT for pair in matches)


def separator_of(words: int, units: int) -> str:
    """Return what stands between two units, of which so many are words of several characters: a space or nothing."""
    return " " if words > MANY_WORDS * units else ""


@dataclass
class Mistakes:
    """The counts over many sentences, and the worst of these."""

    sentences: int = 0
    units: int = 0
    words: int = 0  # units of several characters
    cells: Counter = field(default_factory=Counter)  # (gold type or None, predicted type or None, kind) -> count
    worst: list[tuple[Prediction, list[Pair]]] = field(default_factory=list)

    def add(self, sentence: Prediction) -> None:
        """Count the entities of a sentence."""
        matches = pairs(spans(sentence.gold), spans(sentence.predicted))
        self.sentences += 1
        self.units += len(sentence.units)
        self.words += sum(len(unit) > 1 for unit in sentence.units)
        for kind, gold, predicted in matches:
            self.cells[gold[0] if gold else None, predicted[0] if predicted else None, kind] += 1
        if errors(matches):
            self.worst.append((sentence, matches))
        if len(self.worst) > 20 * WORST:
            self.worst = self.ranked()

    def ranked(self) -> list[tuple[Prediction, list[Pair]]]:
        """Return the worst sentences: most errors first, then the shorter, then the earlier."""
        return sorted(self.worst, key=lambda item: (-errors(item[1]), len(item[0].units), item[0].line))[:WORST]

    @property
    def types(self) -> list[str]:
        """All types, gold or predicted, sorted."""
        return sorted({name for cell in self.cells for name in cell[:2] if name})

    @property
    def separator(self) -> str:
        """What stands between two units: a space between words, nothing between characters."""
        return separator_of(self.words, self.units)

    def by_type(self) -> dict[str, Counter]:
        """Return type -> kind -> count; an entity counts under its gold type, a spurious one under the predicted."""
        counts: dict[str, Counter] = {name: Counter() for name in self.types}
        for (gold_type, predicted_type, kind), count in self.cells.items():
            counts[gold_type or predicted_type][kind] += count
        return counts


def summary(sentences: Iterable[Prediction]) -> dict[str, Any] | None:
    """Return what the report shows of the predictions: confusion, kinds of error, worst sentences. None without any."""
    mistakes = Mistakes()
    for sentence in sentences:
        mistakes.add(sentence)
    if not mistakes.sentences:
        return None
    types, counts = mistakes.types, mistakes.by_type()
    return {
        "types": types,
        "count": mistakes.sentences,
        "wrong": sum(count for (_, _, kind), count in mistakes.cells.items() if kind != CORRECT),
        "rows": [_matrix_row(mistakes.cells, gold_type, types) for gold_type in [*types, None]],
        "kinds": [(name, [counts[name][kind] for kind in KINDS]) for name in types],
        "totals": [sum(counts[name][kind] for name in types) for kind in KINDS],
        "worst": [_shown(sentence, matches, mistakes.separator) for sentence, matches in mistakes.ranked()],
    }


def _overlaps(gold: list[Entity], predicted: list[Entity]) -> list[tuple[int, int, int, int]]:
    """(rank of the kind, -overlap, index of gold, index of predicted) of all that overlap; both lists are sorted."""
    overlaps = []
    first = 0  # gold entities before it end before this prediction and all later ones
    for j, (_, start, end) in enumerate(predicted):
        while first < len(gold) and gold[first][2] <= start:
            first += 1
        for i in range(first, len(gold)):
            overlap = min(gold[i][2], end) - max(gold[i][1], start)
            if overlap <= 0:
                break
            overlaps.append((MATCHED.index(_kind(gold[i], predicted[j])), -overlap, i, j))
    return overlaps


def _kind(gold: Entity, predicted: Entity) -> str:
    """The kind of two entities that overlap."""
    same_type, same_span = gold[0] == predicted[0], gold[1:] == predicted[1:]
    if same_span:
        return CORRECT if same_type else TYPE
    return BOUNDARY if same_type else BOTH


def _matrix_row(cells: Counter, gold_type: str | None, types: list[str]) -> dict[str, Any]:
    """One row of the confusion matrix; None stands for O. A cell: (count, share of the row, counts by kind)."""
    row = []
    for predicted_type in [*types, None]:
        counts = {kind: cells[gold_type, predicted_type, kind] for kind in KINDS}
        row.append({kind: count for kind, count in counts.items() if count})
    total = sum(sum(cell.values()) for cell in row) or 1
    return {"type": gold_type, "cells": [(sum(cell.values()), sum(cell.values()) / total, cell) for cell in row]}


def _shown(sentence: Prediction, matches: list[Pair], separator: str) -> dict[str, Any]:
    return {
        "number": sentence.line,
        "wrong": errors(matches),
        "lang": language("".join(sentence.units[:LONGEST_GAP])),
        "gold": segments(sentence.units, gold_with_kinds(matches), separator),
        "predicted": segments(sentence.units, predicted_with_kinds(matches), separator),
    }
