"""The LiteRT (TFLite) copy for Android, from the same plain graph as the ONNX copies.

litert-torch converts a torch module, so the graph is read back into one. The result takes one
image, uint8 1×side×side×3 `pixels`, and gives `logits` 1×8 and `bottleneck` 1×512.
"""

from __future__ import annotations

from pathlib import Path

from ai_edge_quantizer.qtyping import (
    ComputePrecision,
    OpQuantizationConfig,
    TensorDataType,
    TensorQuantizationConfig,
    TFLOperationName,
)
from ai_edge_quantizer.quantizer import AlgorithmName, Quantizer
import onnx
import torch

from data_jobs.training.edge.graph_module import GraphModule


def convert(graph: onnx.ModelProto, side: int, path: Path) -> None:
    """Write the float32 LiteRT file."""
    import litert_torch  # noqa: PLC0415 - with transformers and JAX it takes half a minute to import

    pixels = torch.zeros((1, side, side, 3), dtype=torch.uint8)
    module = GraphModule(graph.graph).eval()
    litert_torch.convert(module, sample_kwargs={"pixels": pixels}).export(str(path))


def halve_weights(float32: Path, path: Path) -> None:
    """Write a copy of the float32 file whose weights are half floats, widened as LiteRT loads them."""
    quantizer = Quantizer(str(float32))
    quantizer.update_quantization_recipe(
        ".*", TFLOperationName.ALL_SUPPORTED, _HALF_WEIGHTS, AlgorithmName.FLOAT_CASTING
    )
    path.write_bytes(bytes(quantizer.quantize().quantized_model))


_HALF_WEIGHTS = OpQuantizationConfig(
    weight_tensor_config=TensorQuantizationConfig(num_bits=16, dtype=TensorDataType.FLOAT),
    compute_precision=ComputePrecision.FLOAT,
    explicit_dequantize=True,
)
