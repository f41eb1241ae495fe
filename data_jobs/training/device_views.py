"""Augmented views made in batches where the images lie, on a GPU: what `augment` does to one image with Pillow.

The random numbers are drawn by the same code or from the same ranges; every step is Pillow's as near as a batch allows, whole numbers after each:
captures have sides in multiples of 16 pixels, so that those of one side go together, and each such group has one
resampling filter. Clutter is drawn beforehand by `augment.overlay`, and laid over any image here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
import torch
from torch import Tensor
from torch.nn import functional

from data_jobs.training.augment import (
    BCN84_QUALITY,
    CAST_SHARE,
    DAMAGE_QUALITY,
    DAMAGE_SHARE,
    GREY_SHARE,
    LUMA,
    casts,
    colour_maps,
    overlay,
    view_maps,
)
from data_jobs.training.recipe import BCN84_SIDE, AugmentPlan, Stage

Rng = np.random.Generator
Rows = NDArray[np.int64]
_FILTERS = ("bilinear", "bicubic")
#: Captures have sides in these steps: two blocks of a JPEG, whose colours have half the resolution.
_STEP = 16
#: Pixels to either side that a blur reaches: over three standard deviations of the widest, 1.2.
_REACH = 4
# ITU-T T.871 (JFIF): from RGB to luma and the two colour differences.
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_FROM_YCC = np.linalg.inv(_TO_YCC)


@dataclass(frozen=True, slots=True)
class Overlays:
    """Clutter for any image, as `augment.overlay` gives it: layers uint8 N×S×S×4, boxes float N×4."""

    layers: Tensor
    boxes: Tensor

    @classmethod
    def drawn(cls, count: int, side: int, seed: int, workers: int = 1) -> Overlays:
        """So many of them, drawn by so many processes."""
        draw = partial(_drawing, side, seed)
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                made = list(pool.map(draw, range(count), chunksize=32))
        else:
            made = [draw(position) for position in range(count)]
        layers, boxes = zip(*made, strict=True)
        return cls(torch.from_numpy(np.stack(layers)), torch.tensor(boxes))

    def to(self, device: torch.device) -> Overlays:
        """The same there."""
        return Overlays(self.layers.to(device), self.boxes.to(device))

    def over(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Images float N×3×H×W under N of the overlays."""
        x0, y0, x1, y1 = self.boxes[chosen].unbind(1)
        zero = torch.zeros_like(x0)
        # From the frame, -1 to 1, to the image that lies in its box.
        across = torch.stack([1 / (x1 - x0), zero, (1 - x0 - x1) / (x1 - x0)], 1)
        down = torch.stack([zero, 1 / (y1 - y0), (1 - y0 - y1) / (y1 - y0)], 1)
        grid = functional.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        layers = self.layers[chosen].permute(0, 3, 1, 2).float()
        if layers.shape[-1] != images.shape[-1]:
            layers = _resized(layers, images.shape[-1], "bilinear")
        return layers[:, :3] + images * layers[:, 3:] / 255.0


def _drawing(side: int, seed: int, position: int) -> tuple[NDArray[np.uint8], list[float]]:
    return overlay(side, np.random.default_rng((seed, position)))


