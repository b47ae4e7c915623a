"""Decoding: the best well-formed path, checked against enumeration; the one definition of an entity."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.scheme import IOB2, Entities

from ner import decoding

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
LENGTHS_AND_SEEDS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), min_size=1, max_size=4)


def labels_of(types):
    return ["O"] + [f"{prefix}-{kind}" for kind in types for prefix in "BI"]


def well_formed(path, labels):
    return all(
        not labels[after].startswith("I-") or (before is not None and labels[before][1:] == labels[after][1:])
        for before, after in itertools.pairwise([None, *path])
    )


def worth(rows, path, transitions=None):
    """The sum of a path's scores, and of its transitions."""
    steps = 0 if transitions is None else sum(transitions[a, b] for a, b in itertools.pairwise(path))
    return sum(rows[t, label] for t, label in enumerate(path)) + steps


def best_worth(rows, labels, transitions=None):
    """The highest worth of all well-formed paths, by enumeration."""
    paths = itertools.product(range(len(labels)), repeat=len(rows))
    return max((worth(rows, path, transitions) for path in paths if well_formed(path, labels)), default=0)


def normal(length, labels, seed, sharpness=1.0):
    return np.random.default_rng(seed).normal(size=(length, len(labels))).astype(np.float32) * np.float32(sharpness)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS_AND_SEEDS, st.permutations(LABELS))
def test_viterbi_equals_enumeration(data, labels):
    scores = [normal(length, labels, seed) for length, seed in data]
    for rows, path in zip(scores, decoding.viterbi(scores, labels), strict=True):
        assert len(path) == len(rows) and well_formed(path, labels)
        assert worth(rows, path) == pytest.approx(best_worth(rows, labels), abs=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS_AND_SEEDS, st.integers(0, 10**6))
def test_viterbi_with_transitions_equals_enumeration(data, seed):
    scores = [normal(length, LABELS, seed) for length, seed in data]
    transitions = normal(len(LABELS), LABELS, seed, sharpness=2.0)
    for rows, path in zip(scores, decoding.decode(scores, LABELS, "argmax", transitions), strict=True):
        assert len(path) == len(rows) and well_formed(path, LABELS)
        assert worth(rows, path, transitions) == pytest.approx(best_worth(rows, LABELS, transitions), abs=1e-4)


def textbook_viterbi(rows, labels, transitions=0.0):
    """One step after the other, with a table of labels x labels."""
    steps = np.array([[0.0 if not b.startswith("I-") or a[1:] == b[1:] else -np.inf for b in labels] for a in labels])
    steps = steps + transitions
    best, back = np.where([label.startswith("I-") for label in labels], -np.inf, rows[0]), []
    for row in rows[1:]:
        options = best[:, None] + steps
        back.append(options.argmax(0))
        best = options.max(0) + row
    path = [int(best.argmax())]
    for pointers in reversed(back):
        path.append(int(pointers[path[-1]]))
    return path[::-1]


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("with_transitions", [False, True])
def test_long_sentences_are_decoded_as_by_the_textbook(sharpness, with_transitions):
    labels = labels_of("ABCDEFG")
    scores = [normal(length, labels, length, sharpness) for length in (1, 700, 33, 0, 64, 2)]
    transitions = normal(len(labels), labels, 9) if with_transitions else None
    for rows, path in zip(scores, decoding.decode(scores, labels, "viterbi", transitions), strict=True):
        assert well_formed(path, labels) and len(path) == len(rows)
        if len(rows):
            textbook = textbook_viterbi(rows.astype(np.float64), labels, 0 if transitions is None else transitions)
            assert worth(rows, path, transitions) == pytest.approx(worth(rows, textbook, transitions), abs=1e-2)


