"""Damaged files: each one loads with counts that add up, or ends in one line with file and line number.

FUZZ_CASES sets how many damaged files the seeded mutator makes (400 unless told) and, at half as many, hypothesis.
A failing case is named by its number: the same number makes the same file again.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import tracemalloc
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner.errors import UserError
from ner.formats import columns
from ner.formats.source import Source, read_text

CASES = int(os.environ.get("FUZZ_CASES", "400"))
NER_DATA = Path(__file__).resolve().parents[2] / "shared" / "ner_data"
SECONDS = 20  # more for one file is a hang
PREFIXES = "BIESMLU"


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


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_counts_of_offsets(corpus, text):
    """Every character of every text is there, and every entity is there or counted as skipped."""
    records = (
        json.loads(text.strip()) if text.lstrip()[0] == "[" else [json.loads(s) for s in text.split("\n") if s.strip()]
    )
    characters = entities = 0
    for record in records:
        if "data" in record and "annotations" in record:
            if not record["annotations"]:
                continue
            named = [item for item in record["annotations"][0]["result"] if "labels" in item.get("value", ())]
            (task_text,) = record["data"].values()  # under whatever name the damage has left
            record = {"text": task_text, "label": named}
        label = record["label"]
        characters += len(record["text"])
        if isinstance(label, dict):
            entities += sum(len(places) for names in label.values() for places in names.values())
        else:
            entities += len(label)
    assert corpus.unit_count == characters
    assert corpus.entities().total() + corpus.skipped == entities


def check_counts_of_columns(corpus, lines):
    """Every line that holds a token is there, with a tag that is O where the file says O."""
    fields = [
        [part for part in line.replace("\t", " ").split(" ") if part.strip("\r")] for line in lines if line.strip()
    ]
    fields = [
        parts
        for parts in fields
        if parts[0] != "-DOCSTART-" and not (parts[0] == "#" and len(parts) > 2 and parts[-1][1:2] != "-")
    ]
    assert corpus.unit_count == len(fields), "characters in = characters out"
    tagged = [parts[-1].strip("\r") for parts in fields if parts[-1].strip("\r") != "O"]
    assert sum(tag != "O" for sentence in corpus.sentences for tag in sentence.tags) == len(tagged)
    assert corpus.entities().total() >= sum(tag[0] in "BSU" for tag in tagged), "each beginning is an entity"


def check(path: str) -> bool:
    """Reads one file and checks everything that must hold of the outcome; True if it was taken."""
    try:
        with no_hang():
            corpus = formats.read(path)
    except UserError as error:
        told = str(error)
        place = re.match(re.escape(path) + r":(\d+): .", told)
        assert place and "\n" not in told and len(told) < len(path) + 500, told
        assert 1 <= int(place[1]) <= Path(path).read_bytes().count(b"\n") + Path(path).read_bytes().count(b"\r") + 1, (
            told
        )
        return False
    text = read_text(path)
    lines = text.split("\n")
    for sentence in corpus.sentences:
        assert sentence.units and len(sentence.units) == len(sentence.tags) and lines[sentence.line - 1].strip()
        for before, tag in itertools.pairwise(["O", *sentence.tags]):
            assert tag == "O" or tag[:2] == "B-" or tag[:2] == "I-" and before[1:] == tag[1:], "well-formed IOB2"
    if corpus.scheme == "offsets":
        check_counts_of_offsets(corpus, text)
    elif not columns.has_header(Source(path)) and not corpus.notes:  # no CSV, no words that became characters
        check_counts_of_columns(corpus, lines)
    assert corpus.entities().total() == sum(len(decoding.spans(sentence.tags)) for sentence in corpus.sentences)
    return True


def test_healthy_files_are_taken(tmp_path):
    schemes = []
    for number, data in enumerate(originals()):
        (tmp_path / "file").write_bytes(data)
        assert check(str(tmp_path / "file")), number
        schemes.append(formats.read(str(tmp_path / "file")).scheme)
    assert schemes[:10] == ["BIO", "BIO", "BMES", "BILOU", "BIO", *["offsets"] * 4, "BIO"]


def test_seeded_mutator(tmp_path, capsys):
    files, path, taken, used = originals(), tmp_path / "file", 0, set()
    for case in range(CASES):
        draw = random.Random(case)
        data = draw.choice(files)
        steps = draw.choices(RARE if case % 40 == 39 else COMMON, k=1 if case % 40 == 39 else draw.choice([1, 1, 2, 3]))
        for step in steps:
            data = step(draw, data) or b"x"
        path.write_bytes(data)
        try:
            taken += check(str(path))
        except BaseException as error:
            raise AssertionError(f"case {case}: {[step.__name__ for step in steps]}: {error!r}") from error
        used.update(step.__name__ for step in steps)
    with capsys.disabled():
        print(f"\nfuzzed the loader: {CASES:,} damaged files, {taken:,} loaded, {CASES - taken:,} refused by line")
    if CASES >= 400:
        assert len(used) == len(COMMON + RARE) and CASES // 20 < taken < CASES - CASES // 20


tokens = st.one_of(st.characters(codec="utf-8"), st.text(max_size=3))
tags = st.one_of(
    st.just("O"),
    st.builds(lambda p, k: f"{p}-{k}", st.sampled_from(PREFIXES), st.sampled_from(["A", "B-C", "人"])),
    st.text(max_size=4),
)
rows = st.builds(
    lambda token, gap, tag: token + gap + tag, tokens, st.sampled_from([" ", "\t", "  ", "\u3000", ""]), tags
)
records = st.builds(
    lambda text, label: json.dumps({"text": text, "label": label}),
    st.text(max_size=8),
    st.one_of(
        st.lists(st.tuples(st.integers(-1, 9), st.integers(-1, 9), st.sampled_from(["A", "", None]))),
        st.none(),
        st.integers(),
        st.dictionaries(
            st.text(max_size=2),
            st.dictionaries(st.text(max_size=2), st.lists(st.lists(st.integers(0, 3), max_size=3))),
            max_size=2,
        ),
    ),
)
contents = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(rows, st.just("")), max_size=12).map("\n".join),
    st.lists(records, max_size=3).map("\n".join),
)
seen = {"cases": 0, "taken": 0}


@settings(max_examples=max(10, CASES // 2), deadline=None, derandomize=True)
@given(content=contents)
def test_hypothesis(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hypothesis"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    seen["cases"] += 1
    seen["taken"] += check(str(path))


def test_hypothesis_met_both_outcomes(capsys):
    if not seen["cases"]:
        pytest.skip("counts what test_hypothesis did, which was not run")
    with capsys.disabled():
        print(f"\nfuzzed the loader by hypothesis: {seen['cases']:,} files, {seen['taken']:,} loaded")
    assert 0 < seen["taken"] < seen["cases"]


@pytest.mark.parametrize(
    "content",
    [
        b"x O\n" * 100_000,
        b"x O\n" + b"\n" * 500_000,
        b"x" * 1_000_000,
        b"x" * 1_000_000 + b" O\n",
        b"x " * 500_000,
        "".join(f"{chr(0x4E00 + n % 20_000)}{n} B-T{n % 3000}\n" for n in range(30_000)).encode(),
        b'{"text": "' + b"x" * 1_000_000 + b'", "label": []}',
        b'{"text": "x", "label": ' + b"[" * 1_000_000,
        b'{"text": "'
        + b"x" * 100_000
        + b'", "label": ['
        + b",".join(b'[%d, 100000, "A"]' % n for n in range(30_000))
        + b"]}",
        "京 O\n".encode("gb18030") * 100_000,
        b"\xff" * 1_000_000,
    ],
    ids=lambda content: str(content[:12]),
)
def test_memory_is_in_proportion_to_the_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError), no_hang():
            formats.read(str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(content), f"{peak / len(content):.1f} bytes for each of the file"
