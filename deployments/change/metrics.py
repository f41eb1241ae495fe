"""What is measured of a lesion on two registered images: size, shape, and colour relative to the skin around it.

Sizes and shapes are each image's own, divided by its scale: a lesion is not cut by the other's frame. Colours are
compared place by place, in the earlier image's frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from deployments.change.registration import Fit, Mask, Rgb
from serve_app.domain.comparison import Metric

Floats = NDArray[np.float64]

#: Changed whenever a metric's numbers may: limits measured by another method do not hold for it.
METHOD = 1
#: The ring of skin, from and to, in radii of a circle of the lesion's area from its edge.
_RING = (0.1, 0.6)
#: What of that ring both images must show.
_LEAST_RING = 0.25
#: Colours are averaged over so much of the lesion's radius: what remains of misplacement is no change of colour.
_BLUR = 0.12
#: The share of the lesion that exceeds the focal change: a place, not a pixel.
_FOCAL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of each image where it has a value of its own, and what lies between them, as Metric says.

    Of sizes, in pixels of the earlier frame.
    """

    earlier: float | None
    later: float | None
    change: float


@dataclass(frozen=True, slots=True)
class Shape:
    """Area in pixels, greatest diameter in pixels, asymmetry about two axes (0 to 1), and 1 minus solidity."""

    area: float
    diameter: float
    asymmetry: float
    irregularity: float


def describe(mask: Mask, axis: float | None = None) -> tuple[Shape, float]:
    """A lesion's shape and the direction of its long axis (radians); asymmetry is taken about `axis`, else about that."""
    whole = mask.astype(np.uint8)
    points = np.argwhere(mask)[:, ::-1]
    hull = cv2.convexHull(points.astype(np.int32))
    corners = hull[:, 0].astype(np.float64)
    apart = np.linalg.norm(corners[:, None] - corners[None], axis=2).max() + 1.0
    area = float(mask.sum())
    filled = int(np.count_nonzero(cv2.fillConvexPoly(np.zeros_like(whole), hull, (1,))))
    centre = points.mean(0)
    (xx, xy), (_, yy) = np.cov(points.T)
    long = 0.5 * float(np.arctan2(2.0 * xy, xx - yy))
    unlike = [
        1.0 - float((mask & _mirrored(whole, centre, (long if axis is None else axis) + turn)).sum()) / area
        for turn in (0.0, np.pi / 2.0)
    ]
    return Shape(area, float(apart), float(np.mean(unlike)), 1.0 - area / max(filled, area)), long


def _mirrored(mask: Rgb, centre: Floats, angle: float) -> Mask:
    """The mask mirrored about an axis through its centre."""
    cosine, sine = np.cos(2.0 * angle), np.sin(2.0 * angle)
    turn = np.array([[cosine, sine], [sine, -cosine]])
    matrix = np.column_stack([turn, centre - turn @ centre])
    return np.asarray(cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST) > 0)


def measure_shape(earlier: Mask, later: Mask, fit: Fit) -> dict[Metric, Change]:
    """Size and shape of a lesion in two frames; both asymmetries are about the same axes of the skin."""
    before, axis = describe(earlier)
    after, _ = describe(later, axis + float(np.radians(fit.degrees)))
    area, diameter = after.area / fit.scale**2, after.diameter / fit.scale
    return {
        Metric.AREA: Change(before.area, area, area / before.area),
        Metric.DIAMETER: Change(before.diameter, diameter, diameter / before.diameter),
        Metric.ASYMMETRY: _difference(before.asymmetry, after.asymmetry),
        Metric.BORDER_IRREGULARITY: _difference(before.irregularity, after.irregularity),
    }


