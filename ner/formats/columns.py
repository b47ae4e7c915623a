"""Lines of a token and its tag: plain columns, CoNLL, CSV or TSV with a header.

A file is read whole: its lines repeat so much (`的 O`) that each distinct line is parsed once and then looked up, which
reads two million characters in about a second.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from ner.corpus import Corpus, Sentence
from ner.errors import UserError
from ner.formats.assembly import corpus_of_tags
from ner.formats.schemes import is_tag, no_tag
from ner.formats.source import EXPECTED, Source, quote

TOKEN_NAMES = {
    "token",
    "tokens",
    "word",
    "words",
    "char",
    "chars",
    "character",
    "text",
    "form",
    "字",
    "字符",
    "词",
    "词语",
}
TAG_NAMES = {"tag", "tags", "label", "labels", "ner", "ner_tag", "ner_tags", "bio", "标签", "标注"}
SENTENCE_NAMES = {
    "sentence",
    "sentence_id",
    "sentence id",
    "sentence #",
    "sent_id",
    "sent",
    "sid",
    "句子",
    "句号",
    "句子编号",
}
DELIMITERS = ",\t;"
CSV_LINE = re.compile(r"[^,;]+[,;][^,;].*")
MEASURED_LINES = 1000  # the number of columns is the one that most of the first lines have


def read(source: Source) -> Corpus:
    """Read lines of two or more columns, of which the first is the token and the last its tag.

    A blank line ends a sentence. CoNLL's document marks and comments are passed over.
    """
    return corpus_of_tags(source.path, _sentences(source), unit_per_line=True)


def _sentences(source: Source) -> Iterator[Sentence]:
    columns = _column_count(source)
    parsed: dict[str, tuple[str, str] | None] = {}  # line → token and tag; None where it ends a sentence
    sentence = Sentence([], [], 0)
    for line_number, line in enumerate(chain(source.lines(), [""]), 1):
        try:
            pair = parsed[line]
        except KeyError:
            pair = parsed[line] = _parse(f"{source.path}:{line_number}", line, columns)
        if pair:
            if not sentence.units:
                sentence.line = line_number
            sentence.units.append(pair[0])
            sentence.tags.append(pair[1])
        elif sentence.units:
            yield sentence
            sentence = Sentence([], [], 0)


def _column_count(source: Source) -> int:
    """The number of columns of most of the first lines, 2 where most have no number in common."""
    lines = islice((line for line in source.lines() if line.strip()), MEASURED_LINES)
    counts = Counter(len(_fields(line)) for line in lines)
    columns = max(counts, key=lambda n: (counts[n], n == 2))  # of two that are as frequent, two columns
    if columns == 1 or counts[columns] * 2 <= counts.total():  # no table at all: errors then speak of two columns
        return 2
    return columns


def _fields(line: str) -> list[str]:
    """The columns of a line. Only space and tab part them; a line such as '  O' holds a space character."""
    fields = [field for field in line.rstrip("\r\n").replace("\t", " ").split(" ") if field]
    if len(fields) == 1 and line[0] in " \t" and line[1] in " \t":
        return [line[0], fields[0]]
    return fields


def _parse(place: str, line: str, columns: int) -> tuple[str, str] | None:
    """Return the token and the tag of a line, or None for one that ends a sentence. `place` is file:line."""
    fields = _fields(line)
    if not line.strip() or fields[0] == "-DOCSTART-":
        return None
    if columns > 2 and fields[0] == "#" and not is_tag(fields[-1]):  # a comment
        return None
    if len(fields) != columns:
        is_csv = len(fields) == 1 and CSV_LINE.fullmatch(fields[0])
        expected = "of CSV the first line must name the columns, such as 'token,tag'" if is_csv else EXPECTED
        raise UserError(f"{place}: {_counted(fields)} where the file has {columns}: {quote(line)}; {expected}")
    if not is_tag(fields[-1]):
        raise no_tag(place, fields[-1])
    return fields[0], fields[-1]


def _counted(fields: list[str]) -> str:
    return f"{len(fields)} field{'s' if len(fields) != 1 else ''}"


class Header(NamedTuple):
    """The first line of a CSV or TSV file: where the columns stand that are read."""

    delimiter: str
    columns: int
    token: int
    tag: int
    sentence: int | None  # a column whose value changes with the sentence


def has_header(source: Source) -> bool:
    """Whether the first line names a column of tokens and one of tags."""
    return _header(source.head) is not None


def read_with_header(source: Source) -> Corpus:
    """Read CSV or TSV with a header: a token and its tag a line.

    A sentence ends at a blank line, or where the column of sentences, if there is one, has another value.
    """
    header = _header(source.head)
    assert header is not None, "has_header said so"
    return corpus_of_tags(source.path, _rows_as_sentences(source, header), unit_per_line=True)


def _header(line: str) -> Header | None:
    for delimiter in DELIMITERS:
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if any(map(is_tag, names)):  # a line of CoNLL columns whose token happens to be a word such as "label"
            continue
        names = [name.lower() for name in names]
        tokens, tags, sentences = (
            [index for index, name in enumerate(names) if name in known]
            for known in (TOKEN_NAMES, TAG_NAMES, SENTENCE_NAMES)
        )
        if tokens and tags:
            return Header(delimiter, len(names), tokens[0], tags[-1], sentences[0] if sentences else None)
    return None


def _rows_as_sentences(source: Source, header: Header) -> Iterator[Sentence]:
    lines = ((number, line) for number, line in enumerate(source.lines(), 1))
    next(line for _, line in lines if line.strip())  # the header
    sentence, sentence_id = Sentence([], [], 0), ""
    for number, line in lines:
        row = _row(f"{source.path}:{number}", line, header)
        new_id = row[header.sentence] if row and header.sentence is not None else ""
        if sentence.units and (not row or (new_id and new_id != sentence_id)):
            yield sentence
            sentence = Sentence([], [], 0)
        if row:
            sentence_id = new_id or sentence_id  # some files name a sentence in its first row only
            sentence.line = sentence.line or number
            sentence.units.append(row[header.token])
            sentence.tags.append(row[header.tag])
    if sentence.units:
        yield sentence


def _row(place: str, line: str, header: Header) -> list[str] | None:
    """Return the fields of a line, checked, or None for a blank one. `place` is file:line."""
    line = line.rstrip("\r\n")
    if not line.strip(f" {header.delimiter}"):
        return None
    row = _split(place, line, header.delimiter)
    if len(row) != header.columns:
        raise UserError(f"{place}: {_counted(row)} where the header has {header.columns}: {quote(line)}")
    if not row[header.token]:
        raise UserError(f"{place}: no token in {quote(line)}; expected one in column {header.token + 1}")
    row[header.tag] = row[header.tag].strip()
    if not is_tag(row[header.tag]):
        raise no_tag(place, row[header.tag])
    return row


def _split(place: str, line: str, delimiter: str) -> list[str]:
    if delimiter == "\t":  # rarely quoted: a quote may stand there as a token
        fields = line.split("\t")
        return [f[1:-1].replace('""', '"') if len(f) > 1 and f[0] == f[-1] == '"' else f for f in fields]
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{place}: {quote(line)} is no line of CSV ({error}); a token of a quote is written as four quotes"
        ) from None
