"""A JSON file of a saved model or a run → its object, or one line that says what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

from ner.errors import UserError


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError where it cannot be read or is something else."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file.absolute()}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.absolute()}: not readable as JSON ({error}); the file is damaged") from None
    if not isinstance(value, dict):
        raise UserError(f"{file.absolute()}: expected a JSON object; the file is damaged")
    return value
