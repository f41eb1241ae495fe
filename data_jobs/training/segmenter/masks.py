"""The archive's images that have a mask of the lesion, and those masks in the frame that networks see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.segmenter.recipe import SegmenterRecipe


def mask_path(row: LabelledImage, folder: Path) -> Path:
    """Where the archive has the mask of a row."""
    return folder / "masks" / f"{row.isic_id}.png"


def outlined(rows: list[LabelledImage], folder: Path) -> NDArray[np.int64]:
    """Positions of the rows that have a mask."""
    return np.array([i for i, row in enumerate(rows) if mask_path(row, folder).exists()], dtype=np.int64)


def read_mask(path: Path, side: int) -> NDArray[np.uint8]:
    """A mask in the square frame of the squashed image, uint8 side×side, 255 inside; its edge is soft."""
    with Image.open(path) as file:
        return np.asarray(file.convert("L").resize((side, side), Image.Resampling.BILINEAR))


def build_masks(
    rows: list[LabelledImage], indices: NDArray[np.int64], folder: Path, cache: Path, recipe: SegmenterRecipe
) -> NDArray[np.uint8]:
    """Masks of the rows at `indices`, uint8 N×S×S at the recipe's cache side, memory-mapped; made once."""
    side = recipe.data.cache_side
    path = cache / f"masks-{side}-{len(indices)}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        made = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(indices), side, side))
        for place, index in enumerate(indices):
            made[place] = read_mask(mask_path(rows[index], folder), side)
        made.flush()
        del made
        partial.rename(path)
    masks: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return masks
