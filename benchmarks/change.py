"""What the comparison of two images is worth: `python -m benchmarks.change --workers 2 > change.json`.

On fold 0, on which nothing was fitted: how many repeated captures can be compared, how well outlines lie on each other
(against leaving the images as they are), how often an unchanged lesion is called changed, how often different lesions
register, how many injected changes are found, and what a dark field, ink or another white balance does.
Changes are put into real second captures: they carry what real captures differ by.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from data_jobs.training.evaluation.robustness import CLUTTER
from data_jobs.training.probabilities import rounded
from data_jobs.training.repeatability import (
    ALIKE_SCALE,
    NEAR_IDENTICAL,
    Picture,
    archive_pictures,
    repeated,
)
from data_jobs.training.segmenter.evaluate import overlap
from data_jobs.training.segmenter.masks import read_mask
from deployments.change.comparison import Capture, Examined, capture, examine, judge
from deployments.change.registration import (
    LEAST_INLIERS,
    MOST_SCALE,
    Features,
    Mask,
    Rgb,
    find_features,
    fit,
    make_frame,
    match,
)
from deployments.change.segmenter import Segmenter
from model_store.segmenter import Repeatability, open_segmenter
from serve_app.domain.comparison import SIZES, Metric

Rng = np.random.Generator
Alter = Callable[[Rgb, Mask, Rng], Rgb]
#: So much of the distance from a lesion's border to its middle is drawn outwards when the border advances.
RIM = 0.3
COLOURS = frozenset({Metric.COLOUR, Metric.FOCAL_COLOUR})


def grown(frame: Rgb, lesion: Mask, rng: Rng, *, by: float, depth: float = RIM) -> Rgb:
    """The lesion with an area `by` times as large: its rim is drawn out over the skin, what lies deeper stays.

    `depth` 1 draws all of it out, its middle too.
    """
    del rng
    solid = lesion.astype(np.uint8)
    inside, outside = (cv2.distanceTransform(m, cv2.DIST_L2, 5) for m in (solid, 1 - solid))
    away = cv2.GaussianBlur(np.where(lesion, 0.5 - inside, outside - 0.5), (0, 0), 2.0)
    low, high = 0.0, float(away.max())
    for _ in range(30):
        middle = (low + high) / 2.0
        low, high = (middle, high) if (away < middle).sum() < by * lesion.sum() else (low, middle)
    rim = -depth * float(away.min())
    beyond = high + 2.0 * rim
    # From the distance to the old border where something shall be, to that where it comes from.
    source = np.interp(away, [-rim, high, beyond], [-rim, 0.0, beyond], left=np.nan, right=np.nan)
    shift = np.nan_to_num(away - source)
    down, across = np.gradient(away)
    length = np.maximum(np.hypot(down, across), 1e-3)
    y, x = np.indices(away.shape, np.float32)
    at = (x - shift * across / length).astype(np.float32), (y - shift * down / length).astype(np.float32)
    return np.asarray(cv2.remap(frame, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.uint8)


def darkened(frame: Rgb, lesion: Mask, rng: Rng, *, to: float = 0.6, share: float = 1 / 3) -> Rgb:
    """A third of the lesion, to one side, with so much of its light left; soft at its edge."""
    turn = rng.uniform(0.0, 2.0 * np.pi)
    y, x = np.indices(lesion.shape)
    along = x * np.cos(turn) + y * np.sin(turn)
    part = lesion & (along > np.quantile(along[lesion], 1.0 - share))
    soft = cv2.GaussianBlur(part.astype(np.float32), (0, 0), 3.0)[..., None]
    return np.asarray(np.clip(frame * (1.0 - (1.0 - to) * soft), 0, 255), np.uint8)


def cluttered(frame: Rgb, lesion: Mask, rng: Rng, *, kind: str) -> Rgb:
    """Clutter, drawn by other code than the training's, on a square with the frame in its middle."""
    del lesion
    side = max(frame.shape[:2])
    canvas = Image.new("RGB", (side, side), (200, 170, 160))
    at = (side - frame.shape[1]) // 2, (side - frame.shape[0]) // 2
    canvas.paste(Image.fromarray(frame), at)
    drawn = CLUTTER[kind](canvas, rng)
    return np.asarray(drawn.crop((*at, at[0] + frame.shape[1], at[1] + frame.shape[0])))


@dataclass(frozen=True, slots=True)
class Injection:
    """A change that is put into the second image, and the metrics of which one should say so."""

    alter: Alter
    found_by: frozenset[Metric]


