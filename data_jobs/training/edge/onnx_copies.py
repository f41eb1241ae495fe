"""ONNX copies of a served model: float16 weights, and INT8 by static quantisation, from its plain graph.

Both keep the served contract: uint8 `pixels` in, float32 `logits` and `bottleneck` out, any batch. The plain graph is
the served one without its shape arithmetic. PyTorch exports TensorFlow's "same" padding as some forty nodes a strided
convolution that compute the pads from the input's shape. The served input has one side, so they are constants: they
move into the convolution's own `pads`. The bottleneck's batch normalisation moves into the matrix before it, so that
what is quantised is the matrix that is multiplied with. Answers stay the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray
import onnx
from onnx import TensorProto, numpy_helper
import onnxruntime as ort
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from data_jobs.training.scan import Pixels
from serve_app.domain.errors import ModelContractError


def plain_graph(path: Path, side: int) -> onnx.ModelProto:
    """Read a served graph and fold its paddings for one input side; the batch stays open.

    Raises ModelContractError for a padding that no convolution can take over.
    """
    model = onnx.load(path)
    graph = model.graph
    pads = [node for node in graph.node if node.op_type == "Pad"]
    grey = np.full((1, side, side, 3), 127, np.uint8)
    amounts = _evaluate(model, [node.input[1] for node in pads], [grey])
    for node, amount in zip(pads, next(amounts), strict=True):
        _fold_into_convolution(graph, node, amount)
        graph.node.remove(node)
    _inline_constants(graph)
    _fold_normalisation(graph)
    _drop_unused(graph)
    _fix_side(graph, side)
    onnx.checker.check_model(model)
    return model


def _evaluate(
    model: onnx.ModelProto, names: list[str], batches: Iterable[Pixels]
) -> Iterator[list[NDArray[Any]]]:
    """What these tensors hold for each batch. Not optimised: fused nodes would not give what is between them."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {output.name for output in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name
    return (session.run(names, {source: pixels}) for pixels in batches)


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


Ranges = dict[str, tuple[float, float]]
#: Share of a tensor's values that its range leaves out below and above: one odd value must not stretch it.
CUT = 0.0001
LARGE = 100_000


def measure_ranges(model: onnx.ModelProto, pixels: Pixels) -> Ranges:
    """How far every tensor of a plain graph reaches on `pixels` (uint8 N×side×side×3), zero always inside.

    The widest of the images' ranges that hold 99.99 % of the values; of large tensors every eighth value is looked at.
    """
    names = [name for node in model.graph.node for name in node.output]
    low, high = np.zeros(len(names)), np.zeros(len(names))
    for tensors in _evaluate(model, names, (image[None] for image in pixels)):
        for index, tensor in enumerate(tensors):
            ordered = np.sort(tensor.ravel()[:: 8 if tensor.size > LARGE else 1])
            cut = round(CUT * (ordered.size - 1))
            low[index], high[index] = min(low[index], ordered[cut]), max(high[index], ordered[-1 - cut])
    return dict(zip(names, zip(low.tolist(), high.tolist(), strict=True), strict=True))


#: Smaller tensors (biases, bounds of a clip) stay float32: together they are a hundredth of the file.
LEAST_HALVED = 1024


def write_float16(model: onnx.ModelProto, path: Path) -> None:
    """Store the weights as half floats, each with a Cast to float32 that ONNX Runtime folds when it loads.

    Arithmetic stays float32, so it is as fast as the original on every processor, also on
    those without half-float instructions, and differs only by the rounding of the weights.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    casts = []
    for tensor in copy.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LEAST_HALVED:
            continue
        name = tensor.name
        halves = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(halves).all():
            raise ValueError(f"{name} does not fit into half floats.")
        tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}.float16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.float16"], [name], f"{name}.cast", to=1))
    for cast in reversed(casts):
        copy.graph.node.insert(0, cast)
    onnx.checker.check_model(copy)
    onnx.save(copy, path)


def write_int8(model: onnx.ModelProto, ranges: Ranges, float_nodes: Sequence[str], path: Path) -> None:
    """Quantise statically into the QDQ format, which ONNX Runtime, TensorRT and NNAPI all read.

    Weights are int8, symmetric, one scale an output channel; activations int8 with a zero point. `float_nodes` are
    parts of the names of nodes that stay float32. A weight has 7 bits, -64 to 63: x86 processors without VNNI add two
    products of 8 bits in 16 and saturate (ONNX Runtime's documentation of `quantize_static`, `reduce_range`); with 7
    they cannot, and every processor answers alike.
    """
    nodes = [node.name for node in model.graph.node]
    unmatched = [part for part in float_nodes if not any(part in name for name in nodes)]
    if unmatched:
        raise ValueError(f"No node is named {', '.join(unmatched)}.")
    chosen = {name: tuple(np.float32(v) for v in pair) for name, pair in ranges.items()}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "ranges.json"
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, chosen), cache)
        quantize_static(
            model,
            path,
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            nodes_to_exclude=[n for n in nodes if any(part in n for part in float_nodes)],
            calibration_cache_path=cache,
        )
