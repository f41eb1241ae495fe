"""The archive's images that have a mask of the lesion, and those masks in the frame that networks see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.segmenter.recipe import SegmenterRecipe

#: Side in pixels of the archive's images that were cut to a square; those of other sides were squashed to one.
CROPPED_SIDE = 224


def mask_path(row: LabelledImage, folder: Path) -> Path:
    """Where the archive has the mask of a row."""
    return folder / "masks" / f"{row.isic_id}.png"


def outlined(rows: list[LabelledImage], folder: Path) -> NDArray[np.int64]:
    """Positions of the rows that have a mask."""
    return np.array([i for i, row in enumerate(rows) if mask_path(row, folder).exists()], dtype=np.int64)


def is_cropped(row: LabelledImage) -> bool:
    """Whether the archive has the middle square of an image, and not all of it squashed.

    So it is with all of 224 by 224 pixels: among scales of their masks that fit them, a third more width is best, as
    4:3 cut to a square needs; with those of 180 by 180 it is none (docs/models.md).
    """
    return row.aspect == "squashed" and row.width == row.height == CROPPED_SIDE


def read_mask(row: LabelledImage, folder: Path, side: int) -> NDArray[np.uint8]:
    """The mask of a row in its image's square frame, uint8 side×side, 255 inside; its edge is soft."""
    with Image.open(mask_path(row, folder)) as file:
        mask = file.convert("L")
    inset = (mask.width - mask.height) / 2.0 if is_cropped(row) else 0.0
    box = (inset, 0.0, mask.width - inset, mask.height)
    return np.asarray(mask.resize((side, side), Image.Resampling.BILINEAR, box=box))


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
            made[place] = read_mask(rows[index], folder, side)
        made.flush()
        del made
        partial.rename(path)
    masks: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return masks