class DeviceViews:
    """Images of every source on a device, and random views of them."""

    def __init__(
        self, images: Sequence[Tensor], sources: Rows, overlays: Overlays, plan: AugmentPlan
    ) -> None:
        """`images`: of each source, uint8 N×H×H×3, in the order of its rows; `sources`: of every row, in SOURCES' order."""
        self.images, self.sources, self.overlays, self.plan = images, sources, overlays, plan
        self.device = images[0].device
        self._places = np.empty_like(sources)
        for source in range(len(images)):
            rows = np.flatnonzero(sources == source)
            self._places[rows] = np.arange(len(rows))

    @torch.no_grad()
    def views(self, rows: Rows, side: int, stage: Stage, rng: Rng) -> Tensor:
        """One view of each of the rows, float N×3×side×side of whole numbers, 0 to 255."""
        plan, count = self.plan, len(rows)
        full_size = np.array([images.shape[1] > BCN84_SIDE for images in self.images])[self.sources[rows]]
        soft = full_size & (rng.random(count) < (stage.soft or 0.0))
        cluttered = rng.random(count) < (stage.clutter or 0.0)
        area = rng.uniform(*plan.crop_area, count)
        area[cluttered & (rng.random(count) < 0.5)] = 1.0
        stretch = np.exp(rng.uniform(-1.0, 1.0, count) * np.log1p(plan.aspect_jitter) / 2.0)
        crop = np.minimum(1.0, np.sqrt(area)[:, None] * np.stack([stretch, 1.0 / stretch], axis=1))
        low, high = (float(np.log(scale)) for scale in plan.capture_scale)
        captured = side / np.sqrt(area) * np.exp(rng.uniform(low, high, count))
        sides = np.maximum(2, np.round(captured / _STEP)).astype(np.int64) * _STEP
        linear, shift = view_maps(crop, plan.small_rotation, rng)
        maps = self.tensor(np.concatenate([linear, shift[:, :, None]], axis=2))
        taken = [
            (found, self._taken(source, rows[found], cluttered[found], soft[found], rng))
            for source in range(len(self.images))
            if len(found := np.flatnonzero(self.sources[rows] == source))
        ]
        views = torch.empty(count, 3, side, side, device=self.device)
        for found, originals in [(f[w], o) for f, parts in taken for w, o in parts]:
            for capture in np.unique(sides[found]).tolist():
                group = np.flatnonzero(sides[found] == capture)
                filters = [_FILTERS[i] for i in rng.integers(2, size=2)]
                image = self._captured(originals[self.tensor(group)], capture, filters[0], rng)
                where = self.tensor(found[group])
                grid = functional.affine_grid(maps[where], [len(group), 3, side, side], align_corners=False)
                view = functional.grid_sample(
                    image, grid, filters[1], padding_mode="reflection", align_corners=False
                )
                views[where] = view.clamp_(0.0, 255.0).round_()
        return self._spoilt(self._coloured(views, rng), np.flatnonzero(cluttered), rng).round()

    def tensor(self, values: NDArray[np.generic]) -> Tensor:
        """The values where the images are; floats in float32."""
        tensor = _moved(values, self.device)
        return tensor.float() if tensor.is_floating_point() else tensor

    def _taken(
        self, source: int, rows: Rows, cluttered: NDArray[np.bool_], soft: NDArray[np.bool_], rng: Rng
    ) -> list[tuple[Rows, Tensor]]:
        """Images of a source with their clutter: which of `rows` stay at their size and which are softened, and both."""
        images = self.images[source][self.tensor(self._places[rows])].permute(0, 3, 1, 2).float()
        if len(under := np.flatnonzero(cluttered)):
            where = self.tensor(under)
            chosen = self.tensor(rng.integers(len(self.overlays.layers), size=len(under)))
            images[where] = self.overlays.over(images[where], chosen)
        kept, softened = np.flatnonzero(~soft), np.flatnonzero(soft)
        parts = [(kept, images[self.tensor(kept)])] if len(kept) else []
        if len(softened):
            small = _resized(images[self.tensor(softened)], BCN84_SIDE, "bicubic")
            parts.append((softened, jpeg(small, np.full(len(softened), BCN84_QUALITY))))
        return parts

    def _captured(self, images: Tensor, side: int, resampling: str, rng: Rng) -> Tensor:
        """Resample to this resolution, then soften and compress some of them."""
        plan, count = self.plan, len(images)
        images = _resized(images, side, resampling)
        if len(chosen := np.flatnonzero(rng.random(count) < plan.blur_share)):
            where = self.tensor(chosen)
            images[where] = blur(images[where], self.tensor(rng.uniform(*plan.blur_sigma, len(chosen))))
        if len(chosen := np.flatnonzero(rng.random(count) < plan.jpeg_share)):
            low, high = plan.jpeg_quality
            where = self.tensor(chosen)
            images[where] = jpeg(images[where], rng.integers(low, high + 1, len(chosen)))
        return images

    def _coloured(self, images: Tensor, rng: Rng) -> Tensor:
        matrices, lifts = (self.tensor(part) for part in colour_maps(self.plan, rng, len(images)))
        luma = self.tensor(LUMA)
        grey = torch.einsum("c,nchw->n", luma, images) / images.shape[-1] ** 2 * lifts
        return (torch.einsum("nkc,nchw->nkhw", matrices, images) + grey.view(-1, 1, 1, 1)).clamp(0.0, 255.0)

    def _spoilt(self, images: Tensor, cluttered: Rows, rng: Rng) -> Tensor:
        """As `augment.spoil`, those of the cluttered that chance says."""
        cast, grey, damaged = (
            cluttered[rng.random(len(cluttered)) < share] for share in (CAST_SHARE, GREY_SHARE, DAMAGE_SHARE)
        )
        if len(cast):
            gains = self.tensor(casts(rng, len(cast)))[:, :, None, None]
            images[self.tensor(cast)] = (images[self.tensor(cast)] * gains).clamp(0.0, 255.0)
        if len(grey):
            images[self.tensor(grey)] = torch.einsum(
                "c,nchw->nhw", self.tensor(LUMA), images[self.tensor(grey)]
            ).unsqueeze(1)
        if len(damaged):
            where = self.tensor(damaged)
            images[where] = jpeg(images[where], rng.integers(*DAMAGE_QUALITY, len(damaged)))
        return images


