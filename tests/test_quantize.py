"""8-bit ONNX files: outliers cost little, shared weights stay shared, a text's logits are its own."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from ner.quantize import quantize

HIDDEN, INNER = 64, 256


class FeedForward(torch.nn.Module):
    """Two feed-forward layers on embeddings whose channels, as a transformer's, differ by more than ten times."""

    def __init__(self, shared: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = torch.nn.Embedding(50, HIDDEN)
        self.embeddings.weight.data[:, 3] *= 40
        self.first = torch.nn.ModuleList([torch.nn.Linear(HIDDEN, INNER) for _ in range(2)])
        self.second = torch.nn.ModuleList([torch.nn.Linear(INNER, HIDDEN) for _ in range(2)])
        for layer in self.second:
            layer.weight.data[:, :2] *= 0.1
        for layer in self.first:
            layer.weight.data[:2] *= 60
        if shared:
            self.first[1], self.second[1] = self.first[0], self.second[0]
        self.classifier = torch.nn.Linear(HIDDEN, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids) * attention_mask[..., None]
        for first, second in zip(self.first, self.second, strict=True):
            hidden = second(torch.nn.functional.gelu(first(hidden)))
        return self.classifier(hidden)


def exported(model: torch.nn.Module, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Write the model's graph, for any batch, and return its file with the inputs that it was traced on."""
    ids = torch.randint(0, 50, (8, 20), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((8, 20), np.int64)}
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        str(folder / "model.onnx"),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_axes=dict.fromkeys([*inputs, "logits"], {0: "batch"}),
        opset_version=17,
        dynamo=False,
    )
    return folder / "model.onnx", inputs


def session(file: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """Load a file; write the graph that ONNX Runtime makes of it to `optimized`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shared", [False, True])
def test_outliers_cost_less_than_by_plain_dynamic_quantization(tmp_path, shared):
    model = FeedForward(shared).eval()
    source, inputs = exported(model, tmp_path)
    quantize(source, tmp_path / "ours.onnx", [inputs])
    # reduce_range as in ours: without it plain's products overflow on processors without VNNI, which is another matter
    quantize_dynamic(source, tmp_path / "plain.onnx", weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    expected = model(*map(torch.from_numpy, inputs.values())).detach().numpy()
    errors = {
        name: np.abs(session(tmp_path / f"{name}.onnx").run(["logits"], inputs)[0] - expected).mean()
        for name in ("ours", "plain")
    }
    assert errors["ours"] < errors["plain"] * 0.7, errors


@pytest.mark.parametrize(("shared", "in_8_bits"), [(False, 4), (True, 2)])  # shared: those of the first reader
def test_products_of_weights_are_computed_in_8_bits(tmp_path, shared, in_8_bits):
    source, inputs = exported(FeedForward(shared).eval(), tmp_path)
    quantize(source, tmp_path / "int8.onnx", [inputs])
    session(tmp_path / "int8.onnx", tmp_path / "optimized.onnx")
    operators = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert operators.count("MatMulIntegerToFloat") == in_8_bits
    assert operators.count("MatMul") == 5 - in_8_bits  # the classifier and what is left in float32
    assert "ReduceMax" in operators  # tokens that enter a second matrix are scaled


def test_logits_of_a_text_do_not_depend_on_the_texts_beside_it(tmp_path):
    source, inputs = exported(FeedForward().eval(), tmp_path)
    quantize(source, tmp_path / "int8.onnx", [inputs])
    model = session(tmp_path / "int8.onnx")
    together = model.run(["logits"], inputs)[0]
    alone = [model.run(["logits"], {name: rows[i : i + 1] for name, rows in inputs.items()})[0][0] for i in range(8)]
    np.testing.assert_array_equal(together, np.stack(alone))
