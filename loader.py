"""Sentences → windows of token ids → padded batches, and the way back: window scores → one tag per character.

Each distinct unit (a character, or a word of an English corpus) is tokenised once and cached. That loses the merges a
tokenizer would make across units, and buys an exact alignment with any tokenizer at the cost of a table look-up.
A sentence that does not fit is cut into overlapping windows; every unit belongs to the one that shows most around it.
What files hold is formats.py's affair; its words and those of survey.py are passed on here.
"""

import argparse
import json
import os
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain
from random import Random

import numpy as np

from errors import UserError, command
from formats import Corpus, Sentence, read, spans
from survey import compare, render, survey

__all__ = ["Corpus", "Sentence", "Units", "Window", "batches", "collate", "compare", "decode", "label_list", "read",
           "sample", "spans", "stitch", "text_units", "viterbi"]

STRONG, WEAK = set("。！？!?；;\n…"), set("，、,:：.”’』」）) \u3000")  # a window is best cut after these
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
FORBIDDEN = np.float32(-1e30)  # finite, so that sums of it with themselves and with scores stay comparable
LENGTHS = 8  # batches have lengths of this step: matrix products are compiled, and cached, for each length anew
POOL = 50  # batches whose windows are sorted by length together: little padding, and still a different mix each epoch


def sample(sentences: list[Sentence], n: int | None, seed: int) -> list[Sentence]:
    """`n` sentences drawn without replacement by `seed`, in their old order; all where n is None or not smaller."""
    if n is None or n >= len(sentences):
        return list(sentences)
    return [sentences[i] for i in sorted(Random(seed).sample(range(len(sentences)), n))]


def label_list(*parts: Corpus | list[Sentence]) -> list[str]:
    """The labels of a model for these sentences: O, then B- and I- of each type, types sorted."""
    tags = {tag for part in parts for sentence in getattr(part, "sentences", part) for tag in sentence.tags}
    types = sorted({tag[2:] for tag in tags if tag != "O"})
    return ["O"] + [prefix + kind for kind in types for prefix in ("B-", "I-")]


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


