"""Alignment and windows: n units in, n tags out, for any text, any window size and each kind of tokenizer."""

import functools
import itertools

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ner import batches
from ner.errors import UserError
from ner.windows import Windower, stitch, text_units

KINDS = {"wordpiece": tiny.wordpiece, "sentencepiece": tiny.sentencepiece, "bytelevel": tiny.bytelevel}
AWKWARD = [
    "\u3000",
    " ",
    "\t",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\x00",
    "\x7f",
    "\u0301",
    "龘",
    "𠮷",
    "👨‍👩‍👧",
    "🇨🇳",
    "ﷺ",
    "①",
    "㎏",
    "…",
    "ﬁ",
    "\ud83d",
    "\ue000",
    "‏",
    "▁",
    "Ġ",
    "<s>",
    "[CLS]",
    "[PAD]",
    "İ",
    "ß",
]
characters = st.one_of(
    st.characters(), st.sampled_from(list(tiny.TEXT)), st.sampled_from("。！？，、；"), st.sampled_from(AWKWARD)
)
# Hypothesis likes short lists: a text is a short list said several times, so that many need windows.
texts = st.builds(lambda chars, times: chars * times, st.lists(characters, max_size=30), st.integers(1, 12))


@functools.cache
def tokenizer(kind):
    return KINDS[kind]()


def units(kind, max_length=20, special_tokens=True, unit="character"):
    return Windower(tokenizer(kind), unit, special_tokens, max_length)


