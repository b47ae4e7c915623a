"""A PyTorch model → an ONNX file in float32 or 8 bits, whose logits are compared with PyTorch's.

Which sentences the graph is traced, calibrated and compared on, and where the file goes, is decided in export.py.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ner.errors import UserError, first_line
from ner.quantize import Arrays, quantize

OPSET = 17
INPUTS = ["input_ids", "attention_mask"]
FILES = {"int8": "model_int8.onnx", "fp32": "model.onnx"}
LARGEST_ERROR = 1e-3  # by which a logit of the float32 file may differ from PyTorch's


@dataclass
class OnnxFile:
    """What is known of a written ONNX file; what onnx.json holds of it.

    same_tags: share of the tokens (or of dev's characters) with PyTorch's tag. f1, torch_f1: strict micro-F1 on dev,
    None where there were no dev sentences. default: the file tags by default, as it is no worse than PyTorch.
    """

    file: str
    bytes: int
    largest_logit_error: float
    same_tags: float
    sentences: int = 0
    f1: float | None = None
    torch_f1: float | None = None
    default: bool = True

    def line(self) -> str:
        """Return one line that says how the file compares with PyTorch."""
        text = f"{self.file}, {self.bytes / 1e6:.1f} MB, {self.same_tags:.2%} of the tags as PyTorch's"
        if self.f1 is None or self.torch_f1 is None:
            return f"{text}; not compared on dev sentences, as there are none"
        return f"{text}; strict F1 on {self.sentences} sentences of dev {self.f1:.4f}, PyTorch's {self.torch_f1:.4f}"


class _Logits(torch.nn.Module):
    """A model that takes the two inputs by position and gives the logits alone, as the tracer wants it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def write_fp32(model: Any, labels: list[str], samples: list[Arrays], folder: Path) -> OnnxFile:
    """Trace the model to folder/model.onnx and compare the logits.

    samples: inputs, int64 [batch, length] each. Raises UserError where the encoder cannot be traced, or a logit differs
    from PyTorch's by more than LARGEST_ERROR.
    """
    kind, file = model.config.model_type, folder / FILES["fp32"]
    try:
        _trace(model, samples[0], file)
        _add_labels(file, labels)
        written = _compare_logits(file, model, samples)
    except Exception as error:  # the tracer and ONNX Runtime raise what they like
        raise UserError(f"this encoder ({kind}) cannot be exported to ONNX: {first_line(error)}") from None
    if not written.largest_logit_error <= LARGEST_ERROR:  # so that NaN is refused too
        raise UserError(
            f"this encoder ({kind}) cannot be exported to ONNX: the file's logits differ from PyTorch's by up to "
            f"{written.largest_logit_error:g}"
        )
    return written


def write_int8(model: Any, labels: list[str], samples: list[Arrays], folder: Path) -> OnnxFile:
    """Write folder/model_int8.onnx from the model.onnx that lies there, calibrated on `samples`; compare the logits."""
    file = folder / FILES["int8"]
    quantize(folder / FILES["fp32"], file, samples)
    _add_labels(file, labels)
    return _compare_logits(file, model, samples)


def _trace(model: torch.nn.Module, example: Arrays, file: Path) -> None:
    """Write the graph of the model, with any batch size and length, to `file`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about branches; comparing the logits is what counts
        torch.onnx.export(
            _Logits(model).eval(),
            tuple(torch.from_numpy(example[name]) for name in INPUTS),
            str(file),
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_axes=dict.fromkeys([*INPUTS, "logits"], {0: "batch", 1: "length"}),
            opset_version=OPSET,
            dynamo=False,
        )


def _add_labels(file: Path, labels: list[str]) -> None:
    """Put the labels into the file's own metadata, so that a file of another model is noticed."""
    import onnx

    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {"labels": json.dumps(labels, ensure_ascii=False)})
    onnx.save(model, str(file))


def _compare_logits(file: Path, model: torch.nn.Module, samples: list[Arrays]) -> OnnxFile:
    """Compute the samples with the file and with PyTorch; return the largest difference and the share of equal tags."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest, same, tokens = 0.0, 0, 0
    for inputs in samples:
        mask = inputs["attention_mask"].astype(bool)
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()[mask]
        logits = session.run(["logits"], inputs)[0][mask]
        largest = max(largest, float(np.abs(logits - expected).max()))
        same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(expected)
    return OnnxFile(file.name, file.stat().st_size, largest, same / tokens)
