"""Shards of pieces, batches of pieces of like length, and what is masked in them."""

import collections
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lac import TOP, Lac, labels_of
from student import Batch

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNK, CLS, SEP, MASK = range(1, 5)
STEP = 8  # characters: the lengths of rows are multiples of it. On a CPU every new shape has its products compiled anew
SHARD = 2_000_000  # characters: a shard is labelled when training comes to it
ENTITIES = ("PER", "LOC", "ORG", "TIME")  # tags of the lexical analyser begin with these


class Pieces:
    """A stream of pieces: cut into shards, each with its labels, and into batches that can be gone on with anywhere."""

    def __init__(self, pieces: list[str], lac: Lac, labels: Path, batch_characters: int, plain_share: float = 1.0,
                 gold: list[list[int]] | None = None):  # fmt: skip
        """plain_share: of the pieces without an entity only this share is used; gold: tags of each piece."""
        self.lac, self.labels, self.batch_characters, self.plain_share = lac, labels, batch_characters, plain_share
        self.is_entity = np.array([tag.startswith(ENTITIES) for tag in lac.tags])
        ends = np.cumsum([len(piece) for piece in pieces]) // SHARD
        bounds = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(pieces)]
        self.shards = [pieces[a:b] for a, b in zip(bounds, bounds[1:])]
        self.gold = [gold[a:b] for a, b in zip(bounds, bounds[1:])] if gold else None

    def batches(self, skip: int) -> Iterator[list[tuple[str, np.ndarray, list[int] | None]]]:
        """Yield batches without end, from number `skip` on: lists of (piece, its labels, its gold tags or None)."""
        epoch = 0
        while True:
            for number, shard in enumerate(self.shards):
                if self.plain_share == 1.0:  # then a shard that is skipped needs no labels
                    planned = plan([len(piece) for piece in shard], self.batch_characters, f"{epoch} {number}")
                    if skip >= len(planned):
                        skip -= len(planned)
                        continue
                labels = labels_of(self.lac, shard, self.labels.with_name(f"{self.labels.name}-{number:03}.npy"))
                chosen = self._chosen(labels, number)
                planned = plan([len(shard[i]) for i in chosen], self.batch_characters, f"{epoch} {number}")
                for batch in planned[skip:]:
                    indices = [chosen[i] for i in batch]
                    yield [(shard[i], labels[i], self.gold[number][i] if self.gold else None) for i in indices]
                skip = max(0, skip - len(planned))
            epoch += 1

    def _chosen(self, labels: list[np.ndarray], number: int) -> list[int]:
        """The pieces of a shard with an entity, and `plain_share` of the others."""
        rng = random.Random(number)
        likely = [(self.is_entity[label[..., 0]] * (label[..., 1] > 127)).any() for label in labels]
        return [i for i, entity in enumerate(likely) if rng.random() < self.plain_share or entity]


def plan(lengths: list[int], batch_characters: int, seed: str) -> list[list[int]]:
    """Return batches of indices of pieces of like length, in random order.

    All rows of a batch are as long as the longest, rounded up to STEP, and as many as fill `batch_characters`."""
    rng = random.Random(seed)
    groups = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        groups[padded(length)].append(i)
    batches = []
    for length, group in sorted(groups.items()):
        rng.shuffle(group)
        rows = max(1, batch_characters // length)
        batches.extend(group[begin : begin + rows] for begin in range(0, len(group), rows))
    rng.shuffle(batches)
    return batches


def padded(length: int) -> int:
    """Positions of a piece of this many characters, with [CLS] and [SEP], in a batch."""
    return -(-(length + 2) // STEP) * STEP


def mask_words(label: np.ndarray, starts_word: np.ndarray, share: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """Choose this share of the lexical analyser's words. Return (chosen bool, number of its word) for each character."""
    best = label[np.arange(len(label)), label[:, :, 1].argmax(1), 0]
    word = np.cumsum(starts_word[best])
    return rng.random(word[-1] + 1)[word] < share, word


def mask_spans(length: int, share: float, rng) -> np.ndarray:
    """Choose spans of two characters that cover this share of a text, at random. Return bool for each character."""
    begins = rng.random(length + 1) < 1 - (1 - share) ** 0.5
    return begins[1:] | begins[:-1]


class Maker:
    """Makes the tensors of a batch from its pieces."""

    def __init__(self, vocab: dict[str, int], lac: Lac, masking: str, share: float, device: str):
        """masking: "words" (8 of 10 as [MASK], one as another character, one as it is) or "spans" (all as [MASK])."""
        self.vocab, self.masking, self.share, self.device = vocab, masking, share, device
        self.starts_word = np.array([not tag.endswith("-I") for tag in lac.tags])

    def make(self, pieces: list[tuple[str, np.ndarray, list[int] | None]], seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        shape = len(pieces), padded(max(len(text) for text, *_ in pieces))
        ids, tags, shares = np.zeros(shape, np.int64), np.zeros((*shape, TOP), np.int64), np.zeros((*shape, TOP), "f4")
        originals, gold = np.full(shape, -100), np.full(shape, -100)
        for row, (text, label, numbers) in enumerate(pieces):
            inside = slice(1, len(text) + 1)
            characters = np.array([self.vocab.get(c, UNK) for c in text])
            shown, chosen = self._mask(characters, label, rng)
            ids[row, 0], ids[row, inside], ids[row, len(text) + 1] = CLS, shown, SEP
            originals[row, inside] = np.where(chosen, characters, -100)
            tags[row, inside] = label[:, :, 0]
            shares[row, inside] = label[:, :, 1] / label[:, :, 1].sum(1, keepdims=True, dtype=np.float32)
            if numbers is not None:
                gold[row, inside] = numbers
        tensors = [ids, (ids > 0).astype(np.int64), tags, shares, *_filled_up(originals.ravel())]
        batch = Batch([text for text, *_ in pieces], *(torch.from_numpy(t).to(self.device) for t in tensors))
        batch.gold = torch.from_numpy(gold).to(self.device) if (gold >= 0).any() else None
        return batch

    def _mask(self, characters: np.ndarray, label: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
        """Return what the student sees, and bool: which characters were chosen."""
        if self.masking == "spans":
            chosen = mask_spans(len(characters), self.share, rng)
            return np.where(chosen, MASK, characters), chosen
        chosen, word = mask_words(label, self.starts_word, self.share, rng)
        kind, noise = rng.random(word[-1] + 1)[word], rng.integers(len(SPECIALS), len(self.vocab), len(characters))
        shown = np.where(chosen & (kind < 0.8), MASK, characters)
        return np.where(chosen & (kind > 0.9), noise, shown), chosen


def _filled_up(originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of what was chosen, and what stood there, filled up to a multiple of 64: few shapes of products."""
    places = np.flatnonzero(originals >= 0)
    spare = -len(places) % 64 or 64 * (not len(places))
    return np.pad(places, (0, spare)), np.pad(originals[places], (0, spare), constant_values=-100)
