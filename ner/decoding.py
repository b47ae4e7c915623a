"""Scores → tags: argmax or Viterbi, with a CRF's transitions where there is one; tags → spans.

`spans` is the one definition of an entity: predictions, reports and scores all go by it.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

FORBIDDEN = np.float32(-1e30)  # finite, so that sums of it stay comparable
Advance = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # see _Scheme.advance
TABLE = 500_000  # entries of labels x labels tables that are computed together
MEMORY = 2_000_000  # table entries that one batch of Viterbi holds at most


def decode(
    scores: list[np.ndarray], labels: list[str], how: str, transitions: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return the label indices, int64 [n], of each sentence's scores, float [n, labels].

    how: "argmax" or "viterbi". transitions: a CRF's scores, float32 [labels, labels], of a step from one label (row)
    to the next (column); with them the path is the best by scores and transitions, whatever `how` says.
    """
    if transitions is not None:
        return crf_viterbi(scores, labels, transitions)
    if how == "viterbi":
        return viterbi(scores, labels)
    return [np.argmax(rows, axis=-1) if len(rows) else np.zeros(0, np.int64) for rows in scores]


def spans(tags: list[str]) -> list[tuple[str, int, int]]:
    """Return the entities of IOB2 tags as (type, start, end), half-open.

    Strict, as seqeval scores: an entity starts with its B. An I that follows neither a B nor an entity's I of its type
    (an orphan) belongs to none.
    """
    entities, kind, start = [], None, 0
    for index, tag in enumerate(tags):
        if kind is not None and tag != "I-" + kind:
            entities.append((kind, start, index))
            kind = None
        if tag.startswith("B-"):
            kind, start = tag[2:], index
    if kind is not None:
        entities.append((kind, start, len(tags)))
    return entities


def orphans(tags: list[str]) -> int:
    """Return how many tags are orphans: an I without the beginning of its entity."""
    return sum(tag != "O" for tag in tags) - sum(end - start for _, start, end in spans(tags))


def allowed_steps(labels: list[str]) -> np.ndarray:
    """Return bool [labels, labels]: whether IOB2 lets the column's label follow the row's."""
    return np.array([[after[:2] != "I-" or before[1:] == after[1:] for after in labels] for before in labels])


