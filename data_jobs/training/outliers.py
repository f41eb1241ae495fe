"""What is not dermoscopy: what p(UNK) is fitted on, and held against.

Smartphone photographs of skin (the likeliest wrong image of all), photographs and other departments' images shipped
with scikit-image, scikit-learn and matplotlib, drawings of much else, and lesions inverted. Each source image is in
one of two disjoint parts, each patient, too: `fit`, and `test` for the figures told of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import csv
from dataclasses import dataclass
import hashlib
import io
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.augment import augment
from data_jobs.training.recipe import AugmentPlan
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image

Part = Literal["fit", "test"]
Rgb = NDArray[np.uint8]
Rng = np.random.Generator

CLINICAL = "clinical photograph"
# Alternate, so that each part has faces, textures and objects.
_PHOTOGRAPHS = (
    "astronaut", "coffee", "camera", "chelsea", "brick", "grass", "gravel", "coins", "rocket", "page",
    "moon", "text", "clock", "horse", "hubble_deep_field", "colorwheel", "logo",
)  # fmt: skip
_DEPARTMENTS = ("retina", "microaneurysms", "immunohistochemistry", "cell")
_VIEWS = 8
_DRAWN = 24
#: Shares of what `captured` softens to the other hospital's size, and clutters: alike on both sides.
_SOFT, _CLUTTERED = 0.3, 0.4


@dataclass(frozen=True, slots=True)
class Outlier:
    """One outlier: what it is, the image or patient it comes from, its part, its prepared pixels side×side×3."""

    kind: str
    source: str
    part: Part
    pixels: Rgb


def make_outliers(geometry: InputGeometry, seed: int, archive: Path | None = None) -> list[Outlier]:
    """Outliers of all kinds but `skin_like`'s, equal for equal seeds; clinical photographs where the archive has them."""
    rng = np.random.default_rng(seed)
    found: list[Outlier] = []
    for kind, names in (("photograph", _PHOTOGRAPHS), ("other department", _DEPARTMENTS)):
        for index, (name, image) in enumerate(_shipped(kind, names)):
            part: Part = "fit" if index % 2 == 0 else "test"
            views = [_view(image, rng) for _ in range(_VIEWS)]
            found += [Outlier(kind, name, part, prepared(view, geometry)) for view in views]
    for kind, draw in DRAWINGS.items():
        for index in range(_DRAWN):
            part = "fit" if index % 2 == 0 else "test"
            found.append(Outlier(kind, f"{kind} {index}", part, prepared(draw(rng), geometry)))
    return found + (clinical_photographs(geometry, archive) if archive else [])


def clinical_photographs(geometry: InputGeometry, archive: Path) -> list[Outlier]:
    """The archive's smartphone photographs of skin (`clinical/`), half of the patients in each part; none without."""
    table = archive / "clinical" / "clinical.csv"
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        rows = [(row["image_id"], row["patient_id"]) for row in csv.DictReader(file)]

    def read(row: tuple[str, str]) -> Outlier:
        image, patient = row
        path = next((table.parent / "images").glob(f"{image}.*"))
        part: Part = "fit" if hashlib.sha256(patient.encode()).digest()[0] % 2 == 0 else "test"
        return Outlier(
            CLINICAL, patient, part, prepare_image(path.read_bytes(), geometry, ARCHIVE_LIMITS).pixels
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, rows))


def captured(pixels: Rgb, plan: AugmentPlan, seed: int) -> Rgb:
    """N images again, each cropped, resized, softened, compressed and cluttered as training does: known and outliers alike.

    What tells the two apart is then what they show, not the resolution, file format or crop of where they come from.
    """
    rng = np.random.default_rng(seed)
    return np.stack([
        augment(image, image.shape[0], plan, rng, soft=bool(soft), cluttered=bool(cluttered))
        for image in pixels
        for soft, cluttered in [rng.random(2) < (_SOFT, _CLUTTERED)]
    ])  # fmt: skip


def skin_like(pixels: Rgb, seed: int) -> list[Outlier]:
    """Made from N lesions: inverted (both parts); blurred away and plain skin, which are never fitted on."""
    rng = np.random.default_rng(seed)
    found = []
    for index, image in enumerate(pixels):
        part: Part = "fit" if index % 2 == 0 else "test"
        found.append(Outlier("inverted lesion", f"inverted {index}", part, 255 - image))
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(image.shape[0] / 16))
        found.append(Outlier("lesion blurred away", f"blurred {index}", "test", np.asarray(blurred)))
        skin = np.median(image[:12].reshape(-1, 3), axis=0)
        grain = rng.normal(0.0, 3.0, (*image.shape[:2], 1))
        plain = np.clip(skin + grain, 0.0, 255.0).astype(np.uint8)
        found.append(Outlier("plain skin colour", f"plain {index}", "test", plain))
    return found


