"""A plain ONNX graph as a torch module, for converters that start from torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_jobs.training.edge.plain_graph import initializers
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