@dataclasses.dataclass(frozen=True)
class _Scheme:
    """The labels as columns of the scores: what Viterbi needs to know about them.

    inside: int64 [types], the columns of the I labels. begin: int64 [types], the column of the B label of each of them
    (its own column where there is none). is_inside: bool [labels]. kind: int64 [labels], equal for B and I of a type.
    """

    inside: np.ndarray
    begin: np.ndarray
    is_inside: np.ndarray
    kind: np.ndarray

    @classmethod
    def of(cls, labels: list[str]) -> "_Scheme":
        column = {label: index for index, label in enumerate(labels)}
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(label[1:] for label in labels))}
        inside = [index for label, index in column.items() if label.startswith("I-")]
        begin = [column.get("B" + labels[index][1:], index) for index in inside]
        is_inside = np.array([label.startswith("I-") for label in labels])
        kind = np.array([kinds[label[1:]] for label in labels])
        return cls(np.array(inside, np.int64), np.array(begin, np.int64), is_inside, kind)

    def advance(self, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance the scores [rows, labels] of the best path to each label by one step, as IOB2 allows.

        Returns (the score of the best path to each next label, without that label's own score; the label that this path
        comes from), both [rows, labels]. O and B may follow anything, so they follow the best path of all; an I has
        only two predecessors, B and I of its type. That takes O(labels), not their square. The scores are relative to
        the best path's, so that they stay small.
        """
        leader = best.argmax(axis=1)[:, None]
        begin, inside = best[:, self.begin], best[:, self.inside]
        next_scores, previous = np.zeros_like(best), np.repeat(leader, best.shape[1], axis=1)
        next_scores[:, self.inside] = np.maximum(begin, inside) - np.take_along_axis(best, leader, axis=1)
        previous[:, self.inside] = np.where(inside > begin, self.inside, self.begin)
        return next_scores, previous

    def advance_by(self, transitions: np.ndarray) -> Advance:
        """Return `advance` with a CRF's transitions, float32 [labels, labels], added to the paths' scores.

        An I has the same two predecessors. O and B may follow anything, which takes a table of labels x labels for each
        row. A predecessor is left out of it where its best transition gives a lower score than another predecessor's
        worst: it cannot be on a best path. Where the model is sure, that is nearly every label.
        """
        from_begin, from_inside = transitions[self.begin, self.inside], transitions[self.inside, self.inside]
        free = np.flatnonzero(~self.is_inside)
        steps = np.ascontiguousarray(transitions[:, free].T)  # [free, labels]: to the row from the column
        highest, lowest = steps.max(axis=0, initial=FORBIDDEN), steps.min(axis=0, initial=-FORBIDDEN)
        at_once = max(1, TABLE // max(1, steps.size))

        def advance(best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            next_scores, previous = np.empty_like(best), np.empty(best.shape, np.int64)
            begin, inside = best[:, self.begin] + from_begin, best[:, self.inside] + from_inside
            next_scores[:, self.inside] = np.maximum(begin, inside)
            previous[:, self.inside] = np.where(inside > begin, self.inside, self.begin)
            for start in range(0, len(best) if len(free) else 0, at_once):
                rows = slice(start, start + at_once)
                path_scores = best[rows]
                may_win = path_scores + highest >= (path_scores + lowest).max(axis=1, keepdims=True)
                sources = np.flatnonzero(may_win.any(axis=0))
                options = path_scores[:, None, sources] + steps[:, sources]  # [rows, free, sources]
                first = options.argmax(axis=2)
                next_scores[rows, free] = np.take_along_axis(options, first[:, :, None], axis=2)[:, :, 0]
                previous[rows, free] = sources[first]
            return next_scores - next_scores.max(axis=1, keepdims=True), previous

        return advance

    def broken_steps(self, path: np.ndarray, is_start: np.ndarray) -> np.ndarray:
        """Return the positions of a path, int64 [n], whose label may not follow the one before in its sentence."""
        before, after = path[:-1], path[1:]
        return 1 + np.flatnonzero(self.is_inside[after] & (self.kind[before] != self.kind[after]) & ~is_start[1:])


def viterbi(scores: list[np.ndarray], labels: list[str]) -> list[np.ndarray]:
    """Return the best label indices, int64 [n], that IOB2 allows, of each sentence's scores, float [n, labels].

    Exact. Argmax is the best path without the constraint, and nearly everywhere it is well-formed. So it stands but for
    stretches around its broken steps, which are solved anew with free ends. Where a step into or out of a stretch is
    broken then, stretches grow and are solved again. The result is the best of all paths that keep to IOB2 within the
    stretches; as it keeps to IOB2 everywhere, it is the best of the well-formed ones too.
    """
    flat, starts = _flatten(scores)
    if not len(flat):
        return [np.zeros(0, np.int64) for _ in scores]
    scheme = _Scheme.of(labels)
    flat[starts[:, None], scheme.inside] = FORBIDDEN  # no sentence starts inside an entity
    path = flat.argmax(axis=1)
    joined = np.zeros(len(flat), bool)  # whether a position's step from the one before is constrained
    radius = 2
    is_start = np.zeros(len(flat), bool)
    is_start[starts] = True
    while len(broken := scheme.broken_steps(path, is_start)):
        for position in broken:
            joined[max(0, position - radius) : position + radius + 1] = True
        joined[starts] = False
        for begins, sizes in _batches(*_stretches(joined), len(labels)):
            _solve(flat, begins, sizes, scheme.advance, path)
        radius *= 2
    return np.split(path, np.cumsum([len(rows) for rows in scores])[:-1])


def crf_viterbi(scores: list[np.ndarray], labels: list[str], transitions: np.ndarray) -> list[np.ndarray]:
    """Return the label indices, int64 [n], with the highest sum of scores [n, labels] and transitions [labels, labels].

    No path starts inside an entity or takes a step that IOB2 forbids, whatever the transitions are.
    """
    flat, starts = _flatten(scores)
    scheme = _Scheme.of(labels)
    flat[starts[:, None], scheme.inside] = FORBIDDEN
    path = np.zeros(len(flat), np.int64)
    sizes = np.array([len(rows) for rows in scores if len(rows)], np.int64)
    for begins, group in _batches(starts, sizes, len(labels)):
        _solve(flat, begins, group, scheme.advance_by(transitions), path)
    return np.split(path, np.cumsum([len(rows) for rows in scores])[:-1]) if scores else []


def _flatten(scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows in one array, float32 [N, labels] within ±1e9, and where each sentence starts in it."""
    rows = [part for part in scores if len(part)]
    starts = np.cumsum([0] + [len(part) for part in rows])[:-1].astype(np.int64)
    if not rows:
        return np.zeros((0, 1), np.float32), starts
    flat = np.concatenate(rows, dtype=np.float32)
    return np.clip(np.nan_to_num(flat, copy=False, nan=-1e9), -1e9, 1e9, out=flat), starts


def _stretches(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return begin and size, int64 [stretches], of the runs of two positions or more that are joined to each other."""
    begins = np.flatnonzero(~joined)
    sizes = np.diff(np.append(begins, len(joined)))
    return begins[sizes > 1], sizes[sizes > 1]


def _batches(
    begins: np.ndarray, sizes: np.ndarray, labels: int, at_once: int = MEMORY
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield begins and sizes of stretches, longest first, so many together that their tables fit into MEMORY."""
    order = np.argsort(-sizes, kind="stable")
    done = 0
    while done < len(order):
        group = order[done : done + max(1, min(at_once, MEMORY // (labels * int(sizes[order[done]]))))]
        yield begins[group], sizes[group]
        done += len(group)


def _solve(flat: np.ndarray, begins: np.ndarray, sizes: np.ndarray, advance: Advance, path: np.ndarray) -> None:
    """Write into `path`, int64 [N], the best labels of stretches of `flat` [N, labels], longest first.

    One dynamic programme over all stretches at once: at position t those that are longer than t take part.
    """
    best = flat[begins]  # [stretches, labels]: the score of the best path to each label
    previous = np.empty((int(sizes[0]), *best.shape), np.int16)  # the last label but one of that path
    longer = np.searchsorted(-sizes, -np.arange(sizes[0])).tolist()  # how many stretches are longer than t
    for t, count in enumerate(longer[1:], 1):
        next_scores, previous[t, :count] = advance(best[:count])
        best[:count] = flat[begins[:count] + t] + next_scores
    label = best.argmax(axis=1)
    for t, count in reversed(list(enumerate(longer))):
        path[begins[:count] + t] = label[:count]
        if t:
            label[:count] = previous[t, np.arange(count), label[:count]]