def _moved(values: NDArray[np.generic], device: torch.device) -> Tensor:
    # To wait for a copy is to wait for all that the device has still to do.
    return torch.from_numpy(values).to(device, non_blocking=True)


def _resized(images: Tensor, side: int, resampling: str) -> Tensor:
    resized = functional.interpolate(
        images, (side, side), mode=resampling, antialias=True, align_corners=False
    )
    return resized.clamp_(0.0, 255.0).round_()


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blurs of N standard deviations in pixels; float N×3×H×W."""
    taps = torch.arange(-_REACH, _REACH + 1, device=images.device)
    weights = (-(taps**2) / (2.0 * sigma[:, None] ** 2)).softmax(1).T[:, :, None, None, None]
    height, width = images.shape[-2:]
    padded = functional.pad(images, (_REACH,) * 4, mode="replicate")
    down = sum(weight * padded[:, :, i : i + height] for i, weight in enumerate(weights))
    return sum(weight * down[..., i : i + width] for i, weight in enumerate(weights))


def jpeg(images: Tensor, qualities: NDArray[np.int64]) -> Tensor:
    """The images, float N×3×H×W, after a JPEG of each quality with colours of half resolution, as Pillow writes it."""
    side, more = images.shape[-1], -images.shape[-1] % _STEP
    padded = functional.pad(images, (0, more, 0, more), mode="replicate")
    to_ycc, from_ycc = (_moved(matrix, images.device) for matrix in (_TO_YCC, _FROM_YCC))
    luma, colours = torch.einsum("kc,nchw->nkhw", to_ycc, padded.round()).split([1, 2], 1)
    tables = _moved(_tables()[qualities], images.device)
    luma = _quantized(luma - 128.0, tables[:, 0]) + 128.0
    colours = _quantized(functional.avg_pool2d(colours, 2), tables[:, 1])
    colours = functional.interpolate(colours, scale_factor=2, mode="bilinear", align_corners=False)
    decoded = torch.einsum("ck,nkhw->nchw", from_ycc, torch.cat([luma, colours], 1))
    return decoded[..., :side, :side].round().clamp(0.0, 255.0)


def _quantized(planes: Tensor, tables: Tensor) -> Tensor:
    """N×C×H×W by blocks of 8 by 8, their cosine transforms in steps of the N tables of 8×8."""
    count, channels, height, width = planes.shape
    cosines = _moved(_cosines(), planes.device)
    blocks = planes.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = tables.view(count, 1, 1, 1, 8, 8)
    kept = (cosines @ blocks @ cosines.T / steps).round() * steps
    return (cosines.T @ kept @ cosines).transpose(3, 4).reshape(planes.shape)


@cache
def _cosines() -> NDArray[np.float32]:
    """The orthonormal cosine transform of 8 values (type II), frequency by place."""
    frequency, place = np.mgrid[:8, :8]
    rows = np.sqrt(np.where(frequency == 0, 1.0, 2.0) / 8.0)
    return (rows * np.cos(np.pi * frequency * (2 * place + 1) / 16.0)).astype(np.float32)


@cache
def _tables() -> NDArray[np.float32]:
    """Pillow's own quantization tables for every quality up to 100: 101×2×8×8, of luma and of colours."""
    tables = np.ones((101, 2, 8, 8), np.float32)
    for quality in range(1, 101):
        buffer = io.BytesIO()
        Image.new("RGB", (_STEP, _STEP)).save(buffer, "JPEG", quality=quality)
        found = Image.open(buffer).quantization  # type: ignore[attr-defined]
        tables[quality] = [np.reshape(found[part], (8, 8)) for part in (0, 1)]
    return tables
