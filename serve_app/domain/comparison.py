"""What changed on a lesion between two images: measured against what repeated captures of an unchanged one differ by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
import math
from types import MappingProxyType


class Metric(StrEnum):
    """What is measured on both images.

    `area` and `diameter` (the greatest) are the later one's over the earlier one's. `asymmetry` (0 to 1, about the two
    principal axes) and `border_irregularity` (1 minus solidity) are differences. `colour` is ΔE*ab between the lesion's
    means, each taken from the skin around it; `focal_colour` what a tenth of the lesion exceeds in ΔE*ab when one
    linear change of colour for all of it, and for the skin, has been allowed for.
    """

    AREA = "area"
    DIAMETER = "diameter"
    ASYMMETRY = "asymmetry"
    BORDER_IRREGULARITY = "border_irregularity"
    COLOUR = "colour"
    FOCAL_COLOUR = "focal_colour"

    @property
    def is_ratio(self) -> bool:
        """Whether 1 is no change, and half as far from it as double."""
        return self in SIZES


SIZES = frozenset({Metric.AREA, Metric.DIAMETER})


class Verdict(StrEnum):
    """Whether a change is more than repeated captures of an unchanged lesion differ by in 95 of 100 cases."""

    WITHIN = "within"
    BEYOND_REPEATABILITY = "beyond_repeatability"


class Obstacle(StrEnum):
    """Why two images, or one metric of them, cannot be compared."""

    TOO_FEW_MATCHES = "too_few_matches"
    SCALE_TOO_DIFFERENT = "scale_too_different"
    NO_LESION = "no_lesion"
    LESION_NOT_WHOLE = "lesion_not_whole"
    SEVERAL_LESIONS = "several_lesions"
    OUTLINE_NOT_SURE = "outline_not_sure"
    SCALE_NOT_KNOWN = "scale_not_known"
    SKIN_NOT_VISIBLE = "skin_not_visible"


class Which(StrEnum):
    """Which of the two images."""

    EARLIER = "earlier"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class Hindrance:
    """An obstacle: of which image, if it is one's; which metrics it withholds; what it means, and what would mend it."""

    obstacle: Obstacle
    image: Which | None
    withheld: tuple[Metric, ...]
    message: str
    action: str


_TOLD: Mapping[Obstacle, tuple[str, str]] = MappingProxyType(
    {
        Obstacle.TOO_FEW_MATCHES: (
            "The skin of the two images could not be matched.",
            "Check that it is the same lesion. Take the image again, in focus, at the magnification of the other, with more skin around it.",
        ),
        Obstacle.SCALE_TOO_DIFFERENT: (
            "The two images have too different magnifications.",
            "Take the image again at the magnification of the other.",
        ),
        Obstacle.NO_LESION: ("No lesion was found.", "View the images side by side."),
        Obstacle.LESION_NOT_WHOLE: (
            "The lesion goes on beyond what is seen.",
            "Take the image again with the whole lesion and a rim of skin in the field.",
        ),
        Obstacle.SEVERAL_LESIONS: (
            "More than one lesion may be in the image.",
            "Take the image again with one lesion in the field.",
        ),
        Obstacle.OUTLINE_NOT_SURE: (
            "The lesion's outline is not clear enough to be measured.",
            "Take the image again without hair, ink and reflections over the lesion, or view the images side by side.",
        ),
        Obstacle.SCALE_NOT_KNOWN: (
            "What matches lies too near together to tell growth from magnification.",
            "Have the device send its millimetres per pixel, or take the image again with more skin around the lesion.",
        ),
        Obstacle.SKIN_NOT_VISIBLE: (
            "Too little skin is seen around the lesion in both images to take its colour from.",
            "Take the image again with a rim of skin around the lesion.",
        ),
    }
)


def hindrance(
    obstacle: Obstacle, image: Which | None = None, withheld: tuple[Metric, ...] = tuple(Metric)
) -> Hindrance:
    """An obstacle in words."""
    return Hindrance(obstacle, image, withheld, *_TOLD[obstacle])


@dataclass(frozen=True, slots=True)
class Similarity:
    """Where a point of the earlier image lies in the later one, each in shares of its image's short side.

    (Of a quarter of the long side where that is more.)

    later = scale · R(degrees) · earlier + (x, y); x to the right, y down, positive degrees from x towards y.
    """

    scale: float
    degrees: float
    x: float
    y: float

    def carry(self, x: float, y: float) -> tuple[float, float]:
        """A point of the earlier image in the later one."""
        across, down = (
            self.scale * math.cos(math.radians(self.degrees)),
            self.scale * math.sin(math.radians(self.degrees)),
        )
        return across * x - down * y + self.x, down * x + across * y + self.y


@dataclass(frozen=True, slots=True)
class Registration:
    """The similarity, how many features of skin and lesion agree with it, and its scale's relative standard error."""

    similarity: Similarity
    inliers: int
    scale_error: float


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric of both images.

    `earlier` and `later`: each image's own value, where it has a unit of its own (mm² and mm for sizes when the device
    said its scale). `change`: see Metric. `limit`: the repeatability limit (ISO 5725-1) for pairs like this one, with
    its 95 % interval; for a ratio the factor, either way.
    """

    metric: Metric
    earlier: float | None
    later: float | None
    change: float
    limit: float
    limit_interval: tuple[float, float]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two images of a lesion, measured; without measures they are not comparable, and the hindrances say why.

    `stratum`: pairs like this one, that the limits come from; `repeatability`: whose repeated captures those were.
    """

    registration: Registration | None
    measures: tuple[Measure, ...]
    hindrances: tuple[Hindrance, ...]
    stratum: str | None
    repeatability: str
    milliseconds: Mapping[str, float]

    @property
    def comparable(self) -> bool:
        """Whether anything could be measured."""
        return bool(self.measures)

    @property
    def beyond(self) -> tuple[Metric, ...]:
        """What changed by more than repeated captures differ by."""
        return tuple(m.metric for m in self.measures if m.verdict is Verdict.BEYOND_REPEATABILITY)


def distance(metric: Metric, change: float) -> float:
    """How far a change is from none: of a ratio the larger of it and its inverse, otherwise its absolute value."""
    return max(change, 1.0 / change) if metric.is_ratio else abs(change)
