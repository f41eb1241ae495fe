"""UNK: how far a bottleneck lies from every class trained on, how that becomes p(UNK), and what it is held against.

The outliers are photographs shipped with scikit-image and scikit-learn, text, noise, gradients, plain colours, painted
lesions and inverted ones. Each source image is in one of two disjoint parts: `fit` for the direction and the logistic
map, `test` for the figures told of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn import covariance
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions, served
from data_jobs.training.probabilities import Floats, Labels, area_under_curve, rounded
from data_jobs.training.scan import Run, scan_pixels
from deployments.classifier.calibration import Calibrator, ood_score, unknown_probability
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image

#: Shares of a covariance replaced by a multiple of the identity: within classes, and to find the direction.
WITHIN_SHRINKAGE = 0.001
DIRECTION_SHRINKAGE = 0.01
#: Where the anchor of the direction lies: so many standard deviations on the far side of the known images.
ANCHOR = 6.0
#: Weight of the class distance beside the direction.
CLASS_WEIGHT = 0.25
#: How often an upload is taken to be no dermoscopic image of a trained class, before it is seen.
PRIOR_UNKNOWN = 0.05
#: How many lesions of a fold are inverted, blurred away and painted over.
SPOILT = 100


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """Anchored class means C×512 and the shared precision 512×512, float32."""

    means: NDArray[np.float32]
    precision: NDArray[np.float32]

    def score(self, features: NDArray[np.floating]) -> Floats:
        """Out-of-distribution score of N×512 bottlenecks, by the served code."""
        return ood_score(*(np.asarray(part, np.float64) for part in (features, self.means, self.precision)))


def shrunk_covariance(residuals: NDArray[np.floating], shrinkage: float) -> Floats:
    """(1 - a) * S + a * mean(diag S) * I, of N×D residuals (Ledoit and Wolf 2004's target)."""
    residuals = np.asarray(residuals, np.float64)
    return np.asarray(covariance.shrunk_covariance(residuals.T @ residuals / len(residuals), shrinkage))


def class_means(features: NDArray[np.floating], labels: Labels) -> Floats:
    """C×D means; every class must have an image."""
    classes = range(int(labels.max()) + 1)
    return np.stack([np.asarray(features[labels == c], np.float64).mean(0) for c in classes])


def outlier_direction(
    features: NDArray[np.floating], labels: Labels, outliers: NDArray[np.floating]
) -> Floats:
    """Fisher's discriminant between known images and outliers, scaled to unit deviation over the known.

    The network was never told of anything but lesions, so that plain colours and text land
    *inside* its classes; one direction of the same bottleneck tells them apart. Every class weighs the
    same: by images the direction is that between naevi and all else, and takes vascular lesions for outliers.
    """
    known, other = np.asarray(features, np.float64), np.asarray(outliers, np.float64)
    counts = np.bincount(labels)
    weights = 1.0 / counts[labels] / len(counts)
    known_mean, other_mean = weights @ known, other.mean(0)
    residuals = (known - known_mean) * np.sqrt(weights * len(known))[:, None]
    within = (
        shrunk_covariance(residuals, DIRECTION_SHRINKAGE)
        + shrunk_covariance(other - other_mean, DIRECTION_SHRINKAGE)
    ) / 2.0
    direction = np.linalg.solve(within, other_mean - known_mean)
    return np.asarray(direction / (known @ direction).std())


def fit_statistics(
    features: NDArray[np.floating], labels: Labels, outliers: NDArray[np.floating]
) -> ClassStatistics:
    """Means and precision from the training folds' bottlenecks, N×512, and outliers', M×512.

    The squared distance is the sum of two: to the class means under the shared covariance, and
    along `outlier_direction` from an anchor ANCHOR deviations on the far side of the known
    images, so that it grows towards the outliers over the whole range.
    """
    known = np.asarray(features, np.float64)
    means = class_means(features, labels)
    within = shrunk_covariance(known - means[labels], WITHIN_SHRINKAGE)
    direction = outlier_direction(features, labels, outliers)
    # The shift of the means that moves them along the direction and nothing else, as the data vary.
    total = shrunk_covariance(known - known.mean(0), WITHIN_SHRINKAGE)
    shift = total @ direction / (direction @ total @ direction)
    anchor = float((known @ direction).mean()) - ANCHOR
    anchored = means + np.outer(anchor - means @ direction, shift)
    width = known.shape[1]
    precision = CLASS_WEIGHT * np.linalg.inv(within) + np.outer(direction, direction) * width / ANCHOR**2
    return ClassStatistics(anchored.astype(np.float32), precision.astype(np.float32))


def fit_logistic(known: Floats, unknown: Floats, prior: float = PRIOR_UNKNOWN) -> tuple[float, float]:
    """(slope, intercept) of p(UNK) = sigmoid(slope * score + intercept).

    Weighted maximum likelihood: the outliers weigh `prior` together, the known images the rest, so that p(UNK) is a
    probability for a stream with that prior and not for a set of outliers we happened to draw. A small ridge keeps the
    slope finite when the two do not overlap.
    """
    scores = np.concatenate([known, unknown])
    target = np.concatenate([np.zeros(len(known)), np.ones(len(unknown))])
    weights = np.where(target > 0, prior / len(unknown), (1.0 - prior) / len(known)) * len(scores)
    centre, scale = float(known.mean()), float(known.std())
    fitted = LogisticRegression(C=10.0, solver="newton-cholesky", tol=1e-10, max_iter=200)
    fitted.fit(((scores - centre) / scale)[:, None], target, weights)
    slope = float(fitted.coef_[0, 0]) / scale
    return slope, float(fitted.intercept_[0]) - slope * centre


Part = Literal["fit", "test"]
Rgb = NDArray[np.uint8]

# Alternate, so that each part has faces, textures, objects and medical images that are not skin.
_PHOTOGRAPHS = (
    "astronaut", "coffee", "camera", "chelsea", "brick", "grass", "gravel", "coins", "rocket", "page",
    "immunohistochemistry", "retina", "cell", "moon", "text", "clock", "horse", "hubble_deep_field",
    "colorwheel", "logo",
)  # fmt: skip
_VIEWS = 8
_DRAWN = 20


@dataclass(frozen=True, slots=True)
class Outlier:
    """One outlier: what it is, the part it belongs to, and its prepared pixels side×side×3."""

    kind: str
    part: Part
    pixels: Rgb


def make_outliers(geometry: InputGeometry, seed: int) -> list[Outlier]:
    """Several hundred outliers; equal for equal seeds."""
    rng = np.random.default_rng(seed)
    found: list[Outlier] = []
    for index, image in enumerate(_photographs()):
        part: Part = "fit" if index % 2 == 0 else "test"
        views = [_view(image, rng) for _ in range(_VIEWS)]
        found += [Outlier("photograph", part, prepared(view, geometry)) for view in views]
    for kind, draw in _DRAWINGS.items():
        for index in range(_DRAWN):
            part = "fit" if index % 2 == 0 else "test"
            found.append(Outlier(kind, part, prepared(draw(rng), geometry)))
    return found


def skin_like(pixels: Rgb, seed: int) -> list[Outlier]:
    """Made from N lesions: inverted (both parts); blurred away and plain skin, which are never fitted on."""
    rng = np.random.default_rng(seed)
    found = []
    for index, image in enumerate(pixels):
        part: Part = "fit" if index % 2 == 0 else "test"
        found.append(Outlier("inverted lesion", part, 255 - image))
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(image.shape[0] / 16))
        found.append(Outlier("lesion blurred away", "test", np.asarray(blurred)))
        skin = np.median(image[:12].reshape(-1, 3), axis=0)
        grain = rng.normal(0.0, 3.0, (*image.shape[:2], 1))
        plain = np.clip(skin + grain, 0.0, 255.0).astype(np.uint8)
        found.append(Outlier("plain skin colour", "test", plain))
    return found


