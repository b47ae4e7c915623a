"""ner.json, which says of a saved model what its weights do not: labels, unit, decoding. Read without torch."""

import json
from pathlib import Path
from typing import Any

from ner.errors import UserError
from ner.tunings import TUNINGS

KEYS = {
    "labels": list,
    "unit": str,
    "special_tokens": bool,
    "max_length": int,
    "decode": str,
    "tuning": str,
    "pretrained": str,
    "virtual_tokens": int,
}


def model_folder(folder: str | Path) -> Path:
    """Return the model folder of a run folder, and of a model folder itself."""
    folder = Path(folder)
    if not (folder / "ner.json").exists() and (folder / "model" / "ner.json").exists():
        return folder / "model"
    return folder


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what ner.json of a saved model holds, checked. Raises UserError."""
    file = folder / "ner.json"
    if not file.is_file():
        raise UserError(f"{folder}: there is no ner.json, so it is no saved model; expected the model folder of a run")
    try:
        meta = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({error}); the file is damaged") from None
    if not isinstance(meta, dict):
        raise UserError(f"{file}: expected a JSON object; the file is damaged")
    for key, kind in KEYS.items():
        if type(meta.get(key)) is not kind:
            raise UserError(f"{file}: {key} is {meta.get(key)!r}; expected {kind.__name__}, the file is damaged")
    labels = meta["labels"]
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise UserError(f"{file}: labels must be different texts; the file is damaged")
    if meta["tuning"] not in TUNINGS:
        raise UserError(f"{file}: tuning is {meta['tuning']!r}; expected one of {', '.join(TUNINGS)}")
    if meta["unit"] not in ("character", "word") or meta["decode"] not in ("argmax", "viterbi"):
        raise UserError(f"{file}: unit or decode has a value that does not exist; the file is damaged")
    return meta
