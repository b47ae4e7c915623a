"""Scores: strict, in one shape, equal to a count by hand; the dev loss; which run is the newest."""

import os
import shutil

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner import scores as scoring
from ner.corpus import Sentence
from ner.crf import Crf
from ner.errors import UserError

TYPES = ("PER", "LOC", "ORG")


def tags(*spans, length=10):
    """IOB2 tags of (type, start, end) spans."""
    made = ["O"] * length
    for kind, start, end in spans:
        made[start:end] = ["B-" + kind] + ["I-" + kind] * (end - start - 1)
    return made


def test_an_entity_counts_when_type_start_and_end_are_right():
    gold = [tags(("PER", 0, 3), ("LOC", 5, 7)), tags(("PER", 2, 4))]
    scores = scoring.score(gold, [tags(("PER", 0, 3), ("LOC", 5, 8)), tags(("LOC", 2, 4))])
    assert scores["types"]["PER"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert scores["types"]["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["micro"] == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
        "support": 3,
    }
    assert scores["macro"]["f1"] == pytest.approx(1 / 3)
    assert scores["weighted"]["f1"] == pytest.approx(4 / 9)
    assert scores["accuracy"] == pytest.approx(17 / 20)


def test_a_single_character_entity_counts():
    scores = scoring.score([tags(("LOC", 0, 1), ("LOC", 9, 10))], [tags(("LOC", 0, 1), ("LOC", 9, 10))])
    assert scores["micro"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}


def test_an_orphan_is_no_entity():
    scores = scoring.score([["B-PER", "I-PER"], ["O", "O"]], [["I-PER", "I-PER"], ["O", "I-LOC"]])
    assert scores["micro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert list(scores["types"]) == ["PER"]


@pytest.mark.parametrize("gold", [[], [[]], [["O", "O"]]])
def test_without_entities_all_is_zero_and_the_shape_stays(gold):
    scores = scoring.score(gold, gold)
    none = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert (scores["micro"], scores["macro"], scores["weighted"], scores["types"]) == (none, none, none, {})


def test_other_lengths_are_refused():
    with pytest.raises(ValueError):
        scoring.score([["O", "O"]], [["O"]])


SPANS = st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 3), st.integers(1, 4)), max_size=5)


@st.composite
def corpora(draw):
    """Pairs of gold and predicted well-formed tags."""

    def one():
        made, place = [], 0
        for kind, gap, length in draw(SPANS):
            made.append((kind, place + gap, place + gap + length))
            place += gap + length
        return made

    return [(tags(*one(), length=35), tags(*one(), length=35)) for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(corpora())
def test_scores_equal_a_count_by_hand(pairs):
    scores = scoring.score([gold for gold, _ in pairs], [predicted for _, predicted in pairs])
    counts = {}
    for gold, predicted in pairs:
        gold, predicted = set(decoding.spans(gold)), set(decoding.spans(predicted))
        for span in gold | predicted:
            row = counts.setdefault(span[0], [0, 0, 0])
            row[0] += span in gold and span in predicted
            row[1] += span in predicted
            row[2] += span in gold

    def f1(right, found, true):
        precision, recall = right / found if found else 0, right / true if true else 0
        return precision, recall, 2 * precision * recall / (precision + recall) if right else 0, true

    by_type = {kind: f1(*row) for kind, row in sorted(counts.items())}
    assert {kind: tuple(row.values()) for kind, row in scores["types"].items()} == {
        kind: pytest.approx(row) for kind, row in by_type.items()
    }
    assert list(scores["types"]) == sorted(counts)
    assert tuple(scores["micro"].values()) == pytest.approx(
        f1(*map(sum, zip(*counts.values(), strict=True))) if counts else (0, 0, 0, 0)
    )
    if counts:
        assert scores["macro"]["f1"] == pytest.approx(sum(row[2] for row in by_type.values()) / len(by_type))
        supports = max(1, sum(row[3] for row in by_type.values()))
        assert scores["weighted"]["f1"] == pytest.approx(sum(row[2] * row[3] for row in by_type.values()) / supports)


def finished(output, name, marks, when):
    run = output / name
    (run / "model").mkdir(parents=True)
    for mark in marks:
        (run / mark).write_text("{}")
        os.utime(run / mark, (when, when))
    return run


def test_the_newest_finished_run_is_found_by_its_scores_not_its_name(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        scoring.newest_run(tmp_path)
    only = finished(tmp_path, "only-a-model", ["model/ner.json"], 5000)
    assert scoring.newest_run(tmp_path) == only
    finished(tmp_path, "z", ["test.json"], 1000)
    newest = finished(tmp_path, "a", ["test.json", "finished.json"], 2000)
    finished(tmp_path, "without-a-model", ["test.json"], 9000)
    shutil.rmtree(tmp_path / "without-a-model" / "model")
    assert scoring.newest_run(tmp_path) == newest
    untested = finished(tmp_path, "b", ["finished.json"], 3000)
    assert scoring.newest_run(tmp_path) == untested


ALL_TAGS = ["O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI")]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.sampled_from(ALL_TAGS), st.sampled_from(ALL_TAGS)), max_size=12), max_size=3))
def test_scores_and_spans_agree_on_what_an_entity_is(sentences):
    """Also where tags are not well-formed, as argmax leaves them: predictions, reports and scores have one count."""
    gold, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    scores = scoring.score(gold, predicted)
    found = [set(decoding.spans(tags)) for tags in predicted]
    wanted = [set(decoding.spans(tags)) for tags in gold]
    right = sum(len(a & b) for a, b in zip(found, wanted, strict=True))
    assert scores["micro"]["support"] == sum(map(len, wanted))
    assert scores["micro"]["precision"] == pytest.approx(right / max(1, sum(map(len, found))))
    assert scores["micro"]["recall"] == pytest.approx(right / max(1, sum(map(len, wanted))))


