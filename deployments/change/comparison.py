"""Two decoded images of a lesion to numbers: registered, outlined, measured, and held against repeated captures.

No key, database or file: what is compared, and whether it may be, is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
import time
from typing import TypeVar

import cv2
import numpy as np

from deployments.change.metrics import METHOD, Aligned, Change, align, measure_colour, measure_shape
from deployments.change.registration import (
    LEAST_INLIERS,
    MOST_SCALE,
    MOST_SCALE_ERROR,
    Features,
    Fit,
    Mask,
    Rgb,
    dark_field,
    find_features,
    fit,
    make_frame,
    match,
    reduction,
)
from deployments.change.segmenter import Outline, OutlineDoubt, Segmenter
from model_store.segmenter import Limit, Repeatability
from serve_app.domain.comparison import (
    SIZES,
    Comparison,
    Hindrance,
    Measure,
    Metric,
    Obstacle,
    Registration,
    Verdict,
    Which,
    distance,
    hindrance,
)
from serve_app.domain.errors import ModelContractError

Result = TypeVar("Result")

_DOUBTS = {
    OutlineDoubt.NO_LESION: Obstacle.NO_LESION,
    OutlineDoubt.TOUCHES_FRAME: Obstacle.LESION_NOT_WHOLE,
    OutlineDoubt.SEVERAL_COMPONENTS: Obstacle.SEVERAL_LESIONS,
    OutlineDoubt.LOW_CONFIDENCE: Obstacle.OUTLINE_NOT_SURE,
}
_COLOURS = (Metric.COLOUR, Metric.FOCAL_COLOUR)
_RIM = 5  # pixels of the frame: a lesion so near to the dark field may go on under it


@dataclass(frozen=True, slots=True)
class Capture:
    """One image, ready to be compared with others: its frame, what of it is dark, its features and its lesion.

    `sharpness`: variance of the frame's Laplacian. `reduction`: pixels of the frame for one that was given.
    """

    frame: Rgb
    field: Mask
    features: Features
    outline: Outline
    sharpness: float
    reduction: float

    @property
    def obstacles(self) -> tuple[Obstacle, ...]:
        """What keeps its lesion from being measured."""
        found = [_DOUBTS[doubt] for doubt in self.outline.doubts]
        near = cv2.dilate(self.field.astype(np.uint8), np.ones((2 * _RIM + 1,) * 2, np.uint8)) > 0
        if Obstacle.LESION_NOT_WHOLE not in found and (near & self.outline.mask).any():
            found.append(Obstacle.LESION_NOT_WHOLE)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Examined:
    """A pair before it is judged: nothing but what was measured.

    `aligned` is None where the two do not register or a lesion cannot be measured.
    """

    fit: Fit | None
    hindrances: tuple[Hindrance, ...]
    changes: Mapping[Metric, Change]
    aligned: Aligned | None
    sharpness: float

    @property
    def scale(self) -> float:
        """The ratio of the magnifications, 1 or more."""
        return max(self.fit.scale, 1.0 / self.fit.scale) if self.fit else float("inf")


class Comparer:
    """Compares images by a segmenter and the repeatability that was measured with it. Safe to call from several threads."""

    def __init__(self, segmenter: Segmenter, repeatability: Repeatability) -> None:
        """Raises ModelContractError when the limits were measured by another method."""
        if repeatability.method != METHOD:
            raise ModelContractError(
                f"The repeatability is of method {repeatability.method}, this is {METHOD}: measure it anew."
            )
        self._segmenter, self._repeatability = segmenter, repeatability

    def compare(
        self, earlier: Rgb, later: Rgb, mm_per_pixel: tuple[float, float] | None = None
    ) -> Comparison:
        """Compare two decoded images, uint8 H×W×3 at true aspect; `mm_per_pixel` of each, if the devices say it."""
        clock: dict[str, float] = {}
        before, after = (capture(pixels, self._segmenter, clock) for pixels in (earlier, later))
        found = examine(before, after, mm_per_pixel, clock)
        return judge(found, self._repeatability, clock)


def capture(pixels: Rgb, segmenter: Segmenter, clock: dict[str, float] | None = None) -> Capture:
    """Prepare an image; `clock` is told the milliseconds of each step."""
    clock = {} if clock is None else clock
    frame = make_frame(pixels)
    features = _timed(clock, "features", lambda: find_features(frame))
    outline = _timed(clock, "outline", lambda: segmenter.outline(frame))
    sharpness = float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())
    return Capture(frame, dark_field(frame), features, outline, sharpness, reduction(pixels))


def examine(
    earlier: Capture,
    later: Capture,
    mm_per_pixel: tuple[float, float] | None = None,
    clock: dict[str, float] | None = None,
) -> Examined:
    """Register two captures and measure what can be measured."""
    clock = {} if clock is None else clock
    sharpness = min(earlier.sharpness, later.sharpness)
    found = _timed(clock, "registration", lambda: fit(match(earlier.features, later.features)))
    hindrances = list(_hindrances(found, earlier, later))
    if found is None or hindrances:
        return Examined(found, tuple(hindrances), {}, None, sharpness)

    def measure() -> tuple[dict[Metric, Change], Aligned]:
        lesions = earlier.outline.mask, later.outline.mask
        aligned = align((earlier.frame, later.frame), lesions, (earlier.field, later.field), found)
        return {**measure_shape(*lesions, found), **measure_colour(aligned)}, aligned

    changes, aligned = _timed(clock, "metrics", measure)
    if mm_per_pixel is not None:
        before, after = mm_per_pixel[0] / earlier.reduction, mm_per_pixel[1] / later.reduction
        for metric, power in ((Metric.AREA, 2), (Metric.DIAMETER, 1)):
            changes[metric] = _in_millimetres(changes[metric], before**power, (after * found.scale) ** power)
    else:
        changes |= {metric: replace(changes[metric], earlier=None, later=None) for metric in SIZES}
    if mm_per_pixel is None and found.scale_error > MOST_SCALE_ERROR:
        changes = {metric: change for metric, change in changes.items() if metric not in SIZES}
        hindrances.append(hindrance(Obstacle.SCALE_NOT_KNOWN, None, tuple(SIZES)))
    if Metric.COLOUR not in changes:
        hindrances.append(hindrance(Obstacle.SKIN_NOT_VISIBLE, None, _COLOURS))
    return Examined(found, tuple(hindrances), changes, aligned, sharpness)


def _hindrances(found: Fit | None, earlier: Capture, later: Capture) -> Iterable[Hindrance]:
    """Why nothing can be measured."""
    if found is None or found.inliers < LEAST_INLIERS:
        yield hindrance(Obstacle.TOO_FEW_MATCHES)
    elif not 1.0 / MOST_SCALE <= found.scale <= MOST_SCALE:
        yield hindrance(Obstacle.SCALE_TOO_DIFFERENT)
    for which, image in ((Which.EARLIER, earlier), (Which.LATER, later)):
        for obstacle in image.obstacles:
            yield hindrance(obstacle, which)


def _in_millimetres(change: Change, earlier_unit: float, later_unit: float) -> Change:
    """A size by the devices' own scale; the units are of one pixel of the earlier frame, as each device sees it."""
    before, after = (change.earlier or 0.0) * earlier_unit, (change.later or 0.0) * later_unit
    return Change(before, after, after / before)


