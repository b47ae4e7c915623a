"""Shards of pieces, batches of pieces of like length, and what is masked in them."""

import collections
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from e5 import E5
from lac import TOP, Labeller, Lac, labels_of
from student import Batch

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNK, CLS, SEP, MASK = range(1, 5)
STEP = 8  # characters: the lengths of rows are multiples of it. On a CPU every new shape has its products compiled anew
SHARD = 2_000_000  # characters: a shard is labelled when training comes to it
ENTITIES = ("PER", "LOC", "ORG", "TIME")  # tags of the lexical analyser begin with these


class Piece(NamedTuple):
    """A piece of text and what is known of its characters."""

    text: str
    label: np.ndarray  # uint8 [characters, TOP, 2]: the analyser's tags and their probabilities in 255ths
    gold: list[int] | None
    silver: np.ndarray | None = None  # uint8 [characters, TOP, 2]: the same from fine-tuned models, over the gold tags


class Pieces:
    """A stream of pieces in shards, each with its labels, and in batches that can be gone on with anywhere."""

    def __init__(
        self,
        pieces: list[str],
        lac: Lac,
        labels: Path,
        batch_characters: int,
        plain_share: float = 1.0,
        gold: list[list[int]] | None = None,
        silver: Labeller | None = None,
    ):
        """labels: where the shards' labels go, a path to which `-000.npy` and so on is added; plain_share: of the
        pieces without an entity only this share is used; gold: tags of each piece; silver: who labels the pieces
        with soft gold tags."""
        self.lac, self.silver, self.labels = lac, silver, labels
        self.batch_characters, self.plain_share = batch_characters, plain_share
        self.is_entity = np.array([tag.startswith(ENTITIES) for tag in lac.tags])
        shard_of = np.cumsum([len(piece) for piece in pieces]) // SHARD
        bounds = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(pieces)]
        self.shards = [pieces[begin:end] for begin, end in itertools.pairwise(bounds)]
        self.gold = [gold[begin:end] for begin, end in itertools.pairwise(bounds)] if gold else None

    def batches(self, skip: int) -> Iterator[list[Piece]]:
        """Yield batches without end, epoch after epoch, from number `skip` on. A shard that is skipped whole is not
        labelled, unless its labels decide which of its pieces are used."""
        for epoch in itertools.count():
            for number, shard in enumerate(self.shards):
                chosen = self._chosen(number)
                planned = plan([len(shard[i]) for i in chosen], self.batch_characters, f"{epoch} {number}")
                if skip < len(planned):
                    labels = self._labels(self.lac, number)
                    gold = self.gold[number] if self.gold else [None] * len(shard)
                    silver = self._labels(self.silver, number, "silver-") if self.silver else [None] * len(shard)
                    for batch in planned[skip:]:
                        yield [Piece(shard[i], labels[i], gold[i], silver[i]) for i in (chosen[j] for j in batch)]
                skip = max(0, skip - len(planned))

    def _labels(self, teacher: Labeller, number: int, prefix: str = "") -> list[np.ndarray]:
        path = self.labels.with_name(f"{prefix}{self.labels.name}-{number:03}.npy")
        return labels_of(teacher, self.shards[number], path)

    def _chosen(self, number: int) -> list[int]:
        """The pieces of a shard with an entity, and `plain_share` of the others."""
        everything = list(range(len(self.shards[number])))
        if self.plain_share == 1.0:
            return everything
        rng, labels = random.Random(number), self._labels(self.lac, number)
        has_entity = [(self.is_entity[label[..., 0]] & (label[..., 1] > 127)).any() for label in labels]
        return [i for i in everything if has_entity[i] or rng.random() < self.plain_share]


def plan(lengths: list[int], batch_characters: int, seed: str) -> list[list[int]]:
    """Return batches of indices of pieces of like length, in random order.

    All rows of a batch are as long as the longest, rounded up to STEP, and as many as fill `batch_characters`."""
    rng = random.Random(seed)
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        groups[padded(length)].append(i)
    batches: list[list[int]] = []
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
    """Choose this share of the lexical analyser's words. Return for each character whether it is chosen and
    the number of its word."""
    best = label[np.arange(len(label)), label[:, :, 1].argmax(1), 0]
    word = np.cumsum(starts_word[best])
    return rng.random(word[-1] + 1)[word] < share, word


def mask_spans(length: int, share: float, rng) -> np.ndarray:
    """Choose spans of two characters that cover this share of a text, at random. Return bool for each character."""
    begins = rng.random(length + 1) < 1 - (1 - share) ** 0.5
    return begins[1:] | begins[:-1]


class Maker:
    """Makes the tensors of a batch from its pieces."""

    def __init__(self, vocab: dict[str, int], lac: Lac, e5: E5 | None, masking: str, share: float, device: str):
        """e5: where there is one, batches hold its vectors; masking: "words" (8 of 10 as [MASK], one as another
        character, one as it is) or "spans" (all as [MASK])."""
        self.vocab, self.e5, self.masking, self.share, self.device = vocab, e5, masking, share, device
        self.starts_word = np.array([not tag.endswith("-I") for tag in lac.tags])

    def make(self, pieces: list[Piece], seed: int) -> Batch:
        """Return the batch; which characters are masked is decided by the seed."""
        rng = np.random.default_rng(seed)
        shape = len(pieces), padded(max(len(piece.text) for piece in pieces))
        ids, originals, gold = np.zeros(shape, np.int64), np.full(shape, -100), np.full(shape, -100)
        tags, shares = np.zeros((*shape, TOP), np.int64), np.zeros((*shape, TOP), np.float32)
        silver_tags, silver_shares = np.zeros_like(tags), np.zeros_like(shares)
        for row, (text, label, numbers, silver) in enumerate(pieces):
            inside = slice(1, len(text) + 1)
            characters = np.array([self.vocab.get(c, UNK) for c in text])
            shown, chosen = self._mask(characters, label, rng)
            ids[row, 0], ids[row, inside], ids[row, len(text) + 1] = CLS, shown, SEP
            originals[row, inside] = np.where(chosen, characters, -100)
            tags[row, inside], shares[row, inside] = _soft(label)
            if silver is not None:
                silver_tags[row, inside], silver_shares[row, inside] = _soft(silver)
            if numbers is not None:
                gold[row, inside] = numbers
        tensors = [ids, (ids > 0).astype(np.int64), tags, shares, *_filled_up(originals.ravel())]
        batch = Batch(*(torch.from_numpy(tensor).to(self.device) for tensor in tensors))
        if (gold >= 0).any():
            batch.gold = torch.from_numpy(gold).to(self.device)
        if silver_shares.any():
            batch.silver = (
                torch.from_numpy(silver_tags).to(self.device),
                torch.from_numpy(silver_shares).to(self.device),
            )
        if self.e5:
            batch.vectors = self.e5.vectors([piece.text for piece in pieces], shape[1])
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


def _soft(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [characters, TOP, 2] -> the tags and their probabilities, [characters, TOP] each."""
    return label[:, :, 0], label[:, :, 1] / label[:, :, 1].sum(1, keepdims=True, dtype=np.float32)


def _filled_up(originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of what was chosen, and what stood there, filled up to a multiple of 64: few shapes of products."""
    places = np.flatnonzero(originals >= 0)
    spare = -len(places) % 64 or 64 * (not len(places))
    return np.pad(places, (0, spare)), np.pad(originals[places], (0, spare), constant_values=-100)
