"""Folders of what is made once for many tests, removed when the process of the tests ends."""

import atexit
import shutil
import tempfile
from pathlib import Path


def until_exit(prefix: str) -> Path:
    """Return a new folder, for what a cached function leaves there; pytest's own belong to a fixture."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
