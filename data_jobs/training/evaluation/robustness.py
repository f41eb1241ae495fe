"""What must not count: turns, softness and clutter, each put on images whose answer is known, and what it does to that.

The clutter is drawn here and not by `augment`, so that no network is held against the very drawings it was trained on.
Everything is drawn on the prepared pixels, and the same for equal seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from data_jobs.training.augment import as_jpeg, soften
from data_jobs.training.dataset import LabelledImage
from data_jobs.training.evaluation.outcomes import Answers, LocalService
from data_jobs.training.probabilities import rounded
from deployments.preprocess.pixels import InputGeometry, resize_to_input
from deployments.preprocess.preprocess import PreparedImage, measure_quality
from serve_app.domain.assessment import Outcome, RiskLevel
from serve_app.domain.diagnosis import Diagnosis

Rng = np.random.Generator
Rgb = NDArray[np.uint8]
Colour = tuple[int, int, int]
#: How many images of a fold are turned, mirrored and softened; of each diagnosis, how many lesions are cluttered.
VIEWED, CLUTTERED = 500, 100
TURNS: dict[str, Callable[[Rgb], Rgb]] = {
    "turned by 90°": np.rot90,
    "turned by 180°": lambda pixels: np.rot90(pixels, 2),
    "turned by 270°": lambda pixels: np.rot90(pixels, 3),
    "mirrored": lambda pixels: pixels[:, ::-1],
}
SOFTENED = "softened to 84 px"


def altered(image: PreparedImage, pixels: Rgb) -> PreparedImage:
    """The image with other pixels, its quality measured anew."""
    kept = {name: getattr(image.quality, name) for name in ("two_levels", "damaged")}
    pixels = np.ascontiguousarray(pixels)
    return replace(image, pixels=pixels, quality=measure_quality(pixels, **kept))


def softened(pixels: Rgb) -> Rgb:
    """As bcn84's images are: reduced to 84 pixels, and back."""
    return resize_to_input(soften(Image.fromarray(pixels)), InputGeometry(pixels.shape[0]))


def view_figures(
    service: LocalService, rows: Sequence[LabelledImage], images: Sequence[PreparedImage], before: Answers
) -> dict[str, Any]:
    """Shares of up to VIEWED images, evenly picked, whose first answer (of nine) and whose level change.

    `turned_or_mirrored`: the mean over those four views; `any_of_four`: under one of them at least. Refused is a level
    of its own: an image that was sharp is, softened to 84 pixels, often refused for that.
    """
    picked = np.unique(np.linspace(0, len(rows) - 1, VIEWED).astype(np.int64))
    rows, images, before = [rows[i] for i in picked], [images[i] for i in picked], before[picked]
    changed = {}
    for name, view in (TURNS | {SOFTENED: softened}).items():
        after = service.answer(rows, [altered(image, view(image.pixels)) for image in images])
        first = after.nine.argmax(1) != before.nine.argmax(1)
        changed[name] = np.stack([first, after.levels != before.levels])
    turned = np.stack([changed[name] for name in TURNS])
    return {
        "images": len(rows),
        "views": {name: _shares(found) for name, found in changed.items()},
        "turned_or_mirrored": _shares(turned.mean(0)),
        "any_of_four": _shares(np.asarray(turned.any(0))),
    }


def _shares(changed: NDArray[Any]) -> dict[str, float]:
    """Means over the images of what changed, 2×N: first answer and level."""
    return dict(zip(("top1_changes", "level_changes"), map(rounded, changed.mean(1)), strict=True))


def clutter_figures(
    service: LocalService,
    rows: Sequence[LabelledImage],
    images: Sequence[PreparedImage],
    before: Answers,
    seed: int,
) -> dict[str, Any]:
    """Up to CLUTTERED melanomas and naevi, one image a lesion, under each kind of clutter.

    `lost` melanomas were `high` and are not any more, yet decided: nobody is asked to look. `more_high` is the
    share of naevi at `high` under it minus that without.
    """
    melanomas, naevi = (_one_a_lesion(rows, d) for d in (Diagnosis.MEL, Diagnosis.NV))
    picked = np.array([*melanomas, *naevi], dtype=np.int64)
    is_melanoma = np.arange(len(picked)) < len(melanomas)
    rows, images = [rows[i] for i in picked], [images[i] for i in picked]
    was_high = before[picked].levels == RiskLevel.HIGH
    found = {}
    for number, (name, compose) in enumerate(CLUTTER.items()):
        rngs = [np.random.default_rng([seed, number, i]) for i in range(len(images))]
        drawn = [
            altered(image, np.asarray(compose(Image.fromarray(image.pixels), rng)))
            for image, rng in zip(images, rngs, strict=True)
        ]
        after = service.answer(rows, drawn)
        is_high, is_decided = after.levels == RiskLevel.HIGH, after.outcomes == Outcome.DECIDED
        more = is_high[~is_melanoma].mean() - was_high[~is_melanoma].mean()
        found[name] = {
            "lost": int((is_melanoma & was_high & ~is_high & is_decided).sum()),
            "lost_or_doubted": int((is_melanoma & was_high & ~is_high).sum()),
            "more_high": rounded(more),
            "review_or_refused": rounded((~is_decided).mean()),
        }
    return {
        "melanomas": len(melanomas),
        "melanomas_high": int((is_melanoma & was_high).sum()),
        "naevi": len(naevi),
        "naevi_high": int((~is_melanoma & was_high).sum()),
        "kinds": found,
    }


def _one_a_lesion(rows: Sequence[LabelledImage], diagnosis: Diagnosis) -> list[int]:
    firsts = {row.lesion: i for i, row in reversed(list(enumerate(rows))) if row.diagnosis is diagnosis}
    positions = sorted(firsts.values())
    chosen = np.unique(np.linspace(0, len(positions) - 1, min(CLUTTERED, len(positions))).astype(np.int64))
    return [positions[i] for i in chosen]


