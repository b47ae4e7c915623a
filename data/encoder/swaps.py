"""Entities exchanged for others of their type, with their labels."""

import random
from collections.abc import Iterable

import numpy as np
from batches import Piece

LONGEST = 500  # characters of a piece after exchanges: one that would be longer stays as it is

Span = tuple[int, int, str]  # first character, end, type


class Swaps:
    """Exchanges a share of the entities; an entity is what the gold tags say, or else those of fine-tuned models."""

    def __init__(self, tags: list[str], share: float):
        """tags: the gold tags, B-X, I-X and O."""
        self.tags, self.share = tags, share

    def spans(self, piece: Piece) -> list[Span]:
        """Return the entities of a piece, of soft tags those whose every tag has more than half of the mass."""
        if piece.gold is not None:
            numbers = piece.gold
        elif piece.silver is not None:
            numbers = best(piece.silver)
        else:
            return []
        spans: list[Span] = []
        for place, number in enumerate(numbers):
            tag = self.tags[number] if number >= 0 else "?"
            if tag.startswith("B-"):
                spans.append((place, place + 1, tag[2:]))
            elif spans and spans[-1][1] == place and tag == f"I-{spans[-1][2]}":
                spans[-1] = (spans[-1][0], place + 1, spans[-1][2])
            elif tag != "O" and spans and spans[-1][1] == place:
                spans.pop()  # an entity whose end is unsure
        return spans

    def pool(self, pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
        """Return the entities of these pieces by type, each as a piece of its own."""
        pool: dict[str, list[Piece]] = {}
        for piece in pieces:
            for begin, end, kind in self.spans(piece):
                pool.setdefault(kind, []).append(cut(piece, begin, end))
        return pool

    def exchange(self, piece: Piece, pool: dict[str, list[Piece]], rng: random.Random) -> Piece:
        """Return the piece with a share of its entities exchanged for others of the pool."""
        parts, done = [], 0
        for begin, end, kind in self.spans(piece):
            if rng.random() < self.share:
                parts += [cut(piece, done, begin), rng.choice(pool[kind])]
                done = end
        if not parts:
            return piece
        result = join([*parts, cut(piece, done, len(piece.text))])
        return result if len(result.text) <= LONGEST else piece


def best(label: np.ndarray) -> list[int]:
    """uint8 [characters, TOP, 2] -> the likeliest tag of each character, -1 where it has half of the mass or less."""
    rows, column = np.arange(len(label)), label[:, :, 1].argmax(1)
    return np.where(label[rows, column, 1] > 127, label[rows, column, 0].astype(int), -1).tolist()


def cut(piece: Piece, begin: int, end: int) -> Piece:
    gold = None if piece.gold is None else piece.gold[begin:end]
    silver = None if piece.silver is None else piece.silver[begin:end]
    return Piece(piece.text[begin:end], piece.label[begin:end], gold, silver)


def join(parts: list[Piece]) -> Piece:
    gold = None if parts[0].gold is None else [number for part in parts for number in part.gold]
    silver = None if parts[0].silver is None else np.concatenate([part.silver for part in parts])
    return Piece("".join(part.text for part in parts), np.concatenate([part.label for part in parts]), gold, silver)
