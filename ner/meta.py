"""What a saved model's weights do not say: labels, unit, decoding. Read and written without torch.

It stands in ner.json, and for a model with a CRF the transition scores stand beside it in crf.safetensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ner import files
from ner.errors import UserError
from ner.formats.schemes import is_tag
from ner.json_file import read_object
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
    "head": str,
    "format_version": int,
    "encoder_sha256": dict,
    "epoch": int,  # after which the model was saved, from 1; 0 where that is not known
}
FORMAT_VERSION = 1  # of ner.json; raise it when an older program would misread what is written
# Keys that older models lack, and what those models have.
DEFAULTS: dict[str, Any] = {"head": "softmax", "format_version": 0, "encoder_sha256": {}, "epoch": 0}
CHOICES = {"unit": ("character", "word"), "decode": ("argmax", "viterbi"), "head": ("softmax", "crf")}
CRF_FILE = "crf.safetensors"


def model_folder(folder: str | Path) -> Path:
    """Return the model folder of a run folder, and of a model folder itself."""
    folder = files.whole_folder(folder)
    inner = files.whole_folder(folder / "model")
    if not (folder / "ner.json").exists() and (inner / "ner.json").exists():
        return inner
    return folder


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what ner.json of a saved model holds, checked. Raises UserError.

    With head "crf" there is one more key, "transitions": float32 [labels, labels], the CRF's scores.
    """
    file = folder / "ner.json"
    if not file.is_file():
        raise UserError(f"{folder}: there is no ner.json, so it is no saved model; expected the model folder of a run")
    meta = DEFAULTS | read_object(file)
    _check_format(file, meta)
    _check_labels(file, meta["labels"])
    if meta["tuning"] not in TUNINGS:
        raise UserError(f"{file}: tuning is {meta['tuning']!r}; expected one of {', '.join(TUNINGS)}")
    for key, values in CHOICES.items():
        if meta[key] not in values:
            raise UserError(f"{file}: {key} is {meta[key]!r}; expected {' or '.join(values)}, the file is damaged")
    if meta["head"] == "crf":
        meta["transitions"] = _read_transitions(folder, len(meta["labels"]))
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ner.json, and crf.safetensors where there are transitions, into the folder of a new model."""
    meta = dict(meta)
    transitions = meta.pop("transitions", None)
    (folder / "ner.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", "utf-8")
    if transitions is not None:
        content = safetensors.numpy.save({"transitions": np.ascontiguousarray(transitions, np.float32)})
        (folder / CRF_FILE).write_bytes(content)  # save_file would make it readable by its owner alone


def _check_format(file: Path, meta: dict[str, Any]) -> None:
    """Raise UserError where ner.json is of a newer program, lacks a key or has a value of another type."""
    if type(meta["format_version"]) is int and meta["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version {meta['format_version']} is newer than this program knows ({FORMAT_VERSION}); "
            "update the program"
        )
    for key, kind in KEYS.items():
        if type(meta.get(key)) is not kind:
            raise UserError(f"{file}: {key} is {meta.get(key)!r}; expected {kind.__name__}, the file is damaged")


def _check_labels(file: Path, labels: list[Any]) -> None:
    """Raise UserError unless the labels are different IOB2 tags."""
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise UserError(f"{file}: labels must be different texts; the file is damaged")
    wrong = next((label for label in labels if not is_tag(label) or label[0] not in "OBI"), None)
    if wrong is not None:
        raise UserError(f"{file}: label {wrong!r} is no IOB2 tag; expected O, B-TYPE and I-TYPE, the file is damaged")


def _read_transitions(folder: Path, labels: int) -> np.ndarray:
    """Return the transition scores, float32 [labels, labels]. Raises UserError where they are missing or damaged."""
    file = folder / CRF_FILE
    if not file.is_file():
        raise UserError(f"{folder}: {CRF_FILE} is missing, so the model is not whole; train again or restore it")
    try:
        transitions = safetensors.numpy.load_file(file)["transitions"]
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: cannot be read, the file is damaged ({error})") from None
    if transitions.shape != (labels, labels) or not np.isfinite(transitions).all():
        shape = " x ".join(map(str, transitions.shape))
        raise UserError(
            f"{file}: expected finite scores of {labels} x {labels} labels, as ner.json has them, found {shape}; "
            "the two are not of one model"
        )
    return transitions.astype(np.float32)