def prepared(image: Image.Image, geometry: InputGeometry) -> Rgb:
    """Pixels of a drawn image by the service's own code, by way of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return prepare_image(buffer.getvalue(), geometry, ARCHIVE_LIMITS).pixels


def _shipped(kind: str, names: tuple[str, ...]) -> Iterator[tuple[str, Image.Image]]:
    # Only who fits or measures p(UNK) needs the packages.
    from matplotlib import get_data_path  # noqa: PLC0415
    from skimage import data as skimage_data  # noqa: PLC0415

    for name in names:
        yield name, Image.fromarray(_as_rgb(getattr(skimage_data, name)()))
    if kind == "photograph":
        china, flower = map(Image.fromarray, load_sample_images().images)
        with Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")) as file:
            face = file.convert("RGB")
        yield from (("china", china), ("flower", flower), ("grace_hopper", face))


def _as_rgb(image: NDArray[np.generic]) -> Rgb:
    grey = (np.asarray(image) * 255).astype(np.uint8) if image.dtype == np.bool_ else np.asarray(image)
    stacked = np.stack([grey] * 3, axis=2) if grey.ndim == 2 else grey[:, :, :3]
    return np.ascontiguousarray(stacked, dtype=np.uint8)


def _view(image: Image.Image, rng: Rng) -> Image.Image:
    """A random crop of 40 to 100 % of each side, mirrored half of the time."""
    width, height = (max(40, round(side * rng.uniform(0.4, 1.0))) for side in image.size)
    left = int(rng.integers(0, max(1, image.width - width + 1)))
    top = int(rng.integers(0, max(1, image.height - height + 1)))
    view = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(view) if rng.random() < 0.5 else view


def _colour(rng: Rng) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return red, green, blue


def _skin(rng: Rng) -> NDArray[np.float64]:
    return np.asarray(np.array([228.0, 186.0, 162.0]) * rng.uniform(0.35, 1.08) + rng.uniform(-14.0, 14.0, 3))


def _image(canvas: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(canvas, 0.0, 255.0).astype(np.uint8))


def _cloud(rng: Rng, stretch: float = 1.0) -> NDArray[np.float64]:
    """Noise of several scales, 240×320×1, of mean 0 and deviation 1; `stretch` makes it a grain across the frame."""
    cloud = np.zeros((240, 320))
    for cells in 2 ** np.arange(2, 8):
        size = (max(2, int(cells / stretch)), int(cells))
        layer = Image.fromarray(rng.normal(size=size[::-1]).astype(np.float32)).resize(
            (320, 240), Image.Resampling.BICUBIC
        )
        cloud += np.asarray(layer) * rng.uniform(0.0, 1.0) / cells**0.5
    return ((cloud - cloud.mean()) / (cloud.std() + 1e-6))[..., None]


def _radius(rng: Rng, middle: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance from a point near the middle, 240×320, in units of half the height; and the angle."""
    y, x = np.mgrid[-1:1:240j, -4 / 3 : 4 / 3 : 320j]
    x, y = x - rng.normal(0.0, 0.1 + middle), y - rng.normal(0.0, 0.1 + middle)
    return np.hypot(x * rng.uniform(0.8, 1.25), y), np.arctan2(y, x)


def _edge(inside: NDArray[np.float64], softness: float) -> NDArray[np.float64]:
    """1 where `inside` is positive, 0 where negative, with a soft edge; H×W×1."""
    return (1.0 / (1.0 + np.exp(-np.clip(inside / softness, -50.0, 50.0))))[..., None]


def _noise(rng: Rng) -> Image.Image:
    cells = int(rng.integers(8, 256))
    grain = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(grain).resize((256, 256), Image.Resampling.BILINEAR)


def _plain(rng: Rng) -> Image.Image:
    return Image.new("RGB", (256, 256), _colour(rng))


def _gradient(rng: Rng) -> Image.Image:
    ends = rng.uniform(0.0, 255.0, (2, 3))
    ramp = np.linspace(0.0, 1.0, 256)[None, :, None]
    image = np.broadcast_to(ends[0] * (1.0 - ramp) + ends[1] * ramp, (256, 256, 3)).astype(np.uint8)
    return Image.fromarray(image).rotate(float(rng.choice([0.0, 90.0])))