def test_three_hundred_types_are_decoded_in_little_time_and_memory():
    """200 sentences of random scores, on which nearly every step of argmax is broken: 37 seconds and 469 MB once."""
    labels = labels_of(map(str, range(300)))
    scores = [normal(50, labels, seed) for seed in range(200)]
    tracemalloc.start()
    begun = time.process_time()
    paths = decoding.viterbi(scores, labels)
    seconds, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 100e6
    assert all(well_formed(path, labels) for path in paths)
    textbook = textbook_viterbi(scores[7].astype(np.float64), labels)
    assert worth(scores[7], paths[7]) == pytest.approx(worth(scores[7], textbook), abs=1e-3)


@pytest.mark.parametrize(("sharpness", "most"), [(1.0, 4.0), (20.0, 1.0)])
def test_a_crf_of_three_hundred_types_is_decoded_in_little_time_and_memory(sharpness, most):
    """Clear scores leave few labels that a best path can come from; with random ones 200 sentences took 6 seconds."""
    labels = labels_of(map(str, range(300)))
    scores = [normal(50, labels, seed, sharpness) for seed in range(200)]
    transitions = normal(len(labels), labels, 300)
    tracemalloc.start()
    decoding.crf_viterbi(scores[:20], labels, transitions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    begun = time.process_time()
    paths = decoding.crf_viterbi(scores, labels, transitions)
    assert time.process_time() - begun < most and peak < 30e6
    assert all(well_formed(path, labels) for path in paths)
    textbook = textbook_viterbi(scores[7].astype(np.float64), labels, transitions)
    expected = worth(scores[7], textbook, transitions)
    assert worth(scores[7], paths[7], transitions) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("transitions", [None, np.zeros((5, 5), np.float32)])
def test_viterbi_survives_what_a_broken_model_gives(transitions):
    for value in (np.nan, np.inf, -np.inf, -3e38, 0.0):
        (path,) = decoding.decode([np.full((50, 5), value, np.float32)], LABELS, "viterbi", transitions)
        assert len(path) == 50 and well_formed(path, LABELS)
    empty = decoding.decode([np.zeros((0, 5))], LABELS, "viterbi", transitions)
    assert [list(path) for path in empty] == [[]]
    assert decoding.decode([], LABELS, "viterbi", transitions) == []


@pytest.mark.parametrize("labels", [["O"], ["O", "B-A"], ["O", "I-A"], ["I-A", "I-B"]])
def test_viterbi_ends_with_any_labels(labels):
    scores = [normal(length, labels, length) for length in (1, 30)]
    for transitions in (None, np.zeros((len(labels), len(labels)), np.float32)):
        paths = decoding.decode(scores, labels, "viterbi", transitions)
        assert [len(path) for path in paths] == [1, 30]
        if "O" in labels:
            assert all(well_formed(path, labels) for path in paths)


def test_viterbi_takes_a_million_characters():
    (path,) = decoding.viterbi([normal(1_000_000, LABELS, 0)], LABELS)
    assert len(path) == 1_000_000 and well_formed(path[:5000], LABELS)


def test_argmax_takes_each_character_by_itself():
    paths = decoding.decode([np.eye(5, dtype=np.float32)[[2, 0, 4]], np.zeros((0, 5), np.float32)], LABELS, "argmax")
    assert [list(path) for path in paths] == [[2, 0, 4], []]


def test_an_entity_starts_with_its_b_and_orphans_belong_to_none():
    tags = ["I-A", "B-A", "I-A", "O", "B-A", "B-A", "I-B", "I-A", "I-B", "O", "I-A"]
    assert decoding.spans(tags) == [("A", 1, 3), ("A", 4, 5), ("A", 5, 6)]
    assert decoding.orphans(tags) == 5
    assert decoding.spans([]) == decoding.spans(["O"]) == decoding.spans(["I-A"]) == []
    assert decoding.spans(["B-A"]) == [("A", 0, 1)] and decoding.orphans(["B-A", "I-A"]) == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(LABELS), max_size=12))
def test_entities_are_those_of_seqeval_whatever_the_tags_are(tags):
    (entities,) = Entities([tags], scheme=IOB2).entities if tags else ([],)
    assert decoding.spans(tags) == [(entity.tag, entity.start, entity.end) for entity in entities]