def judge(found: Examined, repeatability: Repeatability, clock: Mapping[str, float]) -> Comparison:
    """Hold what was measured against the limits of pairs like this one."""
    registered = found.fit is not None and found.fit.inliers >= LEAST_INLIERS
    stratum = repeatability.stratum(found.scale, found.sharpness) if found.changes else None
    return Comparison(
        Registration(found.fit.similarity(), found.fit.inliers, found.fit.scale_error)
        if found.fit is not None and registered
        else None,
        tuple(
            _judged(metric, change, stratum.limits[metric])
            for metric, change in found.changes.items()
            if stratum is not None
        ),
        found.hindrances,
        stratum.name if stratum else None,
        repeatability.source,
        {name: round(spent, 1) for name, spent in clock.items()},
    )


def _judged(metric: Metric, change: Change, limit: Limit) -> Measure:
    # The interval's upper end: what the captures were too few to tell is no change of the lesion.
    beyond = distance(metric, change.change) > limit.high
    verdict = Verdict.BEYOND_REPEATABILITY if beyond else Verdict.WITHIN
    interval = limit.low, limit.high
    return Measure(metric, change.earlier, change.later, change.change, limit.limit, interval, verdict)


def _timed(clock: dict[str, float], step: str, call: Callable[[], Result]) -> Result:
    started = time.perf_counter()
    result = call()
    clock[step] = clock.get(step, 0.0) + 1e3 * (time.perf_counter() - started)
    return result
