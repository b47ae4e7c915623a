"""The one way to write a file or folder whole or not at all.

What is written lies beside its target under a temporary name, is brought to disk, and is then renamed: who reads sees
the old one or the new one. A killed process leaves its temporary name behind; `remove_leftovers` knows those names and
touches no other.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

WRITING = ".writing-"  # within the name of what is not whole yet
REPLACED = ".replaced-"  # within the name of a folder that is being replaced
LONGEST = 50  # characters of the target's name in a temporary one, whose length file systems limit to 255 bytes


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Replace a text file (UTF-8, line ends as in `text`) in one step.

    errors: what becomes of characters that UTF-8 does not have, as for open(). Raises OSError that names `path`.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", errors=errors, newline="") as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block ends, and goes away when the block raises.

    A link is followed. What cannot be replaced, a device or a pipe, is yielded itself. Raises OSError naming `path`.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    if target.exists() and not target.is_file() and not target.is_dir():
        yield path
        return
    temporary = temporary_path(target)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def replace_folder(fresh: str | os.PathLike, target: str | os.PathLike) -> None:
    """Bring the folder `fresh` to disk and make it `target`, which lies on the same disk and may exist.

    A folder cannot be replaced in one step: between two renames the old one lies beside, from where `restore_folder`
    takes it. Raises OSError that names `target`; the old folder is then in its place.
    """
    fresh, target = Path(fresh), Path(target)
    old = temporary_path(target, REPLACED)
    try:
        for path in [*fresh.rglob("*"), fresh]:
            if not path.is_symlink():
                sync(path)
        if target.exists():
            os.rename(target, old)
            try:
                os.rename(fresh, target)
            except OSError:
                os.rename(old, target)
                raise
        else:
            os.rename(fresh, target)
        sync(target.parent)
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: str | os.PathLike) -> None:
    """Put back the newest old folder where a process was killed between the two renames of `replace_folder`."""
    target = Path(target)
    old = _newest_replaced(target)
    if old and not target.exists():
        os.rename(old, target)


def whole_folder(target: str | os.PathLike) -> Path:
    """Return `target`, or its old folder where a process was killed between the two renames. Moves nothing."""
    target = Path(target)
    with contextlib.suppress(OSError, ValueError):  # a name too long, a NUL: whoever opens it will say so
        if not target.exists():
            return _newest_replaced(target) or target
    return target


def remove_leftovers(target: str | os.PathLike) -> None:
    """Delete what killed processes left of writing `target`; whoever calls it knows that no other process writes there.

    Nothing but the temporary names of this module is deleted, and what cannot be deleted stays.
    """
    target = Path(target)
    if not target.exists():
        restore_folder(target)
    for path in _temporaries(target, WRITING) + _temporaries(target, REPLACED):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def temporary_path(target: str | os.PathLike, kind: str = WRITING) -> Path:
    """Return a path beside `target` that nobody else has, recognisable as one of its temporary names."""
    target = Path(target)
    return target.with_name(_prefix(target, kind) + secrets.token_hex(6))


def sync(path: str | os.PathLike) -> None:
    """Bring a file or folder to disk. Raises OSError.

    Windows opens no folder and syncs no file that is open for reading alone; some network disks sync no folder.
    """
    path = Path(path)
    if path.is_dir():
        with contextlib.suppress(PermissionError):
            _sync(path, os.O_RDONLY, (errno.EINVAL, errno.EBADF))
        return
    try:
        _sync(path, os.O_RDWR)
    except PermissionError:  # a file without write permission
        _sync(path, os.O_RDONLY, (errno.EBADF,))


def _sync(path: Path, mode: int, ignored: tuple[int, ...] = ()) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in ignored:
            raise
    finally:
        os.close(descriptor)


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name[:LONGEST]}{kind}"


def _temporaries(target: Path, kind: str) -> list[Path]:
    prefix = _prefix(target, kind)
    with contextlib.suppress(OSError):
        return [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    return []


def _newest_replaced(target: Path) -> Path | None:
    return max(_temporaries(target, REPLACED), key=lambda path: path.stat().st_mtime_ns, default=None)
