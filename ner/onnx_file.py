"""The ONNX file of a model folder: which one there is, whether it is whole in itself and as good as the model."""

import json
import mmap
from pathlib import Path

from ner.errors import UserError

FILES = ("model_int8.onnx", "model.onnx")  # the 8-bit one is four times smaller and over twice as fast
EXPORT_AGAIN = "write it again with `python model.py export RUN`"


def exported_file(folder: Path) -> Path | None:
    """Return the ONNX file of a model folder, None where there is none: the one written last, else the 8-bit one."""
    names = [name for name in FILES if (folder / name).is_file()]
    written_last = _record(folder).get("file")
    return folder / (written_last if written_last in names else names[0]) if names else None


def is_worse(folder: Path) -> bool:
    """Return whether the file was found to score worse than the model when it was written."""
    return _record(folder).get("default") is False


def _record(folder: Path) -> dict:
    """Return what the export noted in onnx.json, nothing where there is none. Raises UserError."""
    file = folder / "onnx.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text("utf-8"))
        if isinstance(record, dict):
            return record
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{file}: not readable as a JSON object; the file is damaged; {EXPORT_AGAIN}")


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