def _difference(before: float, after: float) -> Change:
    return Change(before, after, after - before)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Two images in the earlier one's frame: CIE L*a*b* H×W×3 (D65), the lesion of each, and what both show."""

    earlier: NDArray[np.float32]
    later: NDArray[np.float32]
    lesions: tuple[Mask, Mask]
    seen: Mask

    @property
    def likeness(self) -> float:
        """Correlation of fine detail, -1 to 1: near 1 where one photograph was made of the other."""
        seen = cv2.erode(self.seen.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        before, after = (_fine(lab[..., 0])[seen] for lab in (self.earlier, self.later))
        if seen.sum() < 3 or min(before.std(), after.std()) == 0.0:
            return 0.0
        return float(np.corrcoef(before, after)[0, 1])


def align(
    frames: tuple[Rgb, Rgb], lesions: tuple[Mask, Mask], fields: tuple[Mask, Mask], fit: Fit
) -> Aligned:
    """Carry the later frame, its lesion and its dark field into the earlier frame."""
    size = frames[0].shape[1::-1]

    def carry(image: Rgb, how: int) -> Rgb:
        return np.asarray(cv2.warpAffine(image, fit.matrix, size, flags=how | cv2.WARP_INVERSE_MAP), np.uint8)

    seen = carry((~fields[1]).astype(np.uint8), cv2.INTER_NEAREST) > 0
    lesion = carry(lesions[1].astype(np.uint8), cv2.INTER_NEAREST) > 0
    colours = [
        cv2.cvtColor(frame.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB)
        for frame in (frames[0], carry(frames[1], cv2.INTER_LINEAR))
    ]
    earlier, later = (np.asarray(lab, np.float32) for lab in colours)
    return Aligned(earlier, later, (lesions[0], lesion), np.asarray(seen & ~fields[0]))


def measure_colour(aligned: Aligned) -> Mapping[Metric, Change]:
    """Both changes of colour; none where too little skin is seen around the lesion in both."""
    union = aligned.lesions[0] | aligned.lesions[1]
    radius = float(np.sqrt(max(union.sum(), 1) / np.pi))
    away = cv2.distanceTransform((~union).astype(np.uint8), cv2.DIST_L2, 5)
    around = (away > _RING[0] * radius) & (away < _RING[1] * radius)
    ring, core = around & aligned.seen, aligned.lesions[0] & aligned.lesions[1] & aligned.seen
    whole = np.pi * radius**2 * ((1.0 + _RING[1]) ** 2 - (1.0 + _RING[0]) ** 2)
    if ring.sum() < _LEAST_RING * whole or not core.any():
        return {}
    apart = [
        lab[core].mean(0, dtype=np.float64) - np.median(lab[ring], axis=0)
        for lab in (aligned.earlier, aligned.later)
    ]
    smooth = [_blurred(lab, aligned.seen, _BLUR * radius) for lab in (aligned.earlier, aligned.later)]
    known = (union | around) & aligned.seen
    rest = _unexplained(smooth[0][known].astype(np.float64), smooth[1][known].astype(np.float64))
    focal = float(np.quantile(rest[union[known]], 1.0 - _FOCAL_SHARE))
    return {
        Metric.COLOUR: Change(None, None, float(np.linalg.norm(apart[1] - apart[0]))),
        Metric.FOCAL_COLOUR: Change(None, None, focal),
    }


def _fine(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """A band of detail between pixel noise and shading."""
    return np.asarray(
        cv2.GaussianBlur(channel, (0, 0), 1.5) - cv2.GaussianBlur(channel, (0, 0), 6.0), np.float32
    )


def _blurred(lab: NDArray[np.float32], seen: Mask, deviation: float) -> NDArray[np.float32]:
    """Means of what is seen around each place."""
    weights = seen.astype(np.float32)
    total = cv2.GaussianBlur(weights, (0, 0), deviation)[..., None]
    summed = cv2.GaussianBlur(lab * weights[..., None], (0, 0), deviation)
    return np.asarray(summed / np.maximum(total, 1e-3), np.float32)


def _unexplained(before: Floats, after: Floats) -> Floats:
    """ΔE of N places, N×3 each, that one affine map of colours does not explain.

    The map is another device, light or white balance; it is fitted with Cauchy's weights, so that a part of the
    lesion which changed on its own does not bend it.
    """
    given = np.column_stack([before, np.ones(len(before))])
    weights = np.ones(len(before))
    rest = np.zeros(len(before))
    for _ in range(8):
        weighted = given * weights[:, None]
        # A ridge: a lesion and skin of one hue leave directions of the colour space open.
        normal = weighted.T @ given + len(before) * np.diag([0.25, 0.25, 0.25, 0.0])
        wanted = weighted.T @ after + len(before) * 0.25 * np.eye(4, 3)
        rest = np.linalg.norm(after - given @ np.linalg.solve(normal, wanted), axis=1)
        weights = 1.0 / (1.0 + (rest / max(float(np.median(rest)), 0.5)) ** 2)
    return rest