def _document(rng: Rng) -> Image.Image:
    """Lines of text, at times in boxes, in print or on a screen."""
    dark = rng.random() < 0.3
    page = Image.new(
        "RGB", (400, 300), (20, 24, 30) if dark else tuple(int(c) for c in rng.integers(225, 256, 3))
    )
    draw = ImageDraw.Draw(page)
    ink = (225, 225, 225) if dark else (int(rng.integers(0, 70)),) * 3
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    for line in range(int(rng.integers(4, 18))):
        draw.text((12, 10 + 16 * line), "".join(rng.choice(letters, int(rng.integers(5, 61)))), fill=ink)
        if rng.random() < 0.15:
            draw.rectangle((8, 8 + 16 * line, int(rng.integers(100, 392)), 24 + 16 * line), outline=ink)
    return page


def _screen(rng: Rng) -> Image.Image:
    """Bars, panels, buttons, a curve: a program's window."""
    page = Image.new("RGB", (400, 300), tuple(int(c) for c in rng.choice([30, 240], 1).repeat(3)))
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, 400, int(rng.integers(12, 40))), fill=_colour(rng))
    for _ in range(int(rng.integers(2, 9))):
        x, y = int(rng.integers(0, 330)), int(rng.integers(30, 260))
        box = (x, y, x + int(rng.integers(30, 200)), y + int(rng.integers(14, 120)))
        draw.rounded_rectangle(box, 4, fill=_colour(rng), outline=_colour(rng))
        draw.text((x + 5, y + 2), f"{rng.integers(0, 10**6)} mg", fill=_colour(rng))
    heights = np.cumsum(rng.normal(0.0, 6.0, 40)) + 150.0
    draw.line([(10 * i, float(h)) for i, h in enumerate(heights)], fill=_colour(rng), width=2)
    return page


def _shapes(rng: Rng) -> Image.Image:
    canvas = Image.new("RGB", (256, 256), _colour(rng))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 12))):
        x, y, w, h = (int(v) for v in rng.integers(0, 200, 4))
        draw.rectangle((x, y, x + w, y + h), fill=_colour(rng))
    return canvas


def _round_thing(rng: Rng) -> Image.Image:
    """A ball, fruit, coin or button on a plain or mottled ground: round, of one hue, shaded from one side."""
    radius, angle = _radius(rng)
    size, hue, ground = rng.uniform(0.45, 0.95), rng.uniform(20.0, 250.0, 3), rng.uniform(0.0, 255.0, 3)
    shade = (
        1.0
        - 0.5 * (radius / size) ** 2
        + rng.uniform(0.0, 0.5) * radius * np.cos(angle - rng.uniform(0.0, 6.3))
    )
    body = hue * shade[..., None] + rng.uniform(0.0, 18.0) * _cloud(rng)
    for ring in rng.uniform(0.1, 1.0, int(rng.integers(0, 4))):
        body *= 1.0 - 0.4 * np.exp(-(((radius - ring * size) / 0.03) ** 2))[..., None]
    back = ground + rng.uniform(0.0, 30.0) * _cloud(rng, rng.uniform(1.0, 12.0))
    inside = _edge(size - radius, rng.uniform(0.005, 0.03))
    return _image(back + inside * (body - back))


def _eye(rng: Rng) -> Image.Image:
    """Lids, the white, a coloured iris with spokes, a pupil and a glint."""
    radius, angle = _radius(rng)
    y = radius * np.sin(angle)
    skin = _skin(rng) + 6.0 * _cloud(rng)
    white = np.array([225.0, 215.0, 210.0]) + 8.0 * _cloud(rng)
    spokes = 1.0 + 0.25 * np.cos(int(rng.integers(20, 60)) * angle)[..., None]
    iris = rng.uniform(20.0, 150.0, 3) * spokes
    size = rng.uniform(0.3, 0.55)
    canvas = white + _edge(size - radius, 0.01) * (iris - white)
    canvas = canvas * (1.0 - 0.95 * _edge(size * rng.uniform(0.3, 0.6) - radius, 0.01))
    canvas += 255.0 * _edge(0.07 - np.hypot(radius * np.cos(angle) - 0.1, y + 0.1), 0.01)
    open_lid = _edge(rng.uniform(0.35, 0.6) * (1.0 - (radius * np.cos(angle)) ** 2 / 1.5) - np.abs(y), 0.02)
    return _image(skin + open_lid * (canvas - skin))


def _texture(rng: Rng) -> Image.Image:
    """One hue, grained: cloth, wood, wall, fur."""
    return _image(rng.uniform(20.0, 235.0, 3) + rng.uniform(8.0, 40.0) * _cloud(rng, rng.uniform(1.0, 25.0)))