_INKS: tuple[Colour, ...] = ((35, 45, 150), (95, 35, 125), (22, 22, 26), (25, 115, 65), (170, 35, 45))


def _lay(
    image: Image.Image,
    colour: Colour,
    draw: Callable[[ImageDraw.ImageDraw, int], None],
    *,
    blur: float = 0.0,
    opacity: float = 1.0,
) -> Image.Image:
    """Colour where `draw` paints white on a mask of three times the side (which it is given); blur in sides."""
    side = 3 * image.width
    mask = Image.new("L", (side, side))
    draw(ImageDraw.Draw(mask), side)
    mask = mask.reduce(3).filter(ImageFilter.GaussianBlur(blur * image.width))
    return Image.composite(
        Image.new("RGB", image.size, colour), image, mask.point(lambda v: round(v * opacity))
    )


def _box(x: float, y: float, rx: float, ry: float, side: int) -> list[float]:
    return [v * side for v in (x - rx, y - ry, x + rx, y + ry)]


def _bent_line(rng: Rng, start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.float64]:
    """Twelve points of a quadratic Bézier curve whose middle is off the straight line."""
    middle = (start + end) / 2 + rng.normal(0.0, 0.08, 2)
    t = np.linspace(0.0, 1.0, 12)[:, None]
    return np.asarray((1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end)


def _lines(
    image: Image.Image, colour: Colour, curves: Sequence[NDArray[np.float64]], width: float, opacity: float
) -> Image.Image:
    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        for curve in curves:
            points = [tuple(point) for point in (curve * side).tolist()]
            canvas.line(points, fill=255, width=max(1, round(width * side)), joint="curve")

    return _lay(image, colour, draw, opacity=opacity)


def _round_field(image: Image.Image, rng: Rng) -> Image.Image:
    radius, (x, y) = rng.uniform(0.40, 0.58), rng.uniform(0.47, 0.53, 2)

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        canvas.rectangle([0, 0, side, side], fill=255)
        canvas.ellipse(_box(x, y, radius, radius, side), fill=0)

    return _lay(image, (9, 7, 8), draw, blur=0.004)


def _strokes(image: Image.Image, rng: Rng) -> Image.Image:
    ink = _INKS[rng.integers(len(_INKS))]
    curves = [_bent_line(rng, *rng.uniform(0.0, 1.0, (2, 2))) for _ in range(5)]
    return _lines(image, ink, curves, rng.uniform(0.025, 0.045), 0.9)


def _ring(image: Image.Image, rng: Rng) -> Image.Image:
    ink, radius, start = _INKS[rng.integers(len(_INKS))], rng.uniform(0.34, 0.46), rng.uniform(0.0, 2 * np.pi)
    turn = np.linspace(start, start + 1.8 * np.pi, 48)
    curve = 0.5 + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return _lines(image, ink, [curve], rng.uniform(0.015, 0.03), 0.85)


def _ruler(image: Image.Image, rng: Rng) -> Image.Image:
    step, edge = rng.uniform(0.025, 0.045), rng.uniform(0.03, 0.10)
    places = np.arange(0.01, 1.0, step)
    ticks = [
        np.array([[x, 1.0 - edge], [x, 1.0 - edge - (0.06 if i % 5 == 0 else 0.035)]])
        for i, x in enumerate(places)
    ]
    turned = image.rotate(90 * int(rng.integers(4)))
    return _lines(turned, (25, 25, 25), ticks, 0.007, 0.95)


def _hair(image: Image.Image, rng: Rng) -> Image.Image:
    curves = [_bent_line(rng, rng.uniform(-0.1, 1.1, 2), rng.uniform(-0.1, 1.1, 2)) for _ in range(12)]
    return _lines(image, (45, 30, 22), curves, 0.006, 0.9)


def _bubbles(image: Image.Image, rng: Rng) -> Image.Image:
    circles = [(*rng.uniform(0.05, 0.95, 2), rng.uniform(0.02, 0.06)) for _ in range(9)]

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        for x, y, r in circles:
            canvas.ellipse(_box(x, y, r, r, side), fill=40, outline=200, width=max(1, round(0.25 * r * side)))

    return _lay(image, (255, 255, 255), draw, blur=0.003)


def _glare(image: Image.Image, rng: Rng) -> Image.Image:
    spots = np.column_stack([rng.uniform(0.2, 0.8, (4, 2)), rng.uniform(0.02, 0.08, (4, 2))]).tolist()

    def draw(canvas: ImageDraw.ImageDraw, side: int) -> None:
        for x, y, rx, ry in spots:
            canvas.ellipse(_box(x, y, rx, ry, side), fill=255)

    return _lay(image, (255, 255, 255), draw, blur=0.015, opacity=0.9)


def _cast(image: Image.Image, rng: Rng) -> Image.Image:
    warmth = rng.choice((-1.0, 1.0)) * rng.uniform(0.08, 0.18)
    gains = np.exp(np.array([warmth, rng.uniform(-0.05, 0.05), -warmth]))
    return Image.fromarray(np.clip(np.asarray(image) * gains, 0.0, 255.0).astype(np.uint8))


#: Kinds of clutter; each turns a square image into one with it.
CLUTTER: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "round dark field": _round_field,
    "ink strokes": _strokes,
    "ink ring": _ring,
    "ruler": _ruler,
    "hair": _hair,
    "bubbles": _bubbles,
    "glare": _glare,
    "colour cast": _cast,
    "JPEG of quality 10": lambda image, _: as_jpeg(image, 10),
}
