"""The one way to write a file or folder whole or not at all."""

import os
from pathlib import Path

WRITING = ".writing"  # what a file is called until it is whole


def write(path: Path, text: str) -> None:
    """Writes a text file under another name, to disk, and renames it. Raises OSError that names the file."""
    temporary = path.with_name(path.name + WRITING)
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Brings a file or folder to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
