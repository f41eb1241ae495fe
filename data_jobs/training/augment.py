"""Augmentation: what a camera, a hand and an archive may do to an image without changing its diagnosis.

Aspect and resolution go with the diagnosis in this archive, so both are hidden: every draw passes through a simulated
capture of random resolution, softness and JPEG quality. Ink and dark corners go with it, too, and classifiers learn
them (Winkler et al., JAMA Dermatology 2019, on ink; Sies et al., European Journal of Cancer 2021, on dark corners). So
clutter is drawn over any image, whatever its label: a round field, ink, rulers, hair, bubbles and glare before the
simulated capture, so that they are as sharp as the skin; a colour cast, grey and JPEG damage after it.
"""

from __future__ import annotations

from collections.abc import Callable
import colorsys
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from data_jobs.training.recipe import BCN84_SIDE, AugmentPlan

Rng = np.random.Generator
Floats = NDArray[np.floating[Any]]
Points = list[tuple[float, float]]
#: What is drawn on a mask, in units of the image's side.
Drawing = Callable[[ImageDraw.ImageDraw, float], None]
#: Side in pixels that masks are drawn at, at least; then they are reduced to the image, which smooths their edges.
_MASK_SIDE = 320
_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BCN84_QUALITY = 75
#: How many cluttered views get a colour cast, are grey, or are damaged by a JPEG, and its quality, below the second.
CAST_SHARE, GREY_SHARE, DAMAGE_SHARE = 1 / 3, 1 / 12, 1 / 6
DAMAGE_QUALITY = (8, 35)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Hue turns about the grey axis: YIQ's chroma plane, as linear maps on RGB.
_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=np.float64
)
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def augment(
    pixels: NDArray[np.uint8],
    side: int,
    plan: AugmentPlan,
    rng: Rng,
    *,
    soft: bool = False,
    cluttered: bool = False,
) -> NDArray[np.uint8]:
    """One random view of an image, uint8 H×H×3 to side×side×3; equal draws for equal `rng` states.

    `soft`: as if it had been archived at the other hospital's size; `cluttered`: with what must not count, in whole
    view half of the time.
    """
    return _augment(pixels, (), side, plan, rng, soft=soft, cluttered=cluttered)[0]


