"""Text files to training pieces: read, cut, and kept apart from the held-out files."""

import itertools
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

LONG, SHORT = 254, 126  # characters of a piece at most; with [CLS] and [SEP] they fill 256 or 128 positions
LONG_SHARE = 0.25  # of the lines are cut at LONG: enough to keep the later positions trained, at little cost
GRAM = 16  # a training piece may share no run of this many characters with a held-out file
MIN_LINE = 5  # characters; what is shorter teaches little


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, .xz or plain; of a BIO file its sentences."""
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    is_bio = sum(len(line) > 2 and line[1:2] in " \t" for line in lines[:1000]) > 500
    return ["".join(line[0] for line in block) for block in blocks(lines)] if is_bio else lines


def blocks(lines) -> Iterator[list[str]]:
    """Yield the lines between blank ones, as lists: the sentences of a BIO file."""
    for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield list(block)


def read_gold(path: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Return ({sentence: its tags as numbers}, [tag]) of a BIO file of single characters. O is number 0."""
    tagged = {}
    with open(path, encoding="utf-8") as file:
        for block in blocks(file):
            fields = [line.split() for line in block]
            if all(len(token) == 1 for token, *_ in fields):
                tagged["".join(token for token, *_ in fields)] = [tag for *_, tag in fields]
    names = sorted({tag for tags in tagged.values() for tag in tags}, key=lambda tag: (tag != "O", tag))
    number = {tag: i for i, tag in enumerate(names)}
    return {sentence: [number[tag] for tag in tags] for sentence, tags in tagged.items()}, names


def cut(line: str, limit: int) -> Iterator[str]:
    """Cut a line into pieces of at most `limit` characters, after punctuation where there is some."""
    while len(line) > limit:
        end = max(line.rfind(mark, limit // 2, limit) for mark in "。！？；，、")
        end = end + 1 if end > 0 else limit
        yield line[:end]
        line = line[end:]
    if line:
        yield line


class HeldOut:
    """The files that no training piece may repeat."""

    def __init__(self, paths: list[Path]):
        self.sentences: set[str] = set()
        self.grams: set[str] = set()
        for path in paths:
            for line in read_lines(path):
                line = "".join(line.split())
                self.sentences.add(line)
                self.grams.update(_grams(line))

    def repeats(self, text: str) -> bool:
        """Whether the text is one of the sentences or shares GRAM characters in a row with one."""
        return text in self.sentences or not self.grams.isdisjoint(_grams(text))


def _grams(text: str) -> Iterator[str]:
    return (text[i : i + GRAM] for i in range(len(text) - GRAM + 1))


def collect(work: Path, paths: list[Path], held_out: HeldOut, limit: int | None, seed: int = 0) -> list[str]:
    """Return the training pieces in random order, at most `limit`; write them to text.json, or read them from it.

    Whitespace is dropped, every line is used once, and none repeats a held-out file: checked again at the end."""
    target = work / "text.json"
    if target.exists():
        return json.loads(target.read_text(encoding="utf-8"))
    rng, dropped = random.Random(seed), 0
    seen: set[str] = set()
    pieces: list[str] = []
    for path in paths:
        before = len(pieces)
        for line in read_lines(path):
            line = "".join(line.split())
            if len(line) < MIN_LINE or line in seen:
                continue
            seen.add(line)
            if held_out.repeats(line):
                dropped += 1
                continue
            parts = cut(line, LONG if rng.random() < LONG_SHARE else SHORT)
            pieces.extend(part for part in parts if part not in held_out.sentences)
        print(f"text: {path.name}: {len(pieces) - before} pieces", flush=True)
    rng.shuffle(pieces)
    pieces = pieces[:limit]
    left = sum(map(held_out.repeats, pieces))
    print(
        f"text: {len(pieces)} pieces, {sum(map(len, pieces))} characters; {dropped} lines dropped that share {GRAM} "
        f"characters with the held-out files ({len(held_out.grams)} such runs); {left} left that do",
        flush=True,
    )
    assert left == 0
    write_whole(target, json.dumps(pieces, ensure_ascii=False).encode())
    return pieces


def collect_gold(path: Path | None, held_out: HeldOut) -> tuple[list[str], list[list[int]], list[str]]:
    """Return (pieces, their tags as numbers, tag names) of a BIO file, without what repeats a held-out file."""
    if path is None:
        return [], [], ["O"]
    tagged, names = read_gold(path)
    pieces, tags = [], []
    for sentence, numbers in tagged.items():
        if held_out.repeats(sentence):
            continue
        begin = 0
        for piece in cut(sentence, LONG):
            pieces.append(piece)
            tags.append(numbers[begin : begin + len(piece)])
            begin += len(piece)
    print(f"text: gold: {len(pieces)} pieces, {sum(map(len, pieces))} characters", flush=True)
    return pieces, tags, names


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
