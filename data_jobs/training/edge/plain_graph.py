"""The served ONNX graph without its shape arithmetic: what a converter can read.

PyTorch exports TensorFlow's "same" padding as some forty nodes a strided convolution that
compute the pads from the input's shape. The served input has one side, so they are constants:
they move into the convolution's own `pads`. The bottleneck's batch normalisation moves into the
matrix before it, so that what is quantised is the matrix that is multiplied with. Answers stay
the same to rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import onnx
from onnx import numpy_helper
import onnxruntime as ort

from serve_app.domain.errors import ModelContractError


def plain_graph(path: Path, side: int) -> onnx.ModelProto:
    """Read a served graph and fold its paddings for one input side; the batch stays open.

    Raises ModelContractError for a padding that no convolution can take over.
    """
    model = onnx.load(path)
    graph = model.graph
    pads = [node for node in graph.node if node.op_type == "Pad"]
    amounts = _evaluate(model, [node.input[1] for node in pads], side)
    for node, amount in zip(pads, amounts, strict=True):
        _fold_into_convolution(graph, node, amount)
        graph.node.remove(node)
    _inline_constants(graph)
    _fold_normalisation(graph)
    _drop_unused(graph)
    _fix_side(graph, side)
    onnx.checker.check_model(model)
    return model


def _evaluate(model: onnx.ModelProto, names: list[str], side: int) -> list[NDArray[np.int64]]:
    """What these tensors hold for one grey image of `side`."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.full((1, side, side, 3), 127, np.uint8)
    found: list[NDArray[np.int64]] = session.run(names, {session.get_inputs()[0].name: pixels})
    return found


def _fold_into_convolution(graph: onnx.GraphProto, pad: onnx.NodeProto, amount: NDArray[np.int64]) -> None:
    before, after = amount[:4].tolist(), amount[4:].tolist()
    users = [node for node in graph.node if pad.output[0] in node.input]
    if before[:2] != [0, 0] or after[:2] != [0, 0] or any(node.op_type != "Conv" for node in users):
        raise ModelContractError(f"{pad.name} pads more than the height and width of a convolution.")
    for node in users:
        own = next((a for a in node.attribute if a.name == "pads"), None)
        if own is not None:
            if any(own.ints):
                raise ModelContractError(f"{node.name} is padded twice.")
            node.attribute.remove(own)
        node.attribute.append(onnx.helper.make_attribute("pads", before[2:] + after[2:]))
        node.input[0] = pad.input[0]


def _inline_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initializers, which every converter reads."""
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = next(a.t for a in node.attribute if a.name == "value")
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def _fold_normalisation(graph: onnx.GraphProto) -> None:
    """MatMul and the BatchNormalization of its output become one Gemm: x @ (W * s) + (b - mean * s)."""
    weights = initializers(graph)
    made_by = {node.output[0]: node for node in graph.node}
    for normalise in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        multiply = made_by[normalise.input[0]]
        if multiply.op_type != "MatMul":
            raise ModelContractError(f"{normalise.name} normalises {multiply.name}, which is no MatMul.")
        scale, bias, mean, variance = (weights[name].astype(np.float64) for name in normalise.input[1:5])
        epsilon = next((a.f for a in normalise.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        matrix = (weights[multiply.input[1]].astype(np.float64) * factor).astype(np.float32)
        offset = (bias - mean * factor).astype(np.float32)
        names = [f"{multiply.name}.weight", f"{multiply.name}.bias"]
        graph.initializer.append(numpy_helper.from_array(matrix, names[0]))
        graph.initializer.append(numpy_helper.from_array(offset, names[1]))
        position = list(graph.node).index(multiply)
        gemm = onnx.helper.make_node(
            "Gemm", [multiply.input[0], *names], [normalise.output[0]], multiply.name
        )
        graph.node.remove(multiply)
        graph.node.remove(normalise)
        graph.node.insert(position, gemm)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove every node and initializer that no output depends on."""
    needed = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if needed & set(node.output):
            needed.update(node.input)
        else:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in needed]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]


def _fix_side(graph: onnx.GraphProto, side: int) -> None:
    dims = graph.input[0].type.tensor_type.shape.dim
    if [dim.dim_value for dim in dims][1:] != [side, side, 3]:
        raise ModelContractError(f"{graph.input[0].name} is not N×{side}×{side}×3.")


def initializers(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    """The weights and constants of a graph, by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
