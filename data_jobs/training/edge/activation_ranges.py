"""How far every tensor of the network reaches on a calibration set: what static quantisation needs.

One pass keeps each image's extremes and outer quantiles of every tensor; how they become one
range is a setting that costs nothing to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
import onnx
import onnxruntime as ort

from data_jobs.training.scan import Pixels

RangeMethod = Literal["extremes", "mean of extremes", "99.99 %", "99.9 %"]
#: Shares of a tensor's values that are left out below and above, in the order of the columns.
CUTS = (0.0, 0.0001, 0.001)
LARGE = 100_000


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """Per tensor and image, lower and upper quantile at each of CUTS: T×N×3×2, float32."""

    names: tuple[str, ...]
    values: NDArray[np.float32]

    def choose(self, method: RangeMethod) -> dict[str, tuple[float, float]]:
        """One range a tensor, zero always inside.

        "extremes": the least and greatest of all images. "mean of extremes": their mean over
        the images, which one odd image cannot stretch. "99.99 %" and "99.9 %": the widest of
        the images' ranges that hold this share of the values.
        """
        column = {"99.99 %": 1, "99.9 %": 2}.get(method, 0)
        low, high = self.values[:, :, column, 0], self.values[:, :, column, 1]
        if method == "mean of extremes":
            low, high = low.mean(1), high.mean(1)
        else:
            low, high = low.min(1), high.max(1)
        return {
            name: (min(0.0, float(lowest)), max(0.0, float(highest)))
            for name, lowest, highest in zip(self.names, low, high, strict=True)
        }


def measure_ranges(model: onnx.ModelProto, pixels: Pixels, path: Path) -> ActivationRanges:
    """Run `pixels` (uint8 N×side×side×3) through a plain graph; kept in the .npz at `path`."""
    if not path.exists():
        names = [name for node in model.graph.node for name in node.output]
        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        known = {output.name for output in model.graph.output}
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        # Fused nodes would not give the tensors between them.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0].name
        values = np.stack([_quantiles(session.run(names, {source: image[None]})) for image in pixels], axis=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, names=np.array(names), values=values)
        partial.rename(path)
    with np.load(path, allow_pickle=False) as found:
        return ActivationRanges(tuple(found["names"].tolist()), found["values"])


def _quantiles(tensors: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """T×3×2: what is left when each of CUTS is taken off both ends; of large tensors, every eighth value is sorted."""
    found = np.empty((len(tensors), len(CUTS), 2), np.float32)
    for row, tensor in zip(found, tensors, strict=True):
        flat = tensor.ravel()
        ordered = np.sort(flat[::8] if flat.size > LARGE else flat)
        last = ordered.size - 1
        row[:] = [(ordered[round(cut * last)], ordered[last - round(cut * last)]) for cut in CUTS]
        row[0] = flat.min(), flat.max()
    return found
