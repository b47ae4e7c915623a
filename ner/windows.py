"""Sentences → windows of token ids, and the way back: window scores → one row per unit.

Each distinct unit (a character, or a word of a word-level corpus) is tokenised once and cached. That loses the merges a
tokenizer would make across units, and buys an exact alignment with any tokenizer at the cost of a table look-up.
A sentence that does not fit is cut into overlapping windows; every unit belongs to the one that shows most around it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from ner.errors import UserError

CLAUSE_ENDS = set("。！？!?；;\n…")  # a window is best cut after one of these,
PAUSES = set("，、,:：.”’』」）) \u3000")  # and else after one of these
WORD_PATTERN = re.compile(r"\w+(?:[-.'’]\w+)*|[^\w\s]")
LARGEST_CACHE = 1_000_000  # units: a stream of ever new words must not fill the memory


@dataclass(slots=True)
class Window:
    """The slice of a sentence that fits the model. Units are counted from 0, spans are half-open."""

    sentence: int  # index of its sentence
    start: int  # the units it shows
    end: int
    own_start: int  # the units it answers for: each unit of a sentence is owned by exactly one window
    own_end: int
    sentence_length: int  # units of the whole sentence
    ids: list[int]  # token ids, special tokens included
    first_tokens: list[int]  # index in ids of the first token of each shown unit
    max_length: int = 0  # the most tokens a window may have

    @property
    def own_tokens(self) -> list[int]:
        """The index in `ids` of the first token of each unit that the window owns."""
        return self.first_tokens[self.own_start - self.start : self.own_end - self.start]


class Windower:
    """Turns units into token ids with one tokenizer, and sentences into windows of at most `max_length` tokens.

    `unit` is "character" or "word" (a byte-level tokenizer has to be loaded with add_prefix_space=True for words).
    A unit that the tokenizer drops or cannot hold gets its unknown token. Raises UserError where max_length leaves no
    room for a token beside the special ones.
    """

    def __init__(self, tokenizer: Any, unit: str, special_tokens: bool, max_length: int) -> None:
        self.tokenizer, self.unit, self.max_length = tokenizer, unit, max_length
        candidates = [tokenizer.unk_token_id, *tokenizer.all_special_ids, 0]
        self.unknown_id = next(token for token in candidates if token is not None)
        self.forbidden_ids = set(tokenizer.all_special_ids) - {self.unknown_id}  # no text may contain these
        self.prefix, self.suffix = _special_tokens(tokenizer) if special_tokens else ([], [])
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise UserError(f"max_length {max_length} leaves no room beside {max_length - self.room} special tokens")
        self.longest_unit = max(1, self.room // 4)  # tokens kept of one unit: a giant word still has neighbours
        self.ids_of_unit: dict[str, tuple[int, ...]] = {}
        self.dropped: set[str] = set()  # units of which the tokenizer leaves nothing

    def windows(self, sentences: list[list[str]]) -> list[Window]:
        """Return the windows of all sentences (lists of units), in order; a sentence without units has none."""
        self._tokenize(chain.from_iterable(sentences))
        windows: list[Window] = []
        for index, units in enumerate(sentences):
            if units:
                windows += self._windows_of(index, units)
        return windows

    def encode(self, units: list[str]) -> tuple[list[int], list[int]]:
        """Return the token ids of a sentence without special tokens, and the index of each unit's first token."""
        self._tokenize(units)
        return self._look_up(units)

    def is_unknown(self, unit: str) -> bool:
        """Whether the tokenizer has nothing but its unknown token for this unit."""
        self._tokenize([unit])
        return self.ids_of_unit[unit][0] == self.unknown_id

    def _windows_of(self, index: int, units: list[str]) -> list[Window]:
        ids, first_tokens = self._look_up(units)
        offsets = first_tokens + [len(ids)]  # tokens before each unit, and before the end
        windows = []
        for start, end, own_start, own_end in _cut(units, offsets, self.room):
            shift = len(self.prefix) - offsets[start]
            windows.append(
                Window(
                    sentence=index,
                    start=start,
                    end=end,
                    own_start=own_start,
                    own_end=own_end,
                    sentence_length=len(units),
                    ids=self.prefix + ids[offsets[start] : offsets[end]] + self.suffix,
                    first_tokens=[token + shift for token in first_tokens[start:end]],
                    max_length=self.max_length,
                )
            )
        return windows

    def _look_up(self, units: list[str]) -> tuple[list[int], list[int]]:
        """What `encode` returns, for units that have been tokenised before."""
        parts = [self.ids_of_unit[unit] for unit in units]
        ids = list(chain.from_iterable(parts))
        if len(ids) == len(parts):  # a token a unit, as nearly always in Chinese
            return ids, list(range(len(ids)))
        return ids, list(accumulate(map(len, parts[:-1]), initial=0))

    def _tokenize(self, units: Iterable[str]) -> None:
        """Add the token ids of units that are not cached yet."""
        if len(self.ids_of_unit) > LARGEST_CACHE:
            self.ids_of_unit.clear()
            self.dropped.clear()
        new = list(set(units) - self.ids_of_unit.keys())
        if not new:
            return
        texts = [_without_lone_surrogates(unit[: 16 + 4 * self.longest_unit]) for unit in new]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        space_ids = {self.tokenizer.convert_tokens_to_ids(mark) for mark in ("▁", "Ġ")} - {None, self.unknown_id}
        for unit, ids in zip(new, encoded, strict=True):
            if len(ids) > 1 and ids[0] in space_ids:  # the mark of a space before the text, where there is none
                ids = ids[1:]
            ids = [self.unknown_id if token in self.forbidden_ids else token for token in ids[: self.longest_unit]]
            if not ids:
                self.dropped.add(unit)
            self.ids_of_unit[unit] = tuple(ids) or (self.unknown_id,)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what the tokenizer puts before and after a text, by trying it on one."""
    for text in ("a", "1", "的"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


def _without_lone_surrogates(text: str) -> str:
    """Half a surrogate pair, which no tokenizer takes, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut(units: list[str], offsets: list[int], room: int) -> list[tuple[int, int, int, int]]:
    """Return (start, end, own_start, own_end) of the windows of one sentence.

    `offsets[i]` tokens come before unit i; `room` tokens fit a window. A window ends in the last quarter of its room
    and the next begins an eighth to a quarter before that, both after punctuation where there is some. The overlap is
    shared at its middle, so each side sees the same distance.
    """
    length = len(units)
    cuts, start, own_start = [], 0, 0
    while offsets[length] - offsets[start] > room:
        last_end = bisect_right(offsets, offsets[start] + room) - 1
        first_end = bisect_left(offsets, offsets[start] + room - room // 4)
        end = _after_punctuation(units, first_end, last_end) or last_end
        first_start = max(bisect_left(offsets, offsets[end] - room // 4), start + 1)
        last_start = bisect_right(offsets, offsets[end] - room // 8) - 1
        next_start = min(_after_punctuation(units, first_start, last_start) or first_start, end)
        middle = bisect_left(offsets, (offsets[next_start] + offsets[end]) // 2, next_start, end)
        cuts.append((start, end, own_start, middle))
        start, own_start = next_start, middle
    cuts.append((start, length, own_start, length))
    return cuts


def _after_punctuation(units: list[str], low: int, high: int) -> int | None:
    """Return the last place in low..high (inclusive) right after punctuation, preferring the end of a clause."""
    after_pause = None
    for place in range(high, low - 1, -1):
        if units[place - 1] in CLAUSE_ENDS:
            return place
        if after_pause is None and units[place - 1] in PAUSES:
            after_pause = place
    return after_pause


def stitch(batch: list[Window], scores: Any, rows_of_sentence: dict[int, np.ndarray]) -> None:
    """Write the scores of the units that each window owns into `rows_of_sentence`; the way back from a batch.

    `scores` is float [batch, length, labels], an array or a tensor. `rows_of_sentence` maps the index of a sentence to
    float32 [units, labels] and grows as sentences turn up. After all batches every sentence that has units is there,
    with a row for each unit.
    """
    if hasattr(scores, "detach"):
        scores = scores.detach().float().cpu().numpy()
    for row, window in enumerate(batch):
        if window.sentence not in rows_of_sentence:
            rows_of_sentence[window.sentence] = np.zeros((window.sentence_length, scores.shape[-1]), np.float32)
        rows_of_sentence[window.sentence][window.own_start : window.own_end] = scores[row, window.own_tokens]


def text_units(text: str, unit: str) -> list[tuple[str, int, int]]:
    """Return (unit, start, end) of a text: its characters, or, for "word", words and single marks without the space."""
    if unit == "character":
        return [(char, place, place + 1) for place, char in enumerate(text)]
    return [(match.group(), *match.span()) for match in WORD_PATTERN.finditer(text)]
