"""The one way to find a file or folder that a user named, and to write its name down without ambiguity.

What a user names is looked for in the working folder first, then in the project's, and is absolute from then on. What
is written down (config.yaml of a run, ner.json) is absolute, or relative to the project's folder where it lies in it,
so that it means the same from any working folder and survives a project that is moved.
"""

import os
from pathlib import Path

from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the project's folder


def resolve_path(path: str | os.PathLike, from_project: bool = False) -> Path | None:
    """Return the absolute path of an existing file or folder, or None where there is none; `~` is expanded.

    from_project: `path` was written down by `portable_path`, so the working folder is not looked in.
    """
    folders = [ROOT] if from_project else [Path(), ROOT]
    try:
        expanded = os.path.expanduser(path)
        for folder in folders:
            candidate = folder / expanded
            if candidate.is_file() or candidate.is_dir():
                return candidate.resolve()
            if candidate.exists():  # a pipe, such as that of <(command), has no path but this one
                return Path(os.path.abspath(candidate))
    except (OSError, ValueError):  # a name too long, a NUL, a folder that may not be entered
        pass
    return None


def portable_path(path: str) -> str:
    """Return how a path is written down: relative to the project's folder where it lies in it, else as it is."""
    if not os.path.isabs(path):
        return path
    try:
        return Path(path).relative_to(ROOT).as_posix()
    except ValueError:
        return path


def expand_home(path: str) -> str:
    """Return the path with `~` replaced by the home folder. Raises UserError where there is no such home."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        home = path.replace("\\", "/").split("/")[0]
        raise UserError(f"{path}: there is no home folder {home}; write the whole path, or ./{path} for that very name")
    return expanded
