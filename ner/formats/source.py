"""What a format is recognised from: the path, its text in any usual encoding, the first line."""

import io
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ner.errors import UserError

HELP = "see data/README.md"
EXPECTED = f"expected a character and its tag on each line, such as '北 B-LOC' ({HELP})"
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16


@dataclass
class Source:
    """A file, a folder or the name of a hub data set; its text is read once, when a format asks for it."""

    path: str
    split: str = "train"  # the part of a hub data set to read: train, dev or test

    @property
    def suffix(self) -> str:
        """The suffix of the file in lower case, such as ".json"."""
        return Path(self.path).suffix.lower()

    @cached_property
    def text(self) -> str:
        """The whole text. Raises UserError where the file cannot be read or is no text."""
        return read_text(self.path)

    @cached_property
    def head(self) -> str:
        """The first line that is not blank, stripped. Raises UserError where there is none."""
        head = next((line for line in self.lines() if line.strip()), None)
        if head is None:
            pipe = " (a pipe can be read only once)" if is_pipe(self.path) else ""
            raise UserError(f"{self.path}:1: the file is empty{pipe}; {EXPECTED}")
        return head.strip()

    def lines(self) -> Iterator[str]:
        """The lines of the text with their ends, without holding all of them."""
        return io.StringIO(self.text, newline="\n")


def is_pipe(path: str) -> bool:
    """Whether this is a pipe, such as the shell's `<(command)`: what it holds can be read only once."""
    try:
        return stat.S_ISFIFO(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def read_text(path: str) -> str:
    """Return the text of a file in UTF-8 (with or without BOM), GB18030, or UTF-16 with BOM; line ends may be CR.

    Raises UserError, with the line of the first bad byte where there is one.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        gone = "; a pipe of another command cannot be read again" if path.startswith(("/dev/fd/", "/proc/")) else ""
        raise UserError(f"{path}: no such file{gone}; give the path of a tagged file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    text = _decode(path, data)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL character: this is not a text file; save it as UTF-8 text")
    return text if "\n" in text else text.replace("\r", "\n")


def _decode(path: str, data: bytes) -> str:
    is_utf16 = data.startswith(BYTE_ORDER_MARKS)
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        first_error = error
    if is_utf16 or _is_damaged_utf8(data):
        raise _bad_byte(path, data, first_error)
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError as error:
        raise _bad_byte(path, data, max(first_error, error, key=lambda e: e.start)) from None


def _is_damaged_utf8(data: bytes) -> bool:
    """Whether most of what is not ASCII is UTF-8: GB18030 might take such a file too, and turn it into nonsense."""
    text = data.decode("utf-8", "replace")
    return text.count("\ufffd") * 2 < sum(not char.isascii() for char in text)


def _bad_byte(path: str, data: bytes, error: UnicodeDecodeError) -> UserError:
    line = data.count(b"\n", 0, error.start) + 1
    return UserError(
        f"{path}:{line}: byte 0x{data[error.start]:02x} fits neither UTF-8 nor GB18030; save the file as UTF-8"
    )


def quote(text: str) -> str:
    """Return a text in quotes for an error, without its line end, shortened to 40 characters."""
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= 40 else text[:40] + "…")
