"""Texts with entities, cut into segments and coloured."""

from hypothesis import given
from hypothesis import strategies as st
from pages import entities

from ner import markup


@given(st.text(min_size=60, max_size=60), entities())
def test_segments_keep_the_text(text, found):
    found = [(*entity, None) for entity in found if entity[2] <= len(text)]
    parts = markup.segments(text, found, whole=True)
    assert "".join(part for part, _, _ in parts) == markup.visible(text)
    assert [name for _, name, _ in parts if name] == [entity[0] for entity in found]


def test_hues_differ():
    assert len(set(markup.hues("ABCDEFGHIJ").values())) == 10
    assert markup.hues(["B", "A"]) == markup.hues(["A", "B", "A"])
    assert all(0 <= hue < 360 for hue in markup.hues(map(str, range(40))).values())