class Tagger:
    """Knows O and PER, and gives every tag the probability that `rows` says."""

    labels = ["O", "B-PER", "I-PER"]
    transitions = None

    def __init__(self, rows):
        self.rows = np.log(np.array(rows, np.float32))

    def log_probs(self, sentences):
        return [self.rows[: len(chars)] for chars in sentences]

    def decoded(self, log_probs):
        return [([self.labels[label] for label in rows.argmax(1)], None) for rows in log_probs]


def test_the_loss_is_a_mean_over_the_units_whose_tag_is_known():
    tagger = Tagger([[0.8, 0.1, 0.1], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    sentences = [Sentence(list("abcd"), ["O", "B-PER", "B-LOC", "I-LOC"], 1), Sentence(list("a"), ["O"], 6)]
    _, predicted, loss = scoring.score_sentences(tagger, sentences)
    assert predicted == [["O", "B-PER", "O", "O"], ["O"]]
    assert loss == pytest.approx(-(np.log(0.8) + np.log(0.5) + np.log(0.8)) / 3)
    assert scoring.score_sentences(tagger, [Sentence(["a"], ["B-LOC"], 1)])[2] == 0.0


def test_with_a_crf_the_loss_is_that_of_the_paths():
    tagger = Tagger([[0.8, 0.1, 0.1], [0.25, 0.5, 0.25], [0.3, 0.3, 0.4]])
    tagger.transitions = np.array([[0.5, -0.5, 0.0], [0.0, 0.0, 1.0], [0.2, 0.1, 0.3]], np.float32)
    sentences = [Sentence(list("abc"), ["O", "B-PER", "I-PER"], 1), Sentence(list("a"), ["O"], 5),
                 Sentence(list("a"), ["B-LOC"], 7)]  # fmt: skip
    logits = torch.from_numpy(tagger.rows)[None]
    path = Crf(tagger.labels, tagger.transitions)(logits, torch.tensor([[0, 1, 2]]))
    expected = (float(path.detach()) - np.log(0.8)) / 4
    assert scoring.score_sentences(tagger, sentences)[2] == pytest.approx(expected, rel=1e-5)


def test_many_sentences_are_scored_in_their_order(monkeypatch):
    monkeypatch.setattr(scoring, "AT_ONCE", 2)
    tagger = Tagger([[0.8, 0.1, 0.1], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    sentences = [Sentence(["a"] * count, ["O"] * count, 1) for count in (1, 3, 2, 1, 3)]
    predicted = scoring.score_sentences(tagger, sentences)[1]
    assert [len(tags) for tags in predicted] == [1, 3, 2, 1, 3] and predicted[1] == ["O", "B-PER", "I-PER"]


def test_the_first_characters_without_single_ones():
    cut = tags(("PER", 0, 3), ("LOC", 4, 5), ("ORG", 47, 52), ("PER", 48, 60), ("LOC", 61, 63), length=70)
    assert decoding.spans(scoring.clip(cut)) == [("PER", 0, 3)]
    cut = tags(("PER", 0, 3), ("LOC", 4, 5), ("ORG", 47, 52), length=70)
    assert decoding.spans(scoring.clip(cut)) == [("PER", 0, 3), ("ORG", 47, 49)] and len(scoring.clip(cut)) == 49
    assert scoring.clip(["B-PER", "I-PER"]) == ["B-PER", "I-PER"] and scoring.clip([]) == []


DIARY = runs.ROOT.parent / "shared" / "ner_data" / "test"


@pytest.mark.skipif(not DIARY.is_file(), reason="ner_data is not here")
def test_the_first_49_characters_of_ner_data_hold_the_known_number_of_entities():
    gold = [scoring.clip(sentence.tags) for sentence in formats.read(str(DIARY)).sentences]
    supports = {kind: row["support"] for kind, row in scoring.score(gold, gold)["types"].items()}
    assert supports == {"PERSON": 173, "LOCATION": 190, "TIME": 163, "ORGANIZATION": 85}