def positions(window):
    """The owned (place in ids, unit) pairs of a window."""
    return [(window.first_tokens[u - window.start], u) for u in range(window.own_start, window.own_end)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(chars=texts, max_length=st.integers(3, 60), special_tokens=st.booleans())
@example(chars=AWKWARD, max_length=3, special_tokens=True)
@example(chars=["a"] * 500, max_length=3, special_tokens=False)
def test_each_unit_is_owned_once_and_seen_whole(kind, chars, max_length, special_tokens):
    made = units(kind, max_length, special_tokens)
    ids, first = made.encode(chars)
    assert len(first) == len(chars) and first == sorted(set(first)) and all(0 <= place < len(ids) for place in first)
    windows = made.windows([chars])
    assert [u for w in windows for u in range(w.own_start, w.own_end)] == list(range(len(chars)))
    for window in windows:
        assert window.start <= window.own_start < window.own_end <= window.end and window.sentence_length == len(chars)
        assert len(window.ids) <= max_length and len(window.first_tokens) == window.end - window.start
        before, after = len(made.prefix), len(made.suffix)
        middle = window.ids[before : len(window.ids) - after]
        stop = first[window.end] if window.end < len(chars) else len(ids)
        assert middle == ids[first[window.start] : stop], "a window is a slice of the sentence's tokens"
        assert all(window.ids[place] == ids[first[unit]] for place, unit in positions(window))
        assert window.ids[:before] == made.prefix and window.ids[len(window.ids) - after :] == made.suffix


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sentences=st.lists(st.lists(characters, max_size=50), max_size=8),
    max_length=st.integers(3, 30),
    size=st.integers(1, 5),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_what_goes_out_in_batches_comes_back_in_place(kind, sentences, max_length, size, seed):
    made = units(kind, max_length)
    gold = [[(7 * index + place) % 11 for place in range(len(chars))] for index, chars in enumerate(sentences)]
    windows, out, labelled = made.windows(sentences), {}, 0
    ordered = batches.by_length(windows, size) if seed is None else batches.shuffled(windows, size, seed)
    for batch in ordered:
        tensors = batches.collate(batch, tokenizer(kind).pad_token_id, gold)
        assert {t.dtype for t in tensors.values()} == {torch.int64} and len({t.shape for t in tensors.values()}) == 1
        assert tensors["attention_mask"].sum() == sum(len(w.ids) for w in batch)
        longest = max(len(w.ids) for w in batch)
        rounded = next(n for n in range(longest, longest + 8) if n % 8 == 0)
        assert tensors["input_ids"].shape == (len(batch), rounded if rounded <= max_length else longest)
        labelled += int((tensors["labels"] != -100).sum())
        scores = torch.nn.functional.one_hot(tensors["labels"].clamp(min=0), 11).to(torch.bfloat16)
        scores[tensors["labels"] == -100] = 9.0  # must never be read
        stitch(batch, scores, out)
    assert labelled == sum(map(len, sentences)), "training sees every labelled unit exactly once"
    assert sorted(out) == [index for index, chars in enumerate(sentences) if chars]
    for index, rows in out.items():
        assert rows.dtype == np.float32 and rows.argmax(1).tolist() == gold[index] and rows.max() == 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(gaps=st.lists(st.tuples(st.integers(0, 70), st.sampled_from("。，")), min_size=1), max_length=st.integers(8, 80))
@example(gaps=[(700, "。")], max_length=40)
def test_each_unit_comes_from_the_window_with_most_context(gaps, max_length):
    marks = list("".join("a" * gap + mark for gap, mark in gaps))
    windows = units("wordpiece", max_length).windows([marks])

    def context(window, unit):
        left = unit - window.start if window.start else len(marks)
        return min(left, window.end - 1 - unit if window.end < len(marks) else len(marks))

    for owner in windows:
        for unit in range(owner.own_start, owner.own_end):
            assert context(owner, unit) == max(context(w, unit) for w in windows if w.start <= unit < w.end)
    for left, right in itertools.pairwise(windows):
        assert right.start < left.end or max_length < 10, "neighbours overlap"


def test_windows_are_cut_at_punctuation():
    chars = list(("北京" * 6 + "，" + "上海" * 6 + "。") * 20)
    windows = units("wordpiece", 66).windows([chars])
    assert len(windows) > 5
    for window in windows[:-1]:
        assert chars[window.end - 1] in "，。" and len(window.ids) > 40
    for window in windows[1:]:
        assert chars[window.start - 1] in "，。"


def test_a_sentence_that_fits_is_one_window():
    (window,) = units("wordpiece", 12).windows([list("江泽民在北京会见了")])
    assert (window.start, window.end, window.own_start, window.own_end) == (0, 9, 0, 9) and len(window.ids) == 11
    assert len(units("wordpiece", 11).windows([list("江泽民在北京会见了")])) == 1
    assert len(units("wordpiece", 10).windows([list("江泽民在北京会见了")])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_drops_gets_its_unknown_token(kind):
    made = units(kind)
    ids, first = made.encode(AWKWARD)
    reserved = set(tokenizer(kind).all_special_ids) - {tokenizer(kind).unk_token_id}
    assert len(first) == len(AWKWARD) and not reserved & set(ids), "no text can smuggle in a special token"
    if kind == "wordpiece":
        unknown = tokenizer(kind).unk_token_id
        assert {"\u3000", "\u200b", "\x00"} <= made.dropped and ids[first[0]] == ids[first[3]] == unknown
        assert made.is_unknown("龘") and "龘" not in made.dropped and not made.is_unknown("京")


def test_no_mark_of_a_space_is_left_before_a_character():
    made = units("sentencepiece")
    assert tokenizer("sentencepiece").convert_ids_to_tokens(made.encode(list("江泽 民"))[0]) == ["江", "泽", "▁", "民"]


def test_special_tokens_only_where_they_are_wanted():
    for kind, marks in {
        "wordpiece": ("[CLS]", "[SEP]"),
        "sentencepiece": ("<s>", "</s>"),
        "bytelevel": ("<s>", "</s>"),
    }.items():
        with_them, without = (units(kind, special_tokens=wanted).windows([["北"]])[0] for wanted in (True, False))
        first, *middle, last = with_them.ids
        assert tuple(tokenizer(kind).convert_ids_to_tokens([first, last])) == marks and middle == without.ids
        assert with_them.first_tokens == [1] and without.first_tokens == [0]


def test_words_take_their_tag_at_the_first_token():
    words = ["The", "inhibitor", "of", "IL-2", "blocks", "NF-kappa"]
    made = Windower(tiny.bytelevel(add_prefix_space=True), "word", True, 64)
    (window,) = made.windows([words])
    assert len(window.ids) > len(words) + 2, "some words have several tokens"
    tensors = batches.collate([window], 1, [[1, 2, 3, 4, 5, 6]])
    assert tensors["labels"][0, window.first_tokens].tolist() == [1, 2, 3, 4, 5, 6]
    assert int((tensors["labels"] != -100).sum()) == 6


def test_a_giant_word_still_leaves_room_for_its_neighbours():
    made = units("bytelevel", 34, unit="word")
    windows = made.windows([["a", "x9" * 500_000, "b"]])
    assert len(windows) == 1 and windows[0].end == 3


def test_a_million_characters_are_cut_in_linear_time():
    text = (tiny.TEXT * 3000)[:1_000_000]
    made = units("wordpiece", 256)
    windows = made.windows([list(text)])
    assert len(text) < 1_000_001 and sum(w.own_end - w.own_start for w in windows) == len(text)
    assert sum(len(w.ids) for w in windows) < 1.8 * len(text), "overlaps cost less than the text itself"


def test_room_for_no_token_is_an_error():
    with pytest.raises(UserError, match="max_length 2 leaves no room"):
        units("wordpiece", 2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_units_of_a_text_keep_their_offsets(text):
    characters, words = text_units(text, "character"), text_units(text, "word")
    assert "".join(char for char, _, _ in characters) == text and len(characters) == len(text)
    assert all(text[start:end] == unit for unit, start, end in characters + words)
    assert len("".join(unit for unit, _, _ in words)) + sum(char.isspace() for char in text) == len(text)


def test_words_of_a_text():
    assert [unit for unit, _, _ in text_units("IL-2 isn't (NF-kappa B) 3.5%, ok.", "word")] == [
        "IL-2",
        "isn't",
        "(",
        "NF-kappa",
        "B",
        ")",
        "3.5",
        "%",
        ",",
        "ok",
        ".",
    ]
