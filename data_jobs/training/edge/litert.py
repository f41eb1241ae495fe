"""The LiteRT (TFLite) copy for Android, from the same plain graph as the ONNX copies, and its forward pass.

litert-torch converts a torch module, so the graph is read back into one. The result takes one
image, uint8 1×side×side×3 `pixels`, and gives `logits` 1×8 and `bottleneck` 1×512.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_jobs.training.edge.onnx_copies import initializers
from data_jobs.training.scan import Pixels, Run
from model_store.session import Outputs
from serve_app.domain.errors import ModelContractError


class GraphModule(nn.Module):
    """A plain ONNX graph as a torch module."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__()
        self._nodes = [(node, _attributes(node)) for node in graph.node]
        self._outputs = [output.name for output in graph.output]
        self._buffer_names = {}
        weights = initializers(graph)
        for node in graph.node:
            if node.op_type == "Clip" and [float(weights[name]) for name in node.input[1:]] != [0.0, 6.0]:
                raise ModelContractError(f"{node.name} is not ReLU6.")
        for index, (name, value) in enumerate(weights.items()):
            self._buffer_names[name] = f"weight{index}"
            self.register_buffer(f"weight{index}", torch.from_numpy(np.array(value)))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels uint8 N×side×side×3 to the outputs by name."""
        values = {name: getattr(self, buffer) for name, buffer in self._buffer_names.items()}
        values["pixels"] = pixels
        for node, attributes in self._nodes:
            operator = _OPERATORS.get(node.op_type)
            if operator is None:
                raise ModelContractError(f"{node.name}: no torch twin for {node.op_type}.")
            values[node.output[0]] = operator(attributes, *(values[name] for name in node.input))
        return {name: values[name] for name in self._outputs}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _convolve(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    top, left, bottom, right = attributes["pads"]
    if (top, left) == (bottom, right):
        padding = (top, left)
    else:  # torch pads both ends alike
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    return functional.conv2d(x, weight, bias, attributes["strides"], padding, groups=attributes["group"])


def _multiply(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight if attributes.get("transB") else weight.T.contiguous(), bias)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Cast": lambda _, x: x.to(torch.float32),
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    "Sub": lambda _, x, y: x - y,
    "Div": lambda _, x, y: x / y,
    "Conv": _convolve,
    "Clip": lambda _, x, *_bounds: functional.relu6(x),  # the bounds are checked once
    "Add": lambda _, x, y: x + y,
    "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda _, x: x.flatten(1),
    "Gemm": _multiply,
}


def convert(graph: onnx.ModelProto, side: int, path: Path) -> None:
    """Write the float32 LiteRT file."""
    import litert_torch  # noqa: PLC0415 - with transformers and JAX it takes half a minute to import

    pixels = torch.zeros((1, side, side, 3), dtype=torch.uint8)
    module = GraphModule(graph.graph).eval()
    litert_torch.convert(module, sample_kwargs={"pixels": pixels}).export(str(path))


def halve_weights(float32: Path, path: Path) -> None:
    """Write a copy of the float32 file whose weights are half floats, widened as LiteRT loads them."""
    from ai_edge_quantizer import qtyping  # noqa: PLC0415 - only in the environment that converts
    from ai_edge_quantizer.quantizer import AlgorithmName, Quantizer  # noqa: PLC0415

    weights = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    halved = qtyping.OpQuantizationConfig(
        weight_tensor_config=weights,
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    quantizer = Quantizer(str(float32))
    quantizer.update_quantization_recipe(
        ".*", qtyping.TFLOperationName.ALL_SUPPORTED, halved, AlgorithmName.FLOAT_CASTING
    )
    path.write_bytes(bytes(quantizer.quantize().quantized_model))


def open_litert(path: Path, threads: int) -> Run:
    """Pixels uint8 N×side×side×3 to logits N×8 and bottleneck N×512, by XNNPACK's kernels."""
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - with the `edge` extra

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads)
    run_one = interpreter.get_signature_runner()

    def run(pixels: Pixels) -> Outputs:
        answers = [run_one(pixels=image[None]) for image in pixels]
        return Outputs(
            *(np.concatenate([answer[name] for answer in answers]) for name in ("logits", "bottleneck"))
        )

    return run
