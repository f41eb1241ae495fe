"""Where the skin of one image lies in another: ORB features, and a similarity that RANSAC finds among their matches.

A similarity and nothing softer: what bends the image would bend the growth away that is to be measured.
The same pixels give the same numbers, however many threads there are: OpenCV seeds RANSAC anew at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.domain.comparison import Similarity

# A replica is given its cores, and a frame is small: more threads would wait for each other.
cv2.setNumThreads(1)

Rgb = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Points = NDArray[np.float32]
Matrix = NDArray[np.float64]

#: Short side in pixels of the frame that everything is found in, at true aspect: ORB's patches have one size.
SIDE = 300
#: Fewer may be chance: 1,750 pairs of different lesions had 5 at the median and 11 at most (docs/change.md).
LEAST_INLIERS = 15
#: Beyond this the skin's texture is too differently resolved; up to it areas repeat nearly as well (docs/change.md).
MOST_SCALE = 2.5
#: How well the scale must be known for a size to be compared: 2 % are 4 % of the area.
MOST_SCALE_ERROR = 0.02
#: In pixels of the frame: an inlier's error.
_TOLERANCE = 4.0
#: Lowe's ratio, wider than his 0.8: skin is self-similar, and RANSAC takes the rest.
_RATIO = 0.85
_DARK = 40  # of 255: what a dermatoscope's field leaves black, JPEG's noise included
_PATCH = 15  # half of ORB's patch, within which the field's rim would be the feature


@dataclass(frozen=True, slots=True)
class Features:
    """Where N corners lie in a frame, float N×2 (x, y), and their ORB descriptors, uint8 N×32."""

    points: Points
    descriptors: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Matches:
    """Corners that look alike, float N×2 in the frame of each image."""

    earlier: Points
    later: Points


@dataclass(frozen=True, slots=True)
class Fit:
    """A similarity between two frames in pixels, 2×3; how many matches agree with it, and how well they fix its scale.

    `scale_error` is the scale's relative standard error: the inliers' own over how far they spread.
    """

    matrix: Matrix
    inliers: int
    scale_error: float

    @property
    def scale(self) -> float:
        """How many pixels of the later frame one of the earlier is."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    @property
    def degrees(self) -> float:
        """By how much the later image is turned, from x towards y."""
        return float(np.degrees(np.arctan2(self.matrix[1, 0], self.matrix[0, 0])))

    def similarity(self) -> Similarity:
        """The same in shares of each image's short side, whatever its resolution."""
        x, y = (self.matrix[:, 2] / SIDE).tolist()
        return Similarity(self.scale, self.degrees, x, y)


def reduction(pixels: Rgb) -> float:
    """Pixels of the frame for one of the image: its short side gets SIDE, and its long one 4 · SIDE at most."""
    height, width = pixels.shape[:2]
    return float(SIDE / max(min(height, width), max(height, width) / 4.0))


def make_frame(pixels: Rgb) -> Rgb:
    """An image, uint8 H×W×3 at true aspect, in the size that everything is found in."""
    factor = reduction(pixels)
    size = [max(1, round(factor * side)) for side in pixels.shape[1::-1]]
    how = cv2.INTER_AREA if factor < 1.0 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size, interpolation=how), np.uint8)


def dark_field(frame: Rgb) -> Mask:
    """What lies outside a dermatoscope's round field: black, and in one piece with the frame's edge."""
    black = cv2.copyMakeBorder(
        (frame.max(2) < _DARK).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(1,)
    )
    _, names = cv2.connectedComponents(black, connectivity=4)
    field: Mask = (names == names[0, 0])[1:-1, 1:-1]
    return field


def find_features(frame: Rgb) -> Features:
    """The corners of a frame after local contrast equalisation; none at the rim of a dark field.

    Two images under one dermatoscope have the same rim, whatever skin lies in it.
    """
    grey = cv2.createCLAHE(2.0, (8, 8)).apply(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
    seen = cv2.erode((~dark_field(frame)).astype(np.uint8), np.ones((2 * _PATCH + 1,) * 2, np.uint8))
    corners, descriptors = cv2.ORB.create(2000, fastThreshold=5).detectAndCompute(grey, seen)
    points = np.array([corner.pt for corner in corners], np.float32).reshape(-1, 2)
    return Features(
        points, np.zeros((0, 32), np.uint8) if descriptors is None else np.asarray(descriptors, np.uint8)
    )


def match(earlier: Features, later: Features) -> Matches:
    """Each corner's best match, where the second best is clearly worse; of several to one corner the nearest."""
    if min(len(earlier.points), len(later.points)) < 2:
        return Matches(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))
    best: dict[int, cv2.DMatch] = {}
    for first, second in cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(earlier.descriptors, later.descriptors, 2):
        known = best.get(first.trainIdx)
        if first.distance < _RATIO * second.distance and (known is None or first.distance < known.distance):
            best[first.trainIdx] = first
    pairs = np.array([(found.queryIdx, found.trainIdx) for found in best.values()], np.int64).reshape(-1, 2)
    return Matches(earlier.points[pairs[:, 0]], later.points[pairs[:, 1]])


def fit(matches: Matches) -> Fit | None:
    """The similarity that most matches agree with; None where there is none."""
    if len(matches.earlier) < 3:
        return None
    # OpenCV gives None for none, which its types do not say.
    matrix: Any
    matrix, agreed = cv2.estimateAffinePartial2D(
        matches.earlier,
        matches.later,
        method=cv2.RANSAC,
        ransacReprojThreshold=_TOLERANCE,
        maxIters=2000,
        confidence=0.999,
    )
    if matrix is None:
        return None
    found, inliers = np.asarray(matrix, np.float64), np.asarray(agreed).ravel() > 0
    count, from_ = int(inliers.sum()), matches.earlier[inliers].astype(np.float64)
    error = carried(from_, found) - matches.later[inliers]
    spread = np.linalg.norm(from_ - from_.mean(0)) * np.hypot(*found[:, 0])
    return Fit(found, count, float(np.linalg.norm(error) / max(spread, 1e-9) / np.sqrt(max(count, 1))))


def carried(points: NDArray[np.floating], matrix: Matrix) -> Matrix:
    """Points N×2 of the earlier frame in the later one."""
    return np.asarray(points @ matrix[:, :2].T + matrix[:, 2])
