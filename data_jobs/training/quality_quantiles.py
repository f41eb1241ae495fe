"""Quantiles of image quality over the archive: what the risk policy's quality thresholds are set from.

`python -m data_jobs.training.quality_quantiles --side 176 --cache-dir C --output quality.json`
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_jobs.training.dataset import build_cache, fold_indices, isic_folder, read_rows
from deployments.preprocess.quality import measure_quality
from deployments.preprocess.resize import InputGeometry

QUANTILES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.5, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 1.0)


def quality_quantiles(pixels: NDArray[np.uint8], indices: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Measure -> {quantile: value} over the images at `indices` of N×H×W×3 pixels."""
    measured = [asdict(measure_quality(pixels[i])) for i in indices]
    return {name: quantiles([m[name] for m in measured]) for name in measured[0]}


def blurred_sharpness(pixels: NDArray[np.uint8], indices: NDArray[np.int64]) -> dict[str, float]:
    """Quantiles of sharpness once the images are of no use: blurred by a Gaussian of 1/64 of the side."""
    blur = ImageFilter.GaussianBlur(pixels.shape[1] / 64)
    images = (Image.fromarray(np.ascontiguousarray(pixels[i])).filter(blur) for i in indices)
    return quantiles([measure_quality(np.asarray(image)).sharpness for image in images])


def quantiles(values: list[float]) -> dict[str, float]:
    """{quantile: value}, rounded for reading."""
    return {
        str(q): round(float(v), 5) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    }


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = read_rows(isic_folder())
    pixels = build_cache(rows, isic_folder(), arguments.cache_dir, InputGeometry(arguments.side))
    indices = fold_indices(rows, (1, 2, 3, 4))
    report = {"side": arguments.side, "images": len(indices), "folds": [1, 2, 3, 4]}
    report |= quality_quantiles(pixels, indices)
    report |= {"sharpness when blurred": blurred_sharpness(pixels, indices[::4])}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