def augment_outlined(
    pixels: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    side: int,
    plan: AugmentPlan,
    rng: Rng,
    *,
    cluttered: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The view that `augment` gives, and the same view of the lesion's mask, uint8 M×M (255 inside) to side×side.

    What a round field hides of the lesion is no part of the mask; what ink and hair hide is.
    """
    view, outline = _augment(pixels, (Image.fromarray(mask),), side, plan, rng, cluttered=cluttered)
    return view, outline


def _augment(
    pixels: NDArray[np.uint8],
    masks: tuple[Image.Image, ...],
    side: int,
    plan: AugmentPlan,
    rng: Rng,
    *,
    soft: bool = False,
    cluttered: bool = False,
) -> list[NDArray[np.uint8]]:
    area = rng.uniform(*plan.crop_area)
    image = Image.fromarray(pixels)
    if cluttered:
        image = clutter(image, rng)
        masks = tuple(in_field(mask, image) for mask in masks)
        area = 1.0 if rng.random() < 0.5 else area
    if soft:
        image = soften(image)
    stretch = np.exp(rng.uniform(-1.0, 1.0) * np.log1p(plan.aspect_jitter) / 2.0)
    crop_x, crop_y = (min(1.0, float(np.sqrt(area) * f)) for f in (stretch, 1.0 / stretch))
    capture = _simulate_capture(image, side / float(np.sqrt(area)), plan, rng)
    view, *outlines = _view((capture, *masks), side, (crop_x, crop_y), plan.small_rotation, rng)
    coloured = _colour(view, plan, rng)
    return [spoil(coloured, rng) if cluttered else coloured, *outlines]


def soften(image: Image.Image) -> Image.Image:
    """Reduce an image as those of bcn84 were: to 84 by 84 pixels, as JPEG of quality 75 (by its quantization tables)."""
    small = image.resize((BCN84_SIDE, BCN84_SIDE), Image.Resampling.BICUBIC)
    return as_jpeg(small, BCN84_QUALITY)


def _simulate_capture(image: Image.Image, full_side: float, plan: AugmentPlan, rng: Rng) -> Image.Image:
    """Resample to a random resolution, then soften and compress some of the time."""
    side = max(32, round(full_side * float(np.exp(rng.uniform(*np.log(plan.capture_scale))))))
    image = image.resize((side, side), _FILTERS[int(rng.integers(2))])
    if rng.random() < plan.blur_share:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*plan.blur_sigma)))
    if rng.random() < plan.jpeg_share:
        low, high = plan.jpeg_quality
        image = as_jpeg(image, int(rng.integers(low, high + 1)))
    return image


def _view(
    images: tuple[Image.Image, ...], side: int, crop: tuple[float, float], small_rotation: float, rng: Rng
) -> list[NDArray[np.uint8]]:
    """Crop, mirror, turn and resample in one affine map, all images alike; what lies outside is mirrored in."""
    (linear,), (shift,) = view_maps(np.array([crop]), small_rotation, rng)
    resample = _FILTERS[int(rng.integers(2))]
    views = []
    for image in images:
        size = image.width
        # A full-size crop turned by 20 degrees reaches 0.14 of the side beyond the edge.
        pad = math.ceil(0.16 * size)
        pixels = np.asarray(image)
        edges = [(pad, pad), (pad, pad), (0, 0)][: pixels.ndim]
        padded = Image.fromarray(np.pad(pixels, edges, mode="reflect"))
        matrix = linear * size / side
        offset = pad + size * (1.0 + shift) / 2.0 - matrix @ np.array([side / 2.0, side / 2.0])
        data = (*matrix[0], offset[0], *matrix[1], offset[1])
        views.append(
            np.asarray(padded.transform((side, side), Image.Transform.AFFINE, data, resample=resample))
        )
    return views


def view_maps(crop: NDArray[np.float64], small_rotation: float, rng: Rng) -> tuple[Floats, Floats]:
    """Random maps from views to what they show of the image, both from -1 to 1: linear parts N×2×2, shifts N×2.

    `crop`: the shares of width and height that are shown, N×2.
    """
    count = len(crop)
    degrees = 90.0 * rng.integers(4, size=count) + rng.uniform(-small_rotation, small_rotation, count)
    mirror = np.where(rng.random(count) < 0.5, 1.0, -1.0)
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[cosine * mirror, -sine], [sine * mirror, cosine]]).transpose(2, 0, 1)
    return crop[:, :, None] * turn, rng.uniform(-1.0, 1.0, (count, 2)) * (1.0 - crop)


def _colour(pixels: NDArray[np.uint8], plan: AugmentPlan, rng: Rng) -> NDArray[np.uint8]:
    (matrix,), (lift,) = colour_maps(plan, rng, 1)
    image = pixels.astype(np.float32)
    grey = float((image @ LUMA).mean()) * lift
    return np.clip(image @ matrix.T + (grey + 0.5), 0.0, 255.0).astype(np.uint8)


def colour_maps(plan: AugmentPlan, rng: Rng, count: int) -> tuple[Floats, Floats]:
    """Random brightness, contrast, saturation, hue and channel gains: linear maps of RGB N×3×3, and N shares.

    That share of an image's mean grey is added to it.
    """
    brightness = 1.0 + rng.uniform(-1.0, 1.0, count) * plan.brightness
    contrast = 1.0 + rng.uniform(-1.0, 1.0, count) * plan.contrast
    saturation = 1.0 + rng.uniform(-1.0, 1.0, count) * plan.saturation
    angle = 2.0 * np.pi * rng.uniform(-1.0, 1.0, count) * plan.hue
    gains = 1.0 + rng.uniform(-1.0, 1.0, (count, 3)) * plan.channel_gain
    chroma = np.tile(np.eye(3), (count, 1, 1))
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 2, 1] = saturation * np.sin(angle)
    chroma[:, 1, 2] = -chroma[:, 2, 1]
    matrix = gains[:, :, None] * (_FROM_YIQ @ chroma @ _TO_YIQ) * (brightness * contrast)[:, None, None]
    return matrix.astype(np.float32), (brightness * (1.0 - contrast)).astype(np.float32)


def clutter(image: Image.Image, rng: Rng) -> Image.Image:
    """A square image with one to three kinds of clutter over it; equal for equal `rng` states."""
    chosen = rng.choice(len(KINDS), size=int(rng.choice((1, 2, 3), p=(0.6, 0.3, 0.1))), replace=False)
    for kind in sorted(chosen):
        image = list(KINDS.values())[kind](image, rng)
    return image


def overlay(side: int, rng: Rng) -> tuple[NDArray[np.uint8], list[float]]:
    """What `clutter` puts over any image: its colour and how much of the image shows through, uint8 side×side×4.

    The second: where the image lies below, as left, top, right and bottom in shares of the side. An image with clutter
    is colour + image · shows / 255, so two images tell all: one of black and one of white.
    """
    state = rng.bit_generator.state
    black = clutter(Image.new("RGB", (side, side)), rng)
    rng.bit_generator.state = state
    white = clutter(Image.new("RGB", (side, side), (255, 255, 255)), rng)
    colour = np.asarray(black)
    shows = np.clip(np.asarray(white).astype(np.int16) - colour, 0, 255).max(2, keepdims=True)
    box = black.info.get("box", [0, 0, side, side])
    return np.concatenate([colour, shows.astype(np.uint8)], axis=2), [float(v) / side for v in box]


def spoil(pixels: NDArray[np.uint8], rng: Rng) -> NDArray[np.uint8]:
    """A colour cast a third of the time, grey one in twelve, JPEG damage one in six; uint8 side×side×3."""
    chance = rng.random(3)
    if chance[0] < CAST_SHARE:
        pixels = np.clip(pixels * casts(rng, 1), 0.0, 255.0).astype(np.uint8)
    image = Image.fromarray(pixels)
    if chance[1] < GREY_SHARE:
        image = image.convert("L").convert("RGB")
    if chance[2] < DAMAGE_SHARE:
        image = as_jpeg(image, int(rng.integers(*DAMAGE_QUALITY)))
    return np.array(image)


def casts(rng: Rng, count: int) -> NDArray[np.float32]:
    """Gains N×3 of warm or cold light with a green or magenta tinge."""
    warmth, tinge = rng.uniform(-0.2, 0.2, count), rng.uniform(-0.08, 0.08, count)
    return np.exp(np.stack([warmth, tinge, -warmth], axis=1)).astype(np.float32)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image after a JPEG of this quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    decoded = Image.open(buffer)
    decoded.load()
    return decoded


def round_field(image: Image.Image, rng: Rng) -> Image.Image:
    """Dark round an ellipse of any size, as a dermatoscope's tube leaves it; half of the small ones hold all of it.

    `info["box"]` tells where the image lies: left, top, right and bottom in pixels; `info["field"]` is the ellipse.
    """
    size = image.width
    radius = rng.uniform(0.32, 0.72)
    # A circle, or what is left of one after 4:3 was squashed.
    stretch = math.sqrt(float(rng.choice((1.0, 1.0, 3 / 4, 4 / 3))))
    rx, ry = radius / stretch, radius * stretch
    x, y = rng.uniform(0.45, 0.55, 2)
    dark = tuple(int(v) for v in rng.integers(0, 30, 3) + (0 if rng.random() < 0.9 else 200))
    box = [0, 0, size, size]
    if radius < 0.5 and rng.random() < 0.5:
        box = [round(v * size) for v in (x - rx, y - ry, x + rx, y + ry)]
        small = image.resize((box[2] - box[0], box[3] - box[1]))
        image = image.copy()
        image.paste(small, (box[0], box[1]))
    inside = _mask(
        size, lambda draw, s: draw.ellipse([v * s for v in (x - rx, y - ry, x + rx, y + ry)], fill=255)
    )
    if rng.random() < 0.5:
        inside = inside.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.003, 0.03)))
    shown = Image.composite(image, Image.new("RGB", image.size, dark), inside)
    shown.info |= {"box": box, "field": inside}
    return shown


def in_field(mask: Image.Image, shown: Image.Image) -> Image.Image:
    """A mask of an image as `clutter` shows that image: moved into the round field, if there is one, and cut off by it."""
    if "field" not in shown.info:
        return mask
    box = [round(v * mask.width / shown.width) for v in shown.info["box"]]
    moved = Image.new("L", mask.size)
    moved.paste(mask.resize((box[2] - box[0], box[3] - box[1])), (box[0], box[1]))
    return ImageChops.multiply(moved, shown.info["field"].resize(mask.size))


def ink(image: Image.Image, rng: Rng) -> Image.Image:
    """Strokes, an open ring round the middle, or an arrow that points to it, of any colour."""
    colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.05, 0.9))
    width = rng.uniform(0.008, 0.045)
    kind = int(rng.integers(3))
    lines: list[Points] = []
    if kind == 0:
        lines = [_curve(rng, rng.uniform(0.1, 0.6)) for _ in range(int(rng.integers(1, 5)))]
    elif kind == 1:
        start, length = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(1.0, 2.0) * np.pi
        rx, ry = rng.uniform(0.22, 0.5, 2)
        x, y = rng.uniform(0.42, 0.58, 2)
        angles = np.linspace(start, start + length, 40)
        lines = [[(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]]
    else:
        angle, tip, tail = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.12, 0.3), rng.uniform(0.38, 0.6)
        head = rng.uniform(0.04, 0.1)
        end = _polar(angle, tip)
        barbs = [
            (end[0] + head * math.cos(angle + turn), end[1] + head * math.sin(angle + turn))
            for turn in (0.5, -0.5)
        ]
        lines = [[_polar(angle, tail), end], [barbs[0], end, barbs[1]]]
    return _paint(image, lines, width, _bytes(colour), rng.uniform(0.5, 1.0))


def ruler(image: Image.Image, rng: Rng) -> Image.Image:
    """A scale along one edge: ticks, every fifth longer, at times on a white strip and with numbers."""
    offset, step = rng.uniform(0.02, 0.16), rng.uniform(0.02, 0.07)
    long = rng.uniform(0.03, 0.07)
    grey = int(rng.integers(0, 60)) if rng.random() < 0.8 else int(rng.integers(200, 256))
    strip = 0.0 if rng.random() < 0.7 else rng.uniform(0.08, 0.16)
    width = rng.uniform(0.003, 0.009)

    def draw_ticks(draw: ImageDraw.ImageDraw, s: float) -> None:
        for i in range(int(1.0 / step) + 1):
            reach = offset + long * (1.0 if i % 5 == 0 else 0.55)
            thick = max(1, round(width * s))
            draw.line([(i * step * s, offset * s), (i * step * s, reach * s)], fill=255, width=thick)
            if i % 5 == 0 and strip:
                draw.text((i * step * s, (reach + 0.005) * s), str(i // 5), fill=255)

    turns = int(rng.integers(4))
    turned = image.rotate(90 * turns)
    if strip:
        white = Image.new("RGB", image.size, (235, 235, 230))
        box = [0, max(0.0, offset - 0.02), 1, offset + strip]
        turned = Image.composite(
            white, turned, _mask(image.width, lambda d, s: d.rectangle([v * s for v in box], fill=255))
        )
        grey = 20
    ticks = _mask(image.width, draw_ticks)
    turned = Image.composite(Image.new("RGB", image.size, (grey,) * 3), turned, ticks)
    return turned.rotate(-90 * turns)


def hair(image: Image.Image, rng: Rng) -> Image.Image:
    """Two to fifteen hairs, dark or fair."""
    shade = rng.uniform(0.03, 0.25) if rng.random() < 0.8 else rng.uniform(0.5, 0.85)
    colour = colorsys.hsv_to_rgb(rng.uniform(0.03, 0.12), rng.uniform(0.1, 0.6), shade)
    lines = [_curve(rng, rng.uniform(0.3, 1.2)) for _ in range(int(rng.integers(2, 16)))]
    return _paint(image, lines, rng.uniform(0.003, 0.012), _bytes(colour), rng.uniform(0.6, 1.0))


def bubbles(image: Image.Image, rng: Rng) -> Image.Image:
    """Bubbles of the gel: a bright rim, a little light within."""
    circles = [(*rng.uniform(0.0, 1.0, 2), rng.uniform(0.008, 0.07)) for _ in range(int(rng.integers(2, 14)))]
    inside, rim = int(rng.integers(0, 60)), int(rng.integers(110, 220))

    def draw_circles(draw: ImageDraw.ImageDraw, s: float) -> None:
        for x, y, r in circles:
            box = [(x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s]
            draw.ellipse(box, fill=inside, outline=rim, width=max(1, round(0.2 * r * s)))

    return _whiten(image, _mask(image.width, draw_circles))


def glare(image: Image.Image, rng: Rng) -> Image.Image:
    """Reflections: a few white spots without an edge."""
    spots = [(*rng.uniform(0.0, 1.0, 2), *rng.uniform(0.01, 0.09, 2)) for _ in range(int(rng.integers(1, 7)))]
    strength = int(rng.integers(120, 256))

    def draw_spots(draw: ImageDraw.ImageDraw, s: float) -> None:
        for x, y, rx, ry in spots:
            draw.ellipse([(x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s], fill=strength)

    blurred = _mask(image.width, draw_spots).filter(
        ImageFilter.GaussianBlur(image.width * rng.uniform(0.005, 0.03))
    )
    return _whiten(image, blurred)


#: The kinds that `clutter` chooses from, in the order in which they are put on: ink lies on the skin, a bubble over it.
KINDS: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "ink": ink,
    "hair": hair,
    "bubbles": bubbles,
    "glare": glare,
    "ruler": ruler,
    "round field": round_field,
}


def _mask(size: int, drawing: Drawing) -> Image.Image:
    scale = math.ceil(_MASK_SIDE / size)
    mask = Image.new("L", (size * scale, size * scale))
    drawing(ImageDraw.Draw(mask), float(size * scale))
    return mask.reduce(scale) if scale > 1 else mask


def _whiten(image: Image.Image, mask: Image.Image) -> Image.Image:
    return Image.composite(Image.new("RGB", image.size, (255, 255, 255)), image, mask)


def _paint(
    image: Image.Image, lines: list[Points], width: float, colour: tuple[int, int, int], opacity: float
) -> Image.Image:
    def draw_lines(draw: ImageDraw.ImageDraw, s: float) -> None:
        for line in lines:
            points = [(x * s, y * s) for x, y in line]
            draw.line(points, fill=round(255 * opacity), width=max(1, round(width * s)), joint="curve")

    mask = _mask(image.width, draw_lines)
    return Image.composite(Image.new("RGB", image.size, colour), image, mask)


def _curve(rng: Rng, length: float) -> Points:
    """A slightly bent line of this length anywhere in the frame."""
    start, angle, bend = rng.uniform(0.0, 1.0, 2), rng.uniform(0.0, 2.0 * np.pi), rng.uniform(-1.5, 1.5)
    directions = angle + bend * np.linspace(0.0, 1.0, 12)
    steps = np.stack([np.cos(directions), np.sin(directions)], axis=1) * (length / 12)
    return [(float(x), float(y)) for x, y in np.vstack([start, start + np.cumsum(steps, axis=0)])]


def _polar(angle: float, radius: float) -> tuple[float, float]:
    return 0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)


def _bytes(colour: tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in colour)
    return red, green, blue