CHANGES = {
    **{f"area +{g} %": Injection(partial(grown, by=1 + g / 100), SIZES) for g in (20, 40, 100)},
    **{
        f"area +{g} %, all of it stretched": Injection(partial(grown, by=1 + g / 100, depth=1.0), SIZES)
        for g in (20, 40, 100)
    },
    "a third darkened to 60 %": Injection(darkened, COLOURS),
    "a third darkened to 75 %": Injection(partial(darkened, to=0.75), COLOURS),
}
CLUTTERS = ("round dark field", "ink strokes", "ink ring", "colour cast")


@dataclass(frozen=True, slots=True)
class Case:
    """Two captures of one lesion, compared."""

    pictures: tuple[Picture, Picture]
    captures: tuple[Capture, Capture]
    found: Examined
    beyond: tuple[Metric, ...]

    @property
    def distinct(self) -> bool:
        """Compared, and two photographs."""
        return self.found.aligned is not None and self.found.aligned.likeness < NEAR_IDENTICAL


def compare_pictures(pictures: tuple[Picture, Picture], segmenter: Segmenter, limits: Repeatability) -> Case:
    """Compare as the service does."""
    earlier, later = (capture(picture.read(), segmenter) for picture in pictures)
    found = examine(earlier, later)
    return Case(pictures, (earlier, later), found, judge(found, limits, {}).beyond)


def comparable_figures(cases: Sequence[Case]) -> dict[str, Any]:
    """How many repeated captures can be compared, and what hinders the others."""
    whole = [case for case in cases if case.found.changes]
    hindrances = Counter(name for case in cases for name in {h.obstacle.value for h in case.found.hindrances})
    lesions = {case.pictures[0].lesion for case in cases}
    return {
        "lesions": len(lesions),
        "lesions_comparable": rounded(len({case.pictures[0].lesion for case in whole}) / len(lesions)),
        "pairs": len(cases),
        "registered": rounded(np.mean([_registers(case.found) for case in cases])),
        "comparable": rounded(len(whole) / len(cases)),
        "near_identical": len(whole) - sum(case.distinct for case in cases),
        "hindrances": dict(hindrances.most_common()),
    }


def _registers(found: Examined) -> bool:
    return found.fit is not None and found.fit.inliers >= LEAST_INLIERS and found.scale <= MOST_SCALE


def repeat_figures(cases: Sequence[Case]) -> dict[str, Any]:
    """Which share of unchanged lesions is called changed, by metric and by any, and spreads of ln(area) by magnification."""
    measured = Counter(metric for case in cases for metric in case.found.changes)
    beyond = Counter(metric for case in cases for metric in case.beyond)
    spreads = {}
    for low, high in ((1.0, ALIKE_SCALE), (ALIKE_SCALE, MOST_SCALE)):
        logs = [
            np.log(case.found.changes[Metric.AREA].change)
            for case in cases
            if Metric.AREA in case.found.changes and low <= case.found.scale < high
        ]
        spreads[f"magnification {low} to {high}"] = {"pairs": len(logs), "sd_ln_area": rounded(np.std(logs))}
    return {
        "pairs": len(cases),
        "beyond": {metric.value: rounded(beyond[metric] / max(1, measured[metric])) for metric in Metric},
        "any": rounded(np.mean([bool(case.beyond) for case in cases])),
        "spread": spreads,
    }


def overlap_figures(cases: Sequence[Case], rows: dict[str, LabelledImage], folder: Path) -> dict[str, Any]:
    """IoU of the experts' masks and of our outlines, as they lie and aligned, in what both images show."""
    found: dict[str, list[float]] = {
        name: [] for name in ("experts", "experts_unaligned", "ours", "ours_unaligned")
    }
    for case in cases:
        fitted, aligned = case.found.fit, case.found.aligned
        if fitted is None or aligned is None:
            continue
        size = case.captures[0].frame.shape[1::-1]
        masks = [
            _expert(rows[p.path.stem], folder, c) for p, c in zip(case.pictures, case.captures, strict=True)
        ]
        ours = [c.outline.mask.astype(np.uint8) for c in case.captures]
        for name, (before, after) in (("experts", masks), ("ours", ours)):
            moved = cv2.warpAffine(after, fitted.matrix, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)
            laid = cv2.resize(after, size, interpolation=cv2.INTER_NEAREST)
            found[name].append(overlap((before > 0) & aligned.seen, (moved > 0) & aligned.seen))
            found[f"{name}_unaligned"].append(overlap(before > 0, laid > 0))
    return {name: {"mean": rounded(np.mean(x)), "median": rounded(np.median(x))} for name, x in found.items()}


