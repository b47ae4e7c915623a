"""The ONNX file of a model folder: which one there is, whether it is whole in itself and as good as the model."""

import json
import mmap
from pathlib import Path

from ner.errors import UserError

FILES = ("model_int8.onnx", "model.onnx")  # the 8-bit one is four times smaller and over twice as fast
EXPORT_AGAIN = "write it again with `python model.py export RUN`"


def exported_file(folder: Path) -> Path | None:
    """Return the ONNX file of a model folder, rather the 8-bit one; None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def is_worse(folder: Path) -> bool:
    """Return whether the export was found to score worse than the model, as onnx.json beside it says."""
    file = folder / "onnx.json"
    if not file.is_file():
        return False
    try:
        return json.loads(file.read_text("utf-8")).get("default") is False
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: not readable as a JSON object; the file is damaged") from None


def check_self_contained(file: Path) -> None:
    """Raise UserError where the file has tensors in other files: it could name any file of the disk."""
    try:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # the key under which a tensor names another file
                return
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{file}: cannot be read as an ONNX file ({error}); {EXPORT_AGAIN}") from None
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's exceptions, whichever of its implementations is installed
        raise UserError(f"{file}: not readable as an ONNX file ({type(error).__name__}); {EXPORT_AGAIN}") from None
    if any(uses_external_data(tensor) for tensor in _get_all_tensors(model)):
        raise UserError(f"{file}: has weights in other files, as no export of this suite has; {EXPORT_AGAIN}")