def prepared(image: Image.Image, geometry: InputGeometry) -> Rgb:
    """Pixels of a drawn image by the service's own code, by way of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return prepare_image(buffer.getvalue(), geometry, ARCHIVE_LIMITS).pixels


def _photographs() -> list[Image.Image]:
    # Only who fits or measures p(UNK) needs the package.
    from skimage import data as skimage_data  # noqa: PLC0415

    images = [Image.fromarray(_as_rgb(getattr(skimage_data, name)())) for name in _PHOTOGRAPHS]
    return images + [Image.fromarray(image) for image in load_sample_images().images]


def _as_rgb(image: NDArray[np.generic]) -> Rgb:
    grey = (np.asarray(image) * 255).astype(np.uint8) if image.dtype == np.bool_ else np.asarray(image)
    stacked = np.stack([grey] * 3, axis=2) if grey.ndim == 2 else grey[:, :, :3]
    return np.ascontiguousarray(stacked, dtype=np.uint8)


def _view(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random crop of 40 to 100 % of each side, mirrored half of the time."""
    width, height = (max(40, round(side * rng.uniform(0.4, 1.0))) for side in image.size)
    left = int(rng.integers(0, max(1, image.width - width + 1)))
    top = int(rng.integers(0, max(1, image.height - height + 1)))
    view = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(view) if rng.random() < 0.5 else view


def _noise(rng: np.random.Generator) -> Image.Image:
    cells = int(rng.integers(8, 256))
    grain = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    return Image.fromarray(grain).resize((256, 256), Image.Resampling.BILINEAR)


def _plain(rng: np.random.Generator) -> Image.Image:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return Image.new("RGB", (256, 256), (red, green, blue))


