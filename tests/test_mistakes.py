"""Which kinds of error there are, and how many: every entity is counted once."""

import pytest
from hypothesis import given
from pages import entities, fill

from ner import mistakes, run_files


@pytest.fixture
def run(tmp_path):
    return fill(tmp_path / "20240506-104917")


def test_counts_on_the_page_are_right(run):
    errors = mistakes.summary(run_files.predictions(run))
    assert errors["types"] == ["LOC", "ORG", "PER"] and errors["count"] == 61 and errors["wrong"] == 120
    assert dict(zip(mistakes.KINDS, errors["totals"], strict=True)) == {
        "correct": 62,
        "wrong boundary": 60,
        "wrong type": 60,
        "wrong both": 0,
        "missed": 0,
        "spurious": 0,
    }
    cells = {
        (row["type"], guess): cell[2]
        for row in errors["rows"]
        for guess, cell in zip([*errors["types"], None], row["cells"], strict=True)
        if cell[0]
    }
    assert cells == {
        ("LOC", "LOC"): {"correct": 1, "wrong boundary": 60},
        ("ORG", "ORG"): {"correct": 1},
        ("PER", "PER"): {"correct": 60},
        ("PER", "ORG"): {"wrong type": 60},
    }


@pytest.mark.parametrize(
    "gold, predicted, kinds",
    [
        ([("PER", 0, 3)], [("PER", 0, 3)], ["correct"]),
        ([("PER", 0, 3)], [("PER", 0, 2)], ["wrong boundary"]),
        ([("PER", 0, 3)], [("LOC", 0, 3)], ["wrong type"]),
        ([("PER", 0, 3)], [("LOC", 1, 5)], ["wrong both"]),
        ([("PER", 0, 3)], [], ["missed"]),
        ([], [("PER", 0, 3)], ["spurious"]),
        ([("PER", 0, 3)], [("PER", 3, 5)], ["missed", "spurious"]),  # they touch, they do not overlap
        (
            [("PER", 0, 6)],
            [("PER", 0, 2), ("PER", 2, 6)],
            ["spurious", "wrong boundary"],
        ),  # the longer overlap is its pair
        ([("PER", 0, 2), ("PER", 2, 6)], [("PER", 0, 6)], ["missed", "wrong boundary"]),
        ([("PER", 0, 4)], [("LOC", 0, 3), ("PER", 3, 4)], ["spurious", "wrong boundary"]),  # the right type goes first
    ],
)
def test_kinds_of_error(gold, predicted, kinds):
    assert sorted(kind for kind, _, _ in mistakes.pairs(gold, predicted)) == kinds


@given(entities(), entities())
def test_every_entity_has_one_pair(gold, predicted):
    matched = mistakes.pairs(gold, predicted)
    assert sorted(g for _, g, _ in matched if g) == sorted(gold)
    assert sorted(p for _, _, p in matched if p) == sorted(predicted)
    assert sum(kind == "correct" for kind, _, _ in matched) == len(set(gold) & set(predicted))
    for kind, g, p in matched:
        assert (kind == "missed") == (p is None) and (kind == "spurious") == (g is None)
        if g and p:
            same = (g[0] == p[0], g[1:] == p[1:])
            assert (
                kind
                == {
                    (True, True): "correct",
                    (True, False): "wrong boundary",
                    (False, True): "wrong type",
                    (False, False): "wrong both",
                }[same]
            )
            assert max(g[1], p[1]) < min(g[2], p[2])
