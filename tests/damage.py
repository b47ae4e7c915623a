"""Healthy files of every format, and ways to damage a file: (random.Random, bytes) -> bytes."""

import json
import re
from pathlib import Path

import tiny

from ner import decoding

NER_DATA = Path(__file__).resolve().parents[2] / "shared" / "ner_data"


def originals() -> list[bytes]:
    """Healthy files of every format, and a real one where it lies beside the project."""
    made = tiny.sentences(30, seed=5)
    lines = [[f"{char} {tag}" for char, tag in zip(*sentence, strict=True)] for sentence in made]
    bio = "\n\n".join("\n".join(block) for block in lines) + "\n"
    last = re.compile(r"I-(\w+)\n(?!.* I-)")
    bmes = re.sub(r"B-(\w+)\n(?!.* I-)", r"S-\1\n", last.sub(r"E-\1\n", bio)).replace(" I-", " M-")
    conll = "-DOCSTART- -X- O O\n\n" + bio.replace(" ", " NN x ")
    offsets = [
        {"text": "".join(chars), "label": [[s, e, kind] for kind, s, e in decoding.spans(tags)]} for chars, tags in made
    ]
    cluener = [
        {"text": record["text"], "label": {kind: {record["text"][s:e]: [[s, e - 1]]} for s, e, kind in record["label"]}}
        for record in offsets
    ]
    tasks = [
        {
            "data": {"text": record["text"]},
            "annotations": [
                {"result": [{"value": {"start": s, "end": e, "labels": [kind]}} for s, e, kind in record["label"]]}
            ],
        }
        for record in offsets
    ]
    files = [
        bio,
        bio.replace("\n", "\r\n").replace(" ", "\t"),
        bmes,
        bmes.replace("E-", "L-").replace("S-", "U-").replace("M-", "I-"),
        conll,
        *("\n".join(json.dumps(record, ensure_ascii=False) for record in records) for records in (offsets, cluener)),
        json.dumps(offsets, ensure_ascii=False, indent=1),
        json.dumps(tasks, ensure_ascii=False),
        "token,tag\n" + bio.replace(" ", ","),
    ]
    encoded = [file.encode() for file in files] + [
        bio.encode("gb18030"),
        bio.encode("utf-16"),
        b"\xef\xbb\xbf" + bio.encode(),
    ]
    if NER_DATA.is_dir():
        encoded.append((NER_DATA / "dev").read_bytes()[:20_000])
    return encoded


def in_lines(change):
    """A mutator of the list of lines from one of a single line."""

    def mutate(draw, data):
        lines = data.split(b"\n")
        for _ in range(draw.choice([1, 1, 1, 3, 30])):
            place = draw.randrange(len(lines))
            lines[place] = change(draw, lines[place])
        return b"\n".join(lines)

    mutate.__name__ = change.__name__
    return mutate


def bytes_flipped(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 10, 200])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def encodings_mixed(draw, data):
    text, share = data.decode("utf-8", "replace"), draw.choice([0.01, 0.5, 0.99])
    return b"\n".join(
        line.encode(draw.choice(["gb18030", "utf-16", "gb18030"]) if draw.random() < share else "utf-8", "replace")
        for line in text.split("\n")
    )


def pieces_moved(draw, data):
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice([data[:a], data[a:b], data[b:] + data[a:b] + data[:a], data[:b] + data[a:], data[:a] + data[b:]])


def odd_pieces_put_in(draw, data):
    piece = draw.choice(
        [
            "\ufeff",
            "\r",
            "\u2028",
            "\x0b\x0c\x1c\x85",
            "\u3000 O\n",
            "  O\n",
            "\t\n",
            "\\ud83d",
            "\\u0000",
            "é O\n",
            "[[[[",
            "{}\n",
            '{"text": 1}\n',
            '{"text": "ab", "label": {}}\n',
            "# x y\n",
            "-DOCSTART- O\n",
            "O\n",
        ]
    ).encode()
    place = draw.randrange(len(data) + 1)
    return data[:place] + piece * draw.choice([1, 2, 50]) + data[place:]


def nul(draw, data):
    place = draw.randrange(len(data) + 1)
    return data[:place] + b"\0" * draw.choice([1, 1000]) + data[place:]


def a_line_of_a_megabyte(draw, data):
    place = draw.randrange(len(data) + 1)
    return (
        data[:place]
        + draw.choice(["x", "京", "x ", "x O\t", "[", '{"a":', '"', "\u3000", " ", "\r"]).encode() * 1_000_000
        + data[place:]
    )


def a_hundred_thousand_empty_lines(draw, data):
    place = data.find(b"\n", draw.randrange(len(data) + 1)) + 1
    return data[:place] + draw.choice([b"\n", b"\r\n", b" \n", "\u3000\n".encode()]) * 100_000 + data[place:]


@in_lines
def lines_cut(draw, line):
    return line[: draw.randrange(len(line) + 1)] if draw.random() < 0.5 else line[draw.randrange(len(line) + 1) :]


@in_lines
def tags_mangled(draw, line):
    tags = [
        b"X-PER",
        b"B-",
        b"-",
        b"PER",
        b"I-NEW",
        b"M-PER",
        b"E-LOC",
        b"U-ORG",
        b"b-PER",
        b"0",
        b"B_PER",
        b"B-PER-X",
        b"I-PER",
        "B-人".encode(),
    ]
    head, _, _ = line.rpartition(b" ")
    return (
        re.sub(rb'"(PER|LOC|ORG)"', draw.choice([b"5", b'""', b"null", b"[]", b'"a b"']), line)
        if line[:1] == b"{"
        else head + b" " + draw.choice(tags)
    )


@in_lines
def fields_added(draw, line):
    return draw.choice(
        [
            line + b" x",
            line + b"\tO",
            b"x " + line,
            line + b" " + line,
            b" " + line,
            line.replace(b" ", b""),
            line + b" ",
        ]
    )


@in_lines
def numbers_changed(draw, line):
    return re.sub(
        rb"\d+", lambda found: draw.choice([found[0], b"-1", b"99999", b"1.5", b"true", b'"1"', b"1e400", b"NaN"]), line
    )


COMMON = [
    bytes_flipped,
    lines_cut,
    encodings_mixed,
    tags_mangled,
    fields_added,
    numbers_changed,
    pieces_moved,
    odd_pieces_put_in,
    nul,
]
RARE = [a_line_of_a_megabyte, a_hundred_thousand_empty_lines]