def _gradient(rng: np.random.Generator) -> Image.Image:
    ends = rng.uniform(0.0, 255.0, (2, 3))
    ramp = np.linspace(0.0, 1.0, 256)[None, :, None]
    image = np.broadcast_to(ends[0] * (1.0 - ramp) + ends[1] * ramp, (256, 256, 3)).astype(np.uint8)
    return Image.fromarray(image).rotate(float(rng.choice([0.0, 90.0])))


def _text(rng: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (400, 300), "white")
    draw = ImageDraw.Draw(page)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    for line in range(int(rng.integers(4, 18))):
        draw.text((12, 10 + 16 * line), "".join(rng.choice(letters, 60)), fill="black")
    return page


def _shapes(rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("RGB", (256, 256), tuple(int(c) for c in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(3, 12))):
        x, y, w, h = (int(v) for v in rng.integers(0, 200, 4))
        draw.rectangle((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return canvas


def _painted_lesion(rng: np.random.Generator) -> Image.Image:
    """Soft brown blots on a skin tone: what a hand or a program paints when it is asked for a mole."""
    skin = np.array([228.0, 186.0, 162.0]) * rng.uniform(0.55, 1.08) + rng.uniform(-14.0, 14.0, 3)
    brown = skin * rng.uniform(0.25, 0.65) * np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.7, 1.0)])
    y, x = np.mgrid[0:240, 0:320].astype(np.float64)
    canvas = np.broadcast_to(skin, (240, 320, 3)).copy()
    for _ in range(int(rng.integers(1, 5))):
        angle = np.arctan2(y - 120.0, x - 160.0)
        radius = np.hypot((x - 160.0 - rng.normal(0.0, 14.0)) / rng.uniform(0.8, 1.5), y - 120.0)
        border = rng.uniform(25.0, 90.0) + rng.uniform(0.0, 9.0) * np.cos(int(rng.integers(2, 9)) * angle)
        inside = 1.0 / (1.0 + np.exp(np.clip((radius - border) / rng.uniform(1.0, 8.0), -50.0, 50.0)))
        canvas += (inside * rng.uniform(0.4, 1.0))[..., None] * (brown - canvas)
    spacing = rng.uniform(6.0, 30.0)
    mesh = np.cos(2 * np.pi * x / spacing) + np.cos(2 * np.pi * (0.5 * x + 0.87 * y) / spacing)
    canvas *= 1.0 - rng.uniform(0.0, 0.12) * np.clip(mesh, 0.0, 1.0)[..., None]
    canvas += rng.normal(0.0, rng.uniform(0.0, 5.0), canvas.shape)
    return Image.fromarray(np.clip(canvas, 0.0, 255.0).astype(np.uint8))


_DRAWINGS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "plain colour": _plain,
    "gradient": _gradient,
    "text": _text,
    "shapes": _shapes,
    "painted lesion": _painted_lesion,
}


def outlier_figures(
    known: Floats, outliers: list[Outlier], scores: Floats, slope: float, intercept: float
) -> dict[str, Any]:
    """AUROC against the calibration fold, and p(UNK), of every kind of outlier in the test part."""
    figures = {}
    kinds = {outlier.kind for outlier in outliers if outlier.part == "test"}
    for kind in [*sorted(kinds), "all"]:
        picked = np.array([o.part == "test" and kind in {o.kind, "all"} for o in outliers])
        both = np.concatenate([known, scores[picked]])
        positive = np.arange(len(both)) >= len(known)
        p = unknown_probability(scores[picked], slope, intercept)
        figures[kind] = {
            "images": int(picked.sum()),
            "auroc": rounded(area_under_curve(both, positive)),
            "median_score": rounded(np.median(scores[picked])),
            "median_p_unk": rounded(np.median(p)),
            "share_p_unk_over_half": rounded((p > 0.5).mean()),
        }
    return figures


def unknown_figures(
    run: Run,
    calibrator: Calibrator,
    predictions: Predictions,
    lesions: NDArray[np.uint8],
    geometry: InputGeometry,
    seed: int,
) -> dict[str, Any]:
    """AUROC against the fold's images and p(UNK) of every kind.

    `lesions` are prepared images of this fold, uint8 N×side×side×3. Photographs and drawings are
    of the part never fitted on; `skin_like` are made of `lesions`, none of which was fitted on.
    """

    def figures(outliers: list[Outlier]) -> dict[str, Any]:
        _, scores = served(calibrator, scan_pixels(run, np.stack([o.pixels for o in outliers])))
        return outlier_figures(predictions.scores, outliers, scores, calibrator.slope, calibrator.intercept)

    drawn = [outlier for outlier in make_outliers(geometry, seed) if outlier.part == "test"]
    spoilt = [replace(outlier, part="test") for outlier in skin_like(lesions, seed)]
    nine = predictions.nine
    return {
        "unk_share": rounded((nine.argmax(1) == UNKNOWN).mean()),
        "median_p_unk": rounded(np.median(nine[:, UNKNOWN]), 6),
        "outliers": figures(drawn),
        "skin_like": figures(spoilt),
    }
