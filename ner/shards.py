"""Files of texts, text or JSON Lines or Parquet, here or on s3:// and the like → shards that keep file and line."""

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ner.errors import UserError
from ner.texts import encoding_of

# A shard is what a killed worker loses, and what the others wait for at the end: seconds of one thread where there is
# little to do, a minute or so where there is much.
SMALLEST, LARGEST = 512 << 10, 4 << 20  # bytes of text
SHARDS = 1000  # about as many are cut between the two
READ_BYTES, ROWS_AT_ONCE = 256 << 10, 256
WILDCARD = re.compile(r"(\*\*/|\*|\?|\[[^]]+\])")
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
    try:
        sizes = _matching(pattern)
        if not sizes:
            raise UserError(f"{pattern}: no such file; give a file or a pattern in quotes, such as 'texts/*.jsonl'")
        shard_bytes = min(max(sum(sizes.values()) // SHARDS, SMALLEST), LARGEST)
        shards: list[Shard] = []
        for path in sizes:
            kind = KINDS.get(Path(path).suffix.lower(), "text")
            cuts = _row_groups(path) if kind == "parquet" else _cuts(path, shard_bytes)
            for start, end, first_line, encoding in cuts:
                output = f"part-{len(shards):06d}.{form}"
                shards.append(Shard(path, kind, encoding, start, end, first_line, output))
    except OSError as error:
        raise UserError(f"{pattern}: cannot be read ({str(error).splitlines()[0]})") from None
    return shards


def _matching(pattern: str) -> dict[str, int]:
    """Return the files that a path or pattern names, sorted, with their bytes; of s3:// and the like too."""
    if "://" not in pattern:
        pattern = os.path.expanduser(pattern)
        paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        return {os.path.abspath(path): os.path.getsize(path) for path in sorted(paths) if os.path.isfile(path)}
    from pyarrow import fs

    fixed = WILDCARD.split(pattern, maxsplit=1)[0]
    folder = fixed.rpartition("/")[0]
    system, base = file_system(folder)
    matches = _as_regex(pattern.removeprefix(folder)).fullmatch
    entries = system.get_file_info(fs.FileSelector(base, recursive=fixed != pattern, allow_not_found=True))
    names = {entry.path.removeprefix(base): entry.size for entry in entries if entry.is_file}
    return {folder + name: names[name] for name in sorted(names) if matches(name)}


def _as_regex(pattern: str) -> re.Pattern[str]:
    """Return what a pattern of paths matches, as glob has it: `*` stays within a folder, `**/` crosses any number."""
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}

    def regex(part: str) -> str:
        is_set = WILDCARD.fullmatch(part) and part.startswith("[")
        return part.replace("[!", "[^") if is_set else wild.get(part, re.escape(part))

    return re.compile("".join(map(regex, WILDCARD.split(pattern))))


def file_system(path: str) -> tuple[Any, str]:
    """Return the file system of a path or URL and the name of the file there. Raises UserError for an unknown one."""
    import pyarrow
    from pyarrow import fs

    if "://" not in path:
        return fs.LocalFileSystem(), path
    try:
        return fs.FileSystem.from_uri(path)
    except (pyarrow.ArrowException, ValueError, ImportError) as error:
        raise UserError(f"{path}: no file system that pyarrow knows ({str(error).splitlines()[0]})") from None


def _cuts(path: str, shard_bytes: int) -> Iterator[tuple[int, int, int, str]]:
    """Yield (start, end, line of the first text, encoding) of the parts of a file of lines, by reading it once."""
    encoding, start, line, position, lines = "", 0, 1, 0, 0
    system, name = file_system(path)
    with system.open_input_stream(name, compression=None) as stream:
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
            if position - start >= shard_bytes:
                yield start, position, line, encoding or "utf-8"
                start, line = position, lines + 1
    end = position + len(rest)
    if rest and not encoding:
        encoding = encoding_of(rest.removeprefix(b"\xef\xbb\xbf"), path) if not rest.isascii() else ""
    if end > start:
        yield start, end, line, encoding or "utf-8"


def _row_groups(path: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield the same of the row groups of a Parquet file. Raises UserError where it has no column of texts."""
    import pyarrow
    from pyarrow import parquet

    system, name = file_system(path)
    try:
        file = parquet.ParquetFile(name, filesystem=system)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: has the columns {', '.join(file.schema_arrow.names)}; expected one named text")
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: the column text holds {kind}; expected strings")
    line = 1
    for group in range(file.num_row_groups):
        yield group, group + 1, line, ""
        line += file.metadata.row_group(group).num_rows


def texts_of(shard: Shard, damaged: list[int] | None = None) -> Iterator[str]:
    """Yield the texts of a shard. Raises UserError with file and line.

    damaged: gets the lines whose bytes do not fit the encoding of the file; what does not fit becomes U+FFFD.
    """
    from pyarrow import parquet

    system, name = file_system(shard.file)
    if shard.kind == "parquet":
        # Without these two settings pyarrow reads the columns of a row group whole.
        file = parquet.ParquetFile(name, filesystem=system, buffer_size=READ_BYTES, pre_buffer=False)
        groups = range(shard.start, shard.end)
        for batch in file.iter_batches(ROWS_AT_ONCE, groups, columns=["text"], use_threads=False):
            yield from (value if value is not None else "" for value in batch.column(0).to_pylist())
        return
    with system.open_input_file(name) as stream:
        stream.seek(shard.start)
        for number, raw in enumerate(_lines(stream, shard.end - shard.start), shard.first_line):
            where = f"{shard.file}:{number}"
            if b"\0" in raw:
                raise UserError(f"{where}: a NUL character: this is not a text file; give UTF-8, one text a line")
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                text = raw.decode(shard.encoding)
            except UnicodeDecodeError:
                text = raw.decode(shard.encoding, "replace")
                if damaged is not None:
                    damaged.append(number)
            yield _text_of(text, where) if shard.kind == "jsonl" else text


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