def _limb(rng: Rng) -> Image.Image:
    """Skin at arm's length: an arm, a hand or a cheek before cloth or a wall, shaded, with a small spot at times."""
    radius, angle = _radius(rng, 0.4)
    turn = rng.uniform(0.0, np.pi)
    across, along = radius * np.sin(angle - turn), radius * np.cos(angle - turn)
    half = rng.uniform(0.35, 1.3)
    bent = across - rng.normal(0.0, 0.15) * along**2
    skin = _skin(rng) * (1.0 - rng.uniform(0.2, 0.6) * (bent / half) ** 2)[..., None] + rng.uniform(
        1.0, 9.0
    ) * _cloud(rng)
    spot = _edge(rng.uniform(0.03, 0.22) - np.hypot(across, along) * (1.0 + 0.1 * _cloud(rng)[..., 0]), 0.01)
    skin = skin * (1.0 - spot * rng.uniform(0.0, 0.6) * np.array([0.5, 1.0, 1.0]))
    ground = rng.uniform(0.0, 255.0, 3) + rng.uniform(0.0, 40.0) * _cloud(rng, rng.uniform(1.0, 12.0))
    return _image(ground + _edge(half - np.abs(bent), rng.uniform(0.005, 0.04)) * (skin - ground))


def _mucosa(rng: Rng) -> Image.Image:
    """Endoscopy: red walls round a dark lumen, folds and glints."""
    radius, angle = _radius(rng, 0.2)
    folds = np.cos(
        rng.uniform(5.0, 14.0) * radius + rng.uniform(0.5, 2.0) * np.cos(int(rng.integers(2, 5)) * angle)
    )
    light = np.clip(rng.uniform(0.2, 0.5) + 0.7 * radius + 0.12 * folds, 0.0, 1.15)
    canvas = np.array([215.0, 105.0, 85.0]) * rng.uniform(0.8, 1.15, 3) * light[..., None] + 7.0 * _cloud(rng)
    return _image(canvas + 255.0 * _edge(_cloud(rng)[..., 0] - 2.2, 0.1))


def _radiograph(rng: Rng) -> Image.Image:
    """X-ray, tomogram or ultrasound: overlapping grey ellipses on black, with speckle."""
    canvas = np.zeros((240, 320, 1))
    for _ in range(int(rng.integers(3, 12))):
        radius, _angle = _radius(rng, 0.5)
        canvas += rng.uniform(-60.0, 110.0) * _edge(rng.uniform(0.1, 1.0) - radius, rng.uniform(0.01, 0.1))
    canvas = (canvas + rng.uniform(0.0, 50.0)) * (1.0 + rng.uniform(0.0, 0.4) * _cloud(rng))
    return _image(np.repeat(canvas, 3, axis=2))


def _painted_lesion(rng: Rng) -> Image.Image:
    """Soft brown blots on a skin tone: what a hand or a program paints when it is asked for a mole."""
    skin = np.array([228.0, 186.0, 162.0]) * rng.uniform(0.55, 1.08) + rng.uniform(-14.0, 14.0, 3)
    brown = skin * rng.uniform(0.25, 0.65) * np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.7, 1.0)])
    y, x = np.mgrid[0:240, 0:320].astype(np.float64)
    canvas = np.broadcast_to(skin, (240, 320, 3)).copy()
    for _ in range(int(rng.integers(1, 5))):
        angle = np.arctan2(y - 120.0, x - 160.0)
        radius = np.hypot((x - 160.0 - rng.normal(0.0, 14.0)) / rng.uniform(0.8, 1.5), y - 120.0)
        border = rng.uniform(25.0, 90.0) + rng.uniform(0.0, 9.0) * np.cos(int(rng.integers(2, 9)) * angle)
        canvas += _edge(border - radius, rng.uniform(1.0, 8.0)) * rng.uniform(0.4, 1.0) * (brown - canvas)
    spacing = rng.uniform(6.0, 30.0)
    mesh = np.cos(2 * np.pi * x / spacing) + np.cos(2 * np.pi * (0.5 * x + 0.87 * y) / spacing)
    canvas *= 1.0 - rng.uniform(0.0, 0.12) * np.clip(mesh, 0.0, 1.0)[..., None]
    return _image(canvas + rng.normal(0.0, rng.uniform(0.0, 5.0), canvas.shape))


DRAWINGS: dict[str, Callable[[Rng], Image.Image]] = {
    "noise": _noise,
    "plain colour": _plain,
    "gradient": _gradient,
    "document": _document,
    "screen": _screen,
    "shapes": _shapes,
    "round thing": _round_thing,
    "eye": _eye,
    "one-hued texture": _texture,
    "limb": _limb,
    "mucosa": _mucosa,
    "radiograph": _radiograph,
    "painted lesion": _painted_lesion,
}
