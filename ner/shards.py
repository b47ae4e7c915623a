"""Files of texts, text or JSON Lines or Parquet, here or on s3:// and the like → shards that keep file and line."""

import fnmatch
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ner.errors import UserError
from ner.texts import encoding_of

SHARD_BYTES = 4 << 20  # of text: some minutes of one thread, which is what a killed worker loses
READ_BYTES = 1 << 20
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # other suffixes: text


@dataclass(frozen=True)
class Shard:
    """A part of a file. start, end: bytes, or row groups of a Parquet file. first_line: from 1."""

    file: str
    kind: str
    encoding: str
    start: int
    end: int
    first_line: int
    output: str


def plan(pattern: str, form: str) -> list[Shard]:
    """Return the shards of all files that match, in order. Raises UserError where none does, or one is no text."""
    from pyarrow import fs

    paths = _matching(pattern)
    if not paths:
        raise UserError(f"{pattern}: no such file; give a file or a pattern in quotes, such as 'texts/*.jsonl'")
    shards: list[Shard] = []
    for path in paths:
        kind = KINDS.get(Path(path).suffix.lower(), "text")
        system, name = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
        for start, end, first_line, encoding in (_row_groups if kind == "parquet" else _cuts)(system, name, path):
            output = f"part-{len(shards):06d}.{form}"
            shards.append(Shard(path, kind, encoding, start, end, first_line, output))
    return shards


def _matching(pattern: str) -> list[str]:
    """Return the files that a path or pattern names, sorted; of s3:// and the like too."""
    from pyarrow import fs

    if "://" not in pattern:
        found = glob.glob(os.path.expanduser(pattern), recursive=True)
        return sorted(os.path.abspath(path) for path in found if os.path.isfile(path))
    scheme, _, rest = pattern.partition("://")
    fixed = rest[: min((rest.index(mark) for mark in "*?[" if mark in rest), default=len(rest))]
    folder = fixed.rpartition("/")[0]
    system, base = fs.FileSystem.from_uri(f"{scheme}://{folder}")
    entries = system.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
    names = sorted(entry.path for entry in entries if entry.is_file and fnmatch.fnmatch(entry.path, rest))
    return [f"{scheme}://{name}" for name in names]


def _cuts(system: Any, name: str, path: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield (start, end, line of the first text, encoding) of the parts of a file of lines, by reading it once."""
    encoding, start, line, position, lines = "", 0, 1, 0, 0
    with system.open_input_stream(name) as stream:
        rest = b""
        while block := stream.read(READ_BYTES):
            block = rest + block
            cut = block.rfind(b"\n") + 1
            rest = block[cut:]
            whole = block[:cut]
            if not encoding and not whole.isascii():
                first = next(row for row in whole.split(b"\n") if not row.isascii())
                encoding = encoding_of(first.removeprefix(b"\xef\xbb\xbf"), path)
            position, lines = position + cut, lines + whole.count(b"\n")
            if position - start >= SHARD_BYTES:
                yield start, position, line, encoding or "utf-8"
                start, line = position, lines + 1
    end = position + len(rest)
    if rest and not encoding:
        encoding = encoding_of(rest.removeprefix(b"\xef\xbb\xbf"), path) if not rest.isascii() else ""
    if end > start:
        yield start, end, line, encoding or "utf-8"


def _row_groups(system: Any, name: str, path: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield the same of the row groups of a Parquet file. Raises UserError where it has no column `text`."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(name, filesystem=system)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: has the columns {', '.join(file.schema_arrow.names)}; expected one named text")
    line = 1
    for group in range(file.num_row_groups):
        yield group, group + 1, line, ""
        line += file.metadata.row_group(group).num_rows


def texts_of(shard: Shard) -> Iterator[str]:
    """Yield the texts of a shard. Raises UserError with file and line."""
    from pyarrow import fs, parquet

    path = shard.file
    system, name = fs.FileSystem.from_uri(path) if "://" in path else (fs.LocalFileSystem(), path)
    if shard.kind == "parquet":
        file = parquet.ParquetFile(name, filesystem=system)
        for batch in file.iter_batches(1024, row_groups=range(shard.start, shard.end), columns=["text"]):
            yield from (value if value is not None else "" for value in batch.column(0).to_pylist())
        return
    with system.open_input_file(name) as stream:
        stream.seek(shard.start)
        for number, raw in enumerate(_lines(stream, shard.end - shard.start), shard.first_line):
            if b"\0" in raw:
                raise UserError(f"{path}:{number}: a NUL character: this is not a text file")
            text = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode(shard.encoding, "replace")
            yield _text_of(text, f"{path}:{number}") if shard.kind == "jsonl" else text


def _lines(stream: Any, size: int) -> Iterator[bytes]:
    """Yield the next lines of a stream, without their ends, `size` bytes in all."""
    rest = b""
    while size > 0 and (block := stream.read(min(READ_BYTES, size))):
        size -= len(block)
        *whole, rest = (rest + block).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in whole)
    if rest:
        yield rest.removesuffix(b"\r")


def _text_of(line: str, where: str) -> str:
    """Return the text of a line of JSON; an empty line has none."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where}: expected a JSON object with a text, such as {{"text": "…"}}')
    return text
