"""A float32 ONNX file → one that multiplies in 8 bits: a quarter of the size, and faster on a CPU.

ONNX Runtime's static quantization gives all numbers that enter a matrix product one scale, by the range that they have
on sample sentences. (Dynamic quantization measures the range of each batch, so what is found in a text depends on the
texts beside it.) Transformers have a few channels, and a few tokens, whose numbers are ten times the others' (Dettmers
et al. 2022), and what is left for the others is coarse. Two things are done about it:

- SmoothQuant (Xiao et al. 2023): large channels are divided, and rows of the matrix multiplied, by the same factor.
  The product stays what it was.
- What enters the second matrix of a feed-forward layer has its outliers in single tokens, which no factor a channel
  evens out. There each token is divided by its own largest value, and its product multiplied by it.

What the file scores beside PyTorch on dev stands in each run's log and in onnx.json.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHING = 0.7  # 0: no factor comes from the activations; 1: all of it (SmoothQuant's alpha)
SMALLEST_WIDTH = 64  # narrower matrices, such as the classifier, cost nothing and stay in float32
SMALLEST_SCALE = 0.2  # GELU, SiLU and ReLU give nothing below -0.3: no token of theirs is scaled to below -1.5
TINY = 1e-5

Arrays = dict[str, np.ndarray]


class SampleReader:
    """Gives the samples one after another, then None, as ONNX Runtime wants it for calibration."""

    def __init__(self, samples: list[Arrays]):
        self.samples = iter(samples)

    def get_next(self) -> Arrays | None:
        return next(self.samples, None)


def quantize(source: Path, target: Path, samples: list[Arrays]) -> None:
    """Write `source` with its matrix products in 8 bits to `target`.

    samples: inputs {name: int64 [batch, length]} on which the ranges of products' inputs are measured.
    """
    import onnx

    model = onnx.load(str(source))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = _products(model.graph, weights)
    ranges = _channel_ranges(model, list(products), samples)
    in_8_bits = set[str]()
    for index, (name, nodes) in enumerate(products.items()):
        matrix = weights[nodes[0].input[1]]
        if matrix.dims[1] < SMALLEST_WIDTH:
            continue
        in_8_bits.update(node.name for node in nodes)
        if _narrows(matrix):
            for node in nodes:
                _scale_tokens(model.graph, node)
        elif not _shares_weights(model.graph, nodes):
            _smooth(model.graph, weights, nodes, ranges[name], f"smooth_{index}")
    in_float32 = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in in_8_bits]
    _quantize_static(model, target, samples, in_float32)


def _quantize_static(model: Any, target: Path, samples: list[Arrays], in_float32: list[str]) -> None:
    """Write `model` with its embeddings and products in 8 bits, but for the nodes named in `in_float32`."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # advice on convolutions, for a file that has none
    try:
        quantize_static(
            model,
            target,
            SampleReader(samples),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,  # processors without VNNI add pairs of products in 16 bits, which 8-bit weights overflow
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=in_float32,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gather"]},
        )
    finally:
        logging.disable(before)


def _products(graph: Any, weights: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {input: the matrix products that it enters}, of those products that have a matrix of weights."""
    products: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and len(weights[node.input[1]].dims) == 2:
            products.setdefault(node.input[0], []).append(node)
    return products


def _channel_ranges(model: Any, names: list[str], samples: list[Arrays]) -> Arrays:
    """Return {name: the largest absolute value of each channel, float32 [channels]} over the samples."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for name in names:
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    ranges: Arrays = {}
    for inputs in samples:
        for name, values in zip(names, session.run(names, inputs), strict=True):
            largest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
            ranges[name] = np.maximum(ranges.get(name, 0), largest)
    return ranges


def _narrows(matrix: Any) -> bool:
    """Return whether a matrix has more inputs than outputs, as the second one of a feed-forward layer has."""
    rows, columns = matrix.dims
    return rows > columns


def _shares_weights(graph: Any, nodes: list[Any]) -> bool:
    """Return whether other nodes read the same weights, as where layers share them (ALBERT)."""
    mine = {node.input[1] for node in nodes}
    readers = sum(name in mine for node in graph.node for name in node.input)
    return readers > len(nodes)


def _smooth(graph: Any, weights: dict[str, Any], nodes: list[Any], largest: np.ndarray, name: str) -> None:
    """Divide the products' common input by a factor a channel, and multiply the rows of their matrices by it."""
    from onnx import helper, numpy_helper

    matrices = [numpy_helper.to_array(weights[node.input[1]]) for node in nodes]
    largest_weight = np.max([np.abs(matrix).max(axis=1) for matrix in matrices], axis=0)
    factor = np.maximum(largest, TINY) ** SMOOTHING / np.maximum(largest_weight, TINY) ** (1 - SMOOTHING)
    factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
    for node, matrix in zip(nodes, matrices, strict=True):
        weights[node.input[1]].CopyFrom(numpy_helper.from_array(matrix * factor[:, None], node.input[1]))
    graph.initializer.append(numpy_helper.from_array(1 / factor, f"{name}_factor"))
    first = min(index for index, node in enumerate(graph.node) if node in nodes)
    product = helper.make_node("Mul", [nodes[0].input[0], f"{name}_factor"], [f"{name}_output"], name)
    graph.node.insert(first, product)
    for node in nodes:
        node.input[0] = f"{name}_output"


def _scale_tokens(graph: Any, node: Any) -> None:
    """Divide each token that enters a matrix product by its largest value, and multiply its output by it."""
    from onnx import helper, numpy_helper

    name = f"{node.name or node.output[0]}_token"
    graph.initializer.append(numpy_helper.from_array(np.array(SMALLEST_SCALE, np.float32), f"{name}_smallest"))
    before = [
        helper.make_node("ReduceMax", [node.input[0]], [f"{name}_largest"], f"{name}_max", axes=[-1]),
        helper.make_node("Max", [f"{name}_largest", f"{name}_smallest"], [f"{name}_scale"], f"{name}_floor"),
        helper.make_node("Div", [node.input[0], f"{name}_scale"], [f"{name}_scaled"], f"{name}_divide"),
    ]
    after = helper.make_node("Mul", [f"{name}_product", f"{name}_scale"], [node.output[0]], f"{name}_multiply")
    node.input[0], node.output[0] = f"{name}_scaled", f"{name}_product"
    place = list(graph.node).index(node)
    graph.node.insert(place + 1, after)
    for offset, added in enumerate(before):
        graph.node.insert(place + offset, added)
