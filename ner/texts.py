"""A file of texts, one a line → texts, in chunks of bounded size, so that memory does not grow with the file.

Sorting a chunk's texts by length fills batches well; that is why a chunk is larger than a batch.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from ner.errors import UserError

log = logging.getLogger("ner.texts")
CHUNK_TEXTS, CHUNK_CHARACTERS = 2048, 65536  # a chunk ends with the text that reaches either


def read_texts(stream: BinaryIO, name: str) -> Iterator[str]:
    """Yield the texts of a binary stream, one a line (only LF and CRLF end one), in UTF-8 or GB18030, with BOM or not.

    The first line beyond ASCII decides on the encoding; later bytes that do not fit it become U+FFFD, with a warning.
    Raises UserError with file and line for what is no text.
    """
    encoding = ""  # until a line beyond ASCII has settled it
    damaged: list[int] = []
    for number, raw in enumerate(_lines(stream, name), 1):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            raise UserError(f"{name}:{number}: a NUL character: this is not a text file; give UTF-8, one text a line")
        if not encoding and not raw.isascii():
            encoding = encoding_of(raw, f"{name}:{number}")
        try:
            yield raw.decode(encoding or "utf-8")
        except UnicodeDecodeError:
            damaged.append(number)
            yield raw.decode(encoding, errors="replace")
    if damaged:
        log.warning(
            "%s:%d: not %s; what does not fit became \ufffd in %d lines",
            name,
            damaged[0],
            encoding,
            len(damaged),
        )


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        yield from stream
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


def encoding_of(raw: bytes, where: str) -> str:
    """Return "utf-8" or "gb18030" for the first line beyond ASCII. Raises UserError where it is neither."""
    text = raw.decode("utf-8", errors="replace")
    # GB18030 accepts much that is damaged UTF-8, so it is tried only for what hardly fits UTF-8 at all.
    if text.count("\ufffd") * 10 <= sum(character > "\x7f" for character in text):
        return "utf-8"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        raise UserError(f"{where}: neither UTF-8 nor GB18030; save it as UTF-8 text") from None
    return "gb18030"


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of bounded size, in order."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) >= CHUNK_TEXTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
