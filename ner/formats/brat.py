"""brat's standoff format: the text in FILE.txt, its entities by offsets in FILE.ann beside it.

Either file of a pair is read with its partner; of a folder all pairs are.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ner.corpus import Corpus, Sentence
from ner.errors import UserError
from ner.formats.assembly import corpus_of_offsets, paint
from ner.formats.source import Source, quote, read_text

ENTITY_LINE = re.compile(r"T\S*\t(\S+) (\d{1,12} \d{1,12}(?:;\d{1,12} \d{1,12})*)\t(.*)", re.DOTALL)
OTHER_LINE = re.compile(r"(?:[A-Za-z]\d|[#*])\S*\t.*", re.DOTALL)  # relations, events, attributes, notes
EXPECTED = "expected T1, a tab, type start end, a tab, the text: 'T1\\tPER 0 3\\t江泽民'"


class Document(NamedTuple):
    """The sentences of one pair of files, and how many entities tags cannot express."""

    sentences: list[Sentence]
    skipped: int


def fits(source: Source) -> bool:
    """Whether this is an .ann file, a .txt file with an .ann beside it, or a folder."""
    path = Path(source.path)
    try:
        return (
            source.suffix == ".ann" or path.is_dir() or (source.suffix == ".txt" and _partner(path, ".ann").is_file())
        )
    except (OSError, ValueError):  # a name too long, a NUL: the reader of files says so
        return False


def read(source: Source) -> Corpus:
    """Read one pair of files or all of a folder. A sentence is a line of the text.

    Lines that an entity crosses are one sentence. An entity in several parts cannot be expressed by tags.
    """
    path = Path(source.path)
    annotations, notes = ([_partner(path, ".ann")], []) if not path.is_dir() else _pairs_in(path)
    documents = [_document(annotation, in_folder=path.is_dir()) for annotation in annotations]
    sentences = [sentence for document in documents for sentence in document.sentences]
    return corpus_of_offsets(source.path, sentences, sum(document.skipped for document in documents), notes)


def _partner(path: Path, suffix: str) -> Path:
    return path if path.suffix.lower() == suffix else path.with_suffix(suffix)


def _pairs_in(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the .ann files below a folder, sorted, and a note where texts have none."""
    annotations = sorted(folder.rglob("*.ann"))
    if not annotations:
        hub = f"; for a saved data set write hub:{folder}" if (folder / "dataset_dict.json").exists() else ""
        raise UserError(f"{folder}: cannot be read: a folder without .ann files of brat; give a tagged file{hub}")
    alone = [text for text in folder.rglob("*.txt") if not text.with_suffix(".ann").exists()]
    return annotations, [f"{folder}: {len(alone):,} .txt files without an .ann file left out"] if alone else []


def _document(annotation: Path, in_folder: bool) -> Document:
    text_path = _partner(annotation, ".txt")
    if not text_path.is_file():
        raise UserError(f"{annotation}: the text it annotates is missing; expected {text_path.name} beside it")
    text = read_text(str(text_path))
    entities, in_parts = [], 0
    # Not splitlines(): a text may hold form feeds and other characters at which that would cut an entity in two.
    for line_number, line in enumerate(read_text(str(annotation)).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip() and (line[0] == "T" or not OTHER_LINE.fullmatch(line)):
            spans = _spans(f"{annotation}:{line_number}", line, text)
            entities += spans if len(spans) == 1 else []
            in_parts += len(spans) > 1
    tags, overlapping = paint(len(text), entities)
    sentences = list(_sentences(text, tags, file=str(text_path) if in_folder else ""))
    return Document(sentences, in_parts + overlapping)


def _spans(place: str, line: str, text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, type) of each part of an entity. `place` is file:line."""
    match = ENTITY_LINE.fullmatch(line)
    if not match:
        raise UserError(f"{place}: {quote(line)} is no entity; {EXPECTED}")
    type_, offsets, expected = match.groups()
    spans = [(int(start), int(end), type_) for start, end in (part.split() for part in offsets.split(";"))]
    for start, end, _ in spans:
        if not 0 <= start < end <= len(text):
            raise UserError(f"{place}: {quote(line)} is empty or outside its text of {len(text)} characters")
    actual = " ".join(text[start:end] for start, end, _ in spans)
    if "".join(actual.split()) != "".join(expected.split()):  # brat writes line ends as spaces
        raise UserError(f"{place}: the text there is {quote(actual)}, not {quote(expected)}; offsets count characters")
    return spans


def _sentences(text: str, tags: list[str], file: str) -> Iterator[Sentence]:
    """The lines of a text that are not blank, each with its tags; those that an entity crosses are one."""
    start, line, line_of_start = 0, 1, 1
    for end in range(len(text) + 1):
        if end < len(text) and text[end] != "\n":
            continue
        line += 1
        if end < len(text) and tags[end] != "O":  # the line end is inside an entity
            continue
        stop = end - 1 if end > start and text[end - 1] == "\r" and tags[end - 1] == "O" else end
        if text[start:stop].strip():
            yield Sentence(list(text[start:stop]), tags[start:stop], line_of_start, file)
        start, line_of_start = end + 1, line
