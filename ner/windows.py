"""Sentences → windows of token ids, and the way back: window scores → one row per character.

Each distinct unit (a character, or a word of an English corpus) is tokenised once and cached. That loses the merges a
tokenizer would make across units, and buys an exact alignment with any tokenizer at the cost of a table look-up.
A sentence that does not fit is cut into overlapping windows; every unit belongs to the one that shows most around it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from ner.errors import UserError

STRONG, WEAK = set("。！？!?；;\n…"), set("，、,:：.”’』」）) \u3000")  # a window is best cut after these


@dataclass(slots=True)
class Window:
    """The slice of a sentence that fits the model. Units are counted from 0, spans are half-open."""

    sentence: int  # index of its sentence
    start: int  # the units it shows
    end: int
    own_start: int  # the units it answers for: each unit of a sentence is owned by exactly one window
    own_end: int
    total: int  # units of the whole sentence
    ids: list[int]  # token ids, special tokens included
    first: list[int]  # where in ids the first token of each shown unit stands
    limit: int = 0  # the most tokens a window may have


class Units:
    """Turns units into token ids with one tokenizer, and sentences into windows of at most `max_length` tokens.

    `unit` is "character" or "word" (a byte-level tokenizer has to be loaded with add_prefix_space=True for words).
    A unit that the tokenizer drops or cannot hold gets its unknown token. Raises UserError where max_length leaves no
    room for a token beside the special ones.
    """

    def __init__(self, tokenizer, unit: str, special_tokens: bool, max_length: int):
        self.tokenizer, self.unit, self.max_length = tokenizer, unit, max_length
        specials = [tokenizer.unk_token_id, *tokenizer.all_special_ids, 0]
        self.unknown = next(token for token in specials if token is not None)
        self.reserved = set(tokenizer.all_special_ids) - {self.unknown}
        self.prefix, self.suffix = self._special_tokens() if special_tokens else ([], [])
        self.room = max_length - len(self.prefix) - len(self.suffix)
        if self.room < 1:
            raise UserError(f"max_length {max_length} leaves no room beside {max_length - self.room} special tokens")
        self.longest = max(1, self.room // 4)  # tokens kept of one unit: a giant word still has neighbours
        self.known: dict[str, tuple[int, ...]] = {}  # unit → its token ids
        self.dropped: set[str] = set()  # units of which the tokenizer leaves nothing

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, found by trying it on one."""
        for probe in ("a", "1", "的"):
            bare = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
            full = self.tokenizer(probe)["input_ids"]
            for start in range(len(full) - len(bare) + 1):
                if bare and full[start:start + len(bare)] == bare:
                    return list(full[:start]), list(full[start + len(bare):])
        return [], []

    def _learn(self, units: Iterable[str]) -> None:
        """Adds the token ids of the units that are not known yet."""
        if len(self.known) > 1_000_000:  # a stream of ever new words must not fill the memory
            self.known.clear()
            self.dropped.clear()
        new = list(set(units) - self.known.keys())
        if not new:
            return
        texts = [unit[:16 + 4 * self.longest] for unit in new]
        # Half a surrogate pair, which no tokenizer takes, becomes U+FFFD.
        texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False,
                                 return_token_type_ids=False, verbose=False)["input_ids"]
        spaces = {self.tokenizer.convert_tokens_to_ids(mark) for mark in ("▁", "Ġ")} - {None, self.unknown}
        for unit, ids in zip(new, encoded):
            if len(ids) > 1 and ids[0] in spaces:  # the mark of a space before the text, where there is none
                ids = ids[1:]
            ids = [self.unknown if token in self.reserved else token for token in ids[:self.longest]]
            if not ids:
                self.dropped.add(unit)
            self.known[unit] = tuple(ids) or (self.unknown,)

    def is_unknown(self, unit: str) -> bool:
        """Whether the tokenizer has nothing but its unknown token for this unit."""
        self._learn([unit])
        return self.known[unit][0] == self.unknown

    def encode(self, chars: list[str]) -> tuple[list[int], list[int]]:
        """(token ids without special tokens, index in them of each unit's first token)."""
        self._learn(chars)
        return self._encode(chars)

    def _encode(self, chars: list[str]) -> tuple[list[int], list[int]]:
        parts = [self.known[char] for char in chars]
        ids = list(chain.from_iterable(parts))
        if len(ids) == len(parts):
            return ids, list(range(len(ids)))
        return ids, list(accumulate(map(len, parts[:-1]), initial=0))

    def windows(self, sentences: list[list[str]]) -> list[Window]:
        """The windows of all sentences (lists of units), in order; a sentence without units has none."""
        self._learn(chain.from_iterable(sentences))
        found, before = [], len(self.prefix)
        for index, chars in enumerate(sentences):
            if not chars:
                continue
            ids, first = self._encode(chars)
            ends = first + [len(ids)]
            for start, end, own_start, own_end in self._cuts(chars, ends):
                shift = before - ends[start]
                found.append(Window(index, start, end, own_start, own_end, len(chars),
                                    self.prefix + ids[ends[start]:ends[end]] + self.suffix,
                                    [place + shift for place in first[start:end]], self.max_length))
        return found

    def _cuts(self, chars: list[str], ends: list[int]) -> list[tuple[int, int, int, int]]:
        """(start, end, own_start, own_end) of the windows of one sentence; `ends[i]` tokens come before unit i.

        A window ends in the last quarter of its room and the next begins an eighth to a quarter before that, both after
        punctuation where there is some. The overlap is shared at its middle, so each side sees the same distance.
        """
        room, total = self.room, len(chars)
        cuts, start, own_start = [], 0, 0
        while ends[total] - ends[start] > room:
            limit = bisect_right(ends, ends[start] + room) - 1
            end = _after_mark(chars, bisect_left(ends, ends[start] + room - room // 4), limit) or limit
            low = max(bisect_left(ends, ends[end] - room // 4), start + 1)
            following = _after_mark(chars, low, bisect_right(ends, ends[end] - room // 8) - 1) or low
            following = min(following, end)
            middle = bisect_left(ends, (ends[following] + ends[end]) // 2, following, end)
            cuts.append((start, end, own_start, middle))
            start, own_start = following, middle
        cuts.append((start, total, own_start, total))
        return cuts


def _after_mark(chars: list[str], low: int, high: int) -> int | None:
    """The last place in low..high (inclusive) right after punctuation, rather that which ends a clause."""
    weak = None
    for place in range(high, low - 1, -1):
        mark = chars[place - 1]
        if mark in STRONG:
            return place
        if weak is None and mark in WEAK:
            weak = place
    return weak


def stitch(batch: list[Window], scores, out: dict[int, np.ndarray]) -> None:
    """The way back from `scores` (float [B, L, labels], array or tensor) of one batch.

    Writes the rows of the units that each window owns into `out`: sentence index → float32 [n units, labels], which
    grows as sentences turn up. After all batches every unit of every sentence that has units is filled.
    """
    if hasattr(scores, "detach"):
        scores = scores.detach().float().cpu().numpy()
    for row, window in enumerate(batch):
        if window.sentence not in out:
            out[window.sentence] = np.zeros((window.total, scores.shape[-1]), np.float32)
        own = window.first[window.own_start - window.start:window.own_end - window.start]
        out[window.sentence][window.own_start:window.own_end] = scores[row, own]


def text_units(text: str, unit: str) -> list[tuple[str, int, int]]:
    """(unit, start, end) of a text: every character of it, or, for "word", words and single marks without the space."""
    if unit == "character":
        return [(char, place, place + 1) for place, char in enumerate(text)]
    return [(found.group(), *found.span()) for found in re.finditer(r"\w+(?:[-.'’]\w+)*|[^\w\s]", text)]