def batches(windows: list[Window], batch_size: int, seed: int | None, tokens: int | None = None) -> list[list[Window]]:
    """Windows of like length together, in an order drawn from `seed`; None: strictly by length, longest first, and then
    with `tokens` no batch of several windows has more of them, padding counted."""
    def length(window):
        return -len(window.ids)

    if seed is None:
        ordered, made, done = sorted(windows, key=length), [], 0
        while done < len(ordered):
            fitting = max(1, tokens // _rounded(len(ordered[done].ids))) if tokens else batch_size
            made.append(ordered[done:done + min(batch_size, fitting)])
            done += len(made[-1])
        return made
    draw = Random(seed)
    shuffled = draw.sample(windows, len(windows))
    made = []
    for pool in range(0, len(shuffled), POOL * batch_size):
        ordered = sorted(shuffled[pool:pool + POOL * batch_size], key=length)
        made += [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]
    draw.shuffle(made)
    return made


def _rounded(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


def collate(batch: list[Window], pad_id: int, gold: list[list[int]] | None) -> dict:
    """input_ids, attention_mask and, with `gold` (label indices of each sentence), labels: int64 tensors [B, L].

    L is the longest window of the batch, rounded up to LENGTHS where the model has room for that. labels is -100 but at
    the first token of each unit that the window owns.
    """
    import torch

    longest = max(len(window.ids) for window in batch)
    rounded = _rounded(longest)
    shape = len(batch), rounded if rounded <= batch[0].limit else longest
    ids = np.full(shape, pad_id, np.int64)
    mask = np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, window in enumerate(batch):
        ids[row, :len(window.ids)] = window.ids
        mask[row, :len(window.ids)] = 1
        if gold is not None:
            own = window.first[window.own_start - window.start:window.own_end - window.start]
            labels[row, own] = gold[window.sentence][window.own_start:window.own_end]
    arrays = {"input_ids": ids, "attention_mask": mask} | ({"labels": labels} if gold is not None else {})
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


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


def decode(scores: list[np.ndarray], labels: list[str], how: str) -> list[np.ndarray]:
    """Label indices, int64 [n], for each sentence's scores [n, labels]; `how` is "argmax" or "viterbi"."""
    if how == "viterbi":
        return viterbi(scores, labels)
    return [np.argmax(rows, axis=-1) if len(rows) else np.zeros(0, np.int64) for rows in scores]


def viterbi(scores: list[np.ndarray], labels: list[str]) -> list[np.ndarray]:
    """The best label indices, int64 [n], that IOB2 allows, for each sentence's log-probabilities [n, labels].

    Exact. Without the constraint argmax would be best, and nearly everywhere it is well-formed already. So argmax
    stands, and only stretches around a forbidden step are solved by dynamic programming, all of them in one batch per
    length; they grow until no step is forbidden. What is best with some steps unchecked, and checks, is best of all.
    """
    lengths = [len(rows) for rows in scores]
    if not sum(lengths):
        return [np.zeros(0, np.int64) for _ in scores]
    flat = np.concatenate([rows for rows in scores if len(rows)]).astype(np.float32)
    flat = np.nan_to_num(flat, copy=False, nan=-1e9, neginf=-1e9, posinf=1e9)
    inside = np.array([label.startswith("I-") for label in labels])
    allowed = np.array([[after[:2] != "I-" or before[1:] == after[1:] for after in labels] for before in labels])
    begins = np.cumsum([0] + [n for n in lengths if n])[:-1]
    flat[begins[:, None], np.flatnonzero(inside)] = FORBIDDEN  # no sentence starts inside an entity
    path = flat.argmax(axis=1)
    cut = np.ones(len(flat), bool)  # True where a stretch begins, that is, where the step is not looked at
    radius = 2
    while len(clash := np.flatnonzero(~allowed[path[:-1], path[1:]] & cut[1:])):
        depth = np.zeros(len(flat) + 1, np.int64)
        np.add.at(depth, np.maximum(clash + 1 - radius, 0), 1)
        np.add.at(depth, np.minimum(clash + 2 + radius, len(flat)), -1)
        cut &= np.cumsum(depth[:-1]) == 0
        cut[begins] = True
        radius *= 2
        _solve(flat, np.flatnonzero(cut), np.where(allowed, np.float32(0), FORBIDDEN), path)
    return np.split(path, np.cumsum(lengths)[:-1])


def _solve(flat: np.ndarray, begins: np.ndarray, steps: np.ndarray, path: np.ndarray) -> None:
    """Viterbi over the stretches of `flat` [N, labels] that begin at `begins`; writes those longer than 1 into `path`.

    Stretches of like length (to the next power of two) are padded with rows in which only O, label 0, costs nothing.
    """
    sizes = np.diff(np.append(begins, len(flat)))
    widths = 1 << np.ceil(np.log2(sizes)).astype(int)
    for width in np.unique(widths[sizes > 1]):
        chosen = np.flatnonzero((widths == width) & (sizes > 1))
        for group in np.array_split(chosen, -(-len(chosen) * width // 262_144)):  # bounds the memory
            time = begins[group][:, None] + np.arange(width)
            real = np.arange(width) < sizes[group][:, None]
            emit = np.where(real[:, :, None], flat[np.minimum(time, len(flat) - 1)], FORBIDDEN)
            emit[~real, 0] = 0
            best, back = emit[:, 0], np.empty((width, *emit[:, 0].shape), np.int16)
            for t in range(1, width):
                options = best[:, :, None] + steps
                back[t] = options.argmax(axis=1)
                best = options.max(axis=1) + emit[:, t]
            labels = np.empty(time.shape, np.int64)
            labels[:, -1] = best.argmax(axis=1)
            for t in range(width - 1, 0, -1):
                labels[:, t - 1] = back[t, np.arange(len(group)), labels[:, t]]
            path[time[real]] = labels[real]


def text_units(text: str, unit: str) -> list[tuple[str, int, int]]:
    """(unit, start, end) of a text: every character of it, or, for "word", words and single marks without the space."""
    if unit == "character":
        return [(char, place, place + 1) for place, char in enumerate(text)]
    return [(found.group(), *found.span()) for found in re.finditer(r"\w+(?:[-.'’]\w+)*|[^\w\s]", text)]


@command
def main(argv: list[str] | None = None) -> None:
    """`python loader.py FILE...`: look at tagged files before training on them."""
    parser = argparse.ArgumentParser(description="Shows what tagged files hold, and warns of what spoils a training.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="tagged files, the training file first; or hub:NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--tokenizer", metavar="DIR", help="encoder whose tokenizer is tried: a folder or a hub name")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a window (%(default)s)")
    args = parser.parse_args(argv)
    corpora = [read(file) for file in args.files]
    units = None
    if args.tokenizer:
        from transformers import AutoTokenizer  # slow to import, and only needed here

        words = {"add_prefix_space": True} if corpora[0].unit == "word" else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, **words)
        except Exception as error:  # whatever lies below: network, missing files, damaged ones
            raise UserError(f"{args.tokenizer}: no tokenizer there ({str(error).splitlines()[0]}); give a folder with "
                            "tokenizer.json or a hub name") from None
        units = Units(tokenizer, corpora[0].unit, True, args.max_length)
    report = survey(corpora, units, args.max_length)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(render(report, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


if __name__ == "__main__":
    main()
