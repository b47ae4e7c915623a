"""8-bit ONNX files: outliers that ruin plain dynamic quantization are borne, and shared weights stay shared."""

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
            layer.weight.data[:2] *= 20
        if shared:
            self.first[1], self.second[1] = self.first[0], self.second[0]
        self.classifier = torch.nn.Linear(HIDDEN, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids) * attention_mask[..., None]
        for first, second in zip(self.first, self.second, strict=True):
            hidden = second(torch.nn.functional.gelu(first(hidden)))
        return self.classifier(hidden)


@pytest.mark.parametrize("shared", [False, True])
def test_outliers_cost_less_than_by_plain_dynamic_quantization(tmp_path, shared):
    model = FeedForward(shared).eval()
    ids = torch.randint(0, 50, (8, 20), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids.numpy(), "attention_mask": np.ones((8, 20), np.int64)}
    example = (ids, torch.ones_like(ids))
    names = list(inputs)
    torch.onnx.export(
        model,
        example,
        str(tmp_path / "model.onnx"),
        input_names=names,
        output_names=["logits"],
        opset_version=17,
        dynamo=False,
    )
    quantize(tmp_path / "model.onnx", tmp_path / "ours.onnx", [inputs])
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "plain.onnx", weight_type=QuantType.QInt8, per_channel=True)
    expected = model(*example).detach().numpy()
    errors = {}
    for name in ("ours", "plain"):
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        errors[name] = np.abs(session.run(["logits"], inputs)[0] - expected).mean()
    assert errors["ours"] < errors["plain"] * 0.7, errors
    operators = [node.op_type for node in onnx.load(str(tmp_path / "ours.onnx")).graph.node]
    assert "ReduceMax" in operators and "MatMulInteger" in operators
