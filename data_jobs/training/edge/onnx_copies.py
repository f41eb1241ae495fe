"""ONNX copies of a plain graph: float16 weights, and INT8 by static quantisation.

Both keep the served contract: uint8 `pixels` in, float32 `logits` and `bottleneck` out, any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import tempfile
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

from data_jobs.training.edge.activation_ranges import ActivationRanges, RangeMethod

#: Smaller tensors (biases, bounds of a clip) stay float32: together they are a hundredth of the file.
LEAST_HALVED = 1024


@dataclass(frozen=True, slots=True)
class Int8Settings:
    """One way to quantise: which range an activation gets, and which nodes stay float32.

    Weights are int8, symmetric, one scale an output channel; activations int8 with a zero point.
    `float_nodes` are parts of node names. With 7 bits a weight lies in -64 to 63: x86 processors
    without VNNI add two products of 8 bits in 16 and saturate (ONNX Runtime's documentation of
    `quantize_static`, `reduce_range`); with 7 they cannot, and every processor answers alike.
    """

    name: str
    ranges: RangeMethod
    weight_bits: Literal[7, 8]
    float_nodes: tuple[str, ...] = ()


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


def write_int8(model: onnx.ModelProto, ranges: ActivationRanges, settings: Int8Settings, path: Path) -> None:
    """Quantise statically into the QDQ format, which ONNX Runtime, TensorRT and NNAPI all read."""
    nodes = [node.name for node in model.graph.node]
    unmatched = [part for part in settings.float_nodes if not any(part in name for name in nodes)]
    if unmatched:
        raise ValueError(f"No node is named {', '.join(unmatched)}.")
    chosen = {
        name: tuple(np.float32(v) for v in pair) for name, pair in ranges.choose(settings.ranges).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "ranges.json"
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, chosen), cache)
        quantize_static(
            model,
            path,
            None,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=settings.weight_bits == 7,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            nodes_to_exclude=[n for n in nodes if any(part in n for part in settings.float_nodes)],
            calibration_cache_path=cache,
        )