def _expert(row: LabelledImage, folder: Path, seen: Capture) -> NDArray[np.uint8]:
    mask = cv2.resize(read_mask(row, folder, 256), seen.frame.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return (np.asarray(mask) > 127).astype(np.uint8)


def altered(
    case: Case, alter: Alter, seed: int, segmenter: Segmenter, limits: Repeatability
) -> tuple[Metric, ...] | None:
    """What is beyond with the second image altered; None when the two cannot be compared then."""
    earlier, later = case.captures
    frame = alter(later.frame, later.outline.mask, np.random.default_rng(seed))
    found = examine(earlier, capture(frame, segmenter))
    return judge(found, limits, {}).beyond if found.changes else None


def stranger_figures(
    pictures: Sequence[Picture], pairs: int, seed: int, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """How many pairs of different lesions register."""
    features: list[Features] = list(
        pool.map(lambda picture: find_features(make_frame(picture.read())), pictures)
    )
    rng = np.random.default_rng(seed)
    drawn: list[tuple[int, int]] = []
    while len(drawn) < pairs:
        i, j = rng.integers(len(pictures), size=2)
        if pictures[i].lesion != pictures[j].lesion:
            drawn.append((i, j))
    fits = list(pool.map(lambda ij: fit(match(features[ij[0]], features[ij[1]])), drawn))
    inliers = np.array([found.inliers if found else 0 for found in fits])
    scales = np.array([found.scale if found else 0.0 for found in fits])
    held = (inliers >= LEAST_INLIERS) & (scales <= MOST_SCALE) & (scales >= 1.0 / MOST_SCALE)
    quantiles = np.quantile(inliers, (0.5, 0.95, 0.99, 0.999, 1.0)).tolist()
    return {
        "pairs": pairs,
        "registered": rounded(held.mean()),
        "inliers": dict(zip(("p50", "p95", "p99", "p99.9", "most"), quantiles, strict=True)),
    }


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--segmenter", type=Path, help="its folder; default: the one that ships")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1, help="to try things out: every so many pairs")
    parser.add_argument("--injected", type=int, default=300, help="into how many pairs each change is put")
    parser.add_argument("--strangers", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    stored = open_segmenter(arguments.segmenter or next(Path("model_store/segmenters").iterdir()))
    limits = stored.repeatability
    if limits is None:
        parser.error("The segmenter's repeatability has not been measured.")
    segmenter, folder = Segmenter(stored, threads=1), isic_folder()
    if not (folder / "train.csv").exists() or not any((folder / "images").glob("*.jpg")):
        parser.exit(2, f"No images in {folder / 'images'}; set DERM_ISIC_DIR.\n")
    rows = read_rows(folder)
    pictures = list(archive_pictures(rows, folder, (0,)))
    pairs = repeated(pictures)[:: arguments.stride]
    report: dict[str, Any] = {}
    with ThreadPoolExecutor(arguments.workers) as pool:
        cases = list(pool.map(lambda pair: compare_pictures(pair, segmenter, limits), pairs))
        distinct = [case for case in cases if case.distinct]
        report["comparable"] = comparable_figures(cases)
        report["overlap"] = overlap_figures(cases, {row.isic_id: row for row in rows}, folder)
        report["unchanged"] = repeat_figures(distinct)
        chosen = distinct[: arguments.injected]
        quiet = [case for case in chosen if not case.beyond]
        report["changes"], report["clutter"] = {}, {}
        for name, injection in CHANGES.items():
            asked = enumerate([case for case in chosen if case.found.scale >= 1.05])
            after = list(pool.map(lambda x: altered(x[1], injection.alter, x[0], segmenter, limits), asked))  # noqa: B023 - done before the next
            compared = [beyond for beyond in after if beyond is not None]
            report["changes"][name] = {
                "pairs": len(after),
                "comparable": rounded(len(compared) / max(1, len(after))),
                "found": rounded(np.mean([bool(injection.found_by & set(b)) for b in compared])),
            }
        for kind in CLUTTERS:
            alter = partial(cluttered, kind=kind)
            after = list(pool.map(lambda x: altered(x[1], alter, x[0], segmenter, limits), enumerate(quiet)))  # noqa: B023
            compared = [beyond for beyond in after if beyond is not None]
            report["clutter"][kind] = {
                "pairs": len(after),
                "comparable": rounded(len(compared) / max(1, len(after))),
                "beyond_of_all": rounded(sum(map(bool, compared)) / max(1, len(after))),
                "beyond_of_compared": rounded(np.mean([bool(b) for b in compared])),
                "metrics": dict(Counter(m.value for b in compared for m in b)),
            }
        firsts = list({picture.lesion: picture for picture in pictures}.values())
        # Ten pairs of an image.
        spread = firsts[:: max(1, len(firsts) // max(2, arguments.strangers // 10))]
        report["strangers"] = stranger_figures(spread, arguments.strangers, arguments.seed, pool)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
