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
from damage import COMMON, RARE, originals
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner.errors import UserError
from ner.formats import columns
from ner.formats.source import Source, read_text

CASES = int(os.environ.get("FUZZ_CASES", "400"))
SECONDS = 20  # of processor time; more for one file is a hang
PREFIXES = "BIESMLU"


@contextlib.contextmanager
def no_hang():
    """Raise TimeoutError where a block takes too much processor time, which no other program's load adds to."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


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
