"""Whether this site's newest images are still like its first: plain statistics, without a database.

Each measure of the newest WINDOW images is held against that of the site's own first BASELINE ones, every STEP images:
a moving average chart (Montgomery, Introduction to Statistical Quality Control, 7th ed., 9.3) of Hotelling's T² (11.3
there); of shares it is Pearson's chi-squared of two samples. What a classifier makes of the images is watched beside the
pixels, since it shows most shifts best (Rabanser, Günnemann and Lipton, Failing Loudly, NeurIPS 2019).
Images come in bursts of one patient, so the variance of their mean is that of independent ones times an inflation that
the baseline shows (the design effect; Rao and Scott, JASA 76, 1981, for shares).
`benchmarks/drift.py` set the limits, and measures what they find and how often they are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve_app.domain.assessment import Outcome, RiskLevel
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis

FloatArray = NDArray[np.float64]

#: How many of a site's first images are the baseline, how many of the newest are held against it, and how many come
#: between two looks.
BASELINE, WINDOW, STEP = 500, 300, 25
#: How many numbers an embedding is projected on.
PROJECTED = 16
#: Published shares are rounded to this: no count under 5 can be told from none, in the window or in the baseline.
SHARE_STEP = 0.05


class Stream(StrEnum):
    """Which images a baseline is of, and what begins a new one.

    PICTURES: all that were answered; another preprocessing. MODEL: those with a classification; another model or
    embedding space, too. ANSWERS: all that were answered; another model, space or policy.
    """

    PICTURES = "pictures"
    MODEL = "model"
    ANSWERS = "answers"


#: The fields of an answer's provenance that say which baseline it is held against.
SUBJECTS: Mapping[Stream, tuple[str, ...]] = {
    Stream.PICTURES: ("preprocess_version",),
    Stream.MODEL: ("preprocess_version", "model_id", "embedding_space"),
    Stream.ANSWERS: ("preprocess_version", "model_id", "embedding_space", "policy_version"),
}


@dataclass(frozen=True, slots=True)
class Images:
    """What is known of N images, oldest first. `quality`: N numbers a measure, by its name.

    `nine` N×9 probabilities in the order of Diagnosis and `embedding` N×512 unit vectors: NaN where an image has none.
    `levels` are empty where an image was refused. `patients`: N numbers, the same for images of the same patient.
    """

    quality: Mapping[str, FloatArray]
    nine: FloatArray
    embedding: NDArray[np.floating[Any]]
    levels: Sequence[str]
    outcomes: Sequence[str]
    patients: NDArray[np.intp]


Values = Callable[[Images], FloatArray]


@dataclass(frozen=True, slots=True)
class Advice:
    """What an alarm may mean, and what to do about it."""

    meaning: str
    action: str


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is watched; beyond a distance of `limit` it alarms.

    `values` makes N×D numbers of N images, on a scale on which their mean is near normal; `shown` makes N×D on the
    scale that people read (None: the same one), and `parts` names the D. Of a mix, they are shares that sum to 1.
    """

    name: str
    stream: Stream
    limit: float
    advice: Advice
    values: Values
    parts: tuple[str, ...] = ()
    shown: Values | None = None
    is_mix: bool = False

    def show(self, images: Images) -> dict[str, float]:
        """The mean of each part: of a mix rounded to SHARE_STEP, else to three figures; nothing of an embedding."""
        means = (self.shown or self.values)(images).mean(0) if self.parts else []
        if self.is_mix:
            return {
                p: round(round(m / SHARE_STEP) * SHARE_STEP, 2)
                for p, m in zip(self.parts, means, strict=True)
            }
        return {part: float(f"{mean:.3g}") for part, mean in zip(self.parts, means, strict=True)}


def _quality(*names: str) -> Values:
    return lambda images: np.stack([images.quality[name] for name in names], axis=1)


def _log_of(name: str) -> Values:
    return lambda images: np.asarray(np.log(images.quality[name] + 0.1))[:, None]


def _log_odds(values: Values, least: float) -> Values:
    """Of probabilities; those under `least`, or as near to 1, are cut off, or one image would outweigh a hundred."""

    def scaled(images: Images) -> FloatArray:
        cut = np.clip(values(images), least, 1.0 - least)
        return np.asarray(np.log(cut / (1.0 - cut)))

    return scaled


def _among(words: Sequence[str], found: Sequence[str]) -> FloatArray:
    """N×K: which of the words each is."""
    return np.asarray(np.asarray(found)[:, None] == np.asarray(words)[None, :], dtype=np.float64)


_DIAGNOSES = tuple(Diagnosis)
_UNKNOWN = _DIAGNOSES.index(Diagnosis.UNK)
_MALIGNANT = np.array([diagnosis in MALIGNANT for diagnosis in _DIAGNOSES])
_CLASSES = tuple(diagnosis.value for diagnosis in _DIAGNOSES)
_LEVELS = (*(level.value for level in RiskLevel), "")
_OUTCOMES = tuple(outcome.value for outcome in (Outcome.DECIDED, Outcome.REVIEW, Outcome.REFUSED))


def _confidence(images: Images) -> FloatArray:
    return np.asarray(images.nine.max(1, keepdims=True))


def _unknown(images: Images) -> FloatArray:
    return np.asarray(images.nine[:, [_UNKNOWN]])


def _malignant(images: Images) -> FloatArray:
    known = np.maximum(1.0 - images.nine[:, [_UNKNOWN]], 1e-9)
    return np.asarray(np.clip(images.nine[:, _MALIGNANT].sum(1, keepdims=True) / known, 0.0, 1.0))


def _classes(images: Images) -> FloatArray:
    return np.asarray(np.eye(len(_CLASSES))[images.nine.argmax(1)])


def _levels(images: Images) -> FloatArray:
    return _among(_LEVELS, images.levels)


def _outcomes(images: Images) -> FloatArray:
    return _among(_OUTCOMES, images.outcomes)


def _signs() -> FloatArray:
    """512×PROJECTED of ±1, the same for ever: a projection that keeps distances (Achlioptas, JCSS 66, 2003)."""
    bits = np.unpackbits(
        np.frombuffer(hashlib.shake_256(b"derm-cds drift").digest(512 * PROJECTED // 8), np.uint8)
    )
    return np.asarray((bits * 2.0 - 1.0).reshape(512, PROJECTED))


_SIGNS = _signs()


def _embedding(images: Images) -> FloatArray:
    return np.asarray(images.embedding, dtype=np.float64) @ _SIGNS


_DEVICE = (
    "Ask who takes the images what has changed since then: room, lamp, device, app. Put it back; or say that it stays, "
    "and have the next images make a new baseline. Where nobody knows of a change, send this report to support."
)
_PATIENTS = (
    "Ask whether other patients come than before. If so, watch the performance report for them, and acknowledge; if "
    "not, treat it as a change of device."
)
_LIGHT = Advice(
    "The light of the room, the dermatoscope's lamp or battery, or the exposure has changed.", _DEVICE
)
_CAMERA = Advice(
    "Another camera, dermatoscope, filter or app is in use, or its white balance is another.", _DEVICE
)
_FOCUS = Advice("Focus, lens (dirt, immersion fluid), camera or compression has changed.", _DEVICE)
_USE = Advice("More or fewer images than at first are refused, or need a clinician's look.", _DEVICE)
_STRANGE = Advice("The images are more or less like those that the model knows than at first.", _DEVICE)
_CASES = Advice("Other patients come than at first: another clinic, other referrals, a season.", _PATIENTS)

MEASURES: tuple[Measure, ...] = (
    Measure("exposure", Stream.PICTURES, 23.0, _LIGHT, _quality("exposure"), ("exposure",)),
    Measure("contrast", Stream.PICTURES, 27.0, _LIGHT, _quality("contrast"), ("contrast",)),
    Measure("colour", Stream.PICTURES, 24.0, _CAMERA, _log_of("colour"), ("colour",), _quality("colour")),
    Measure("colour_balance", Stream.PICTURES, 34.0, _CAMERA, _quality("red", "blue"), ("red", "blue")),
    # At the model's input size: another one's is another measure.
    Measure(
        "sharpness", Stream.ANSWERS, 25.0, _FOCUS, _log_of("sharpness"), ("sharpness",), _quality("sharpness")
    ),
    Measure("outcomes", Stream.ANSWERS, 24.0, _USE, _outcomes, _OUTCOMES, is_mix=True),
    Measure("levels", Stream.ANSWERS, 31.0, _CASES, _levels, (*_LEVELS[:-1], "none"), is_mix=True),
    Measure(
        "confidence", Stream.MODEL, 23.0, _STRANGE, _log_odds(_confidence, 0.02), ("confidence",), _confidence
    ),
    Measure("unknown", Stream.MODEL, 26.0, _STRANGE, _log_odds(_unknown, 1e-4), ("unknown",), _unknown),
    Measure("malignant", Stream.MODEL, 16.5, _CASES, _log_odds(_malignant, 5e-3), ("malignant",), _malignant),
    Measure("classes", Stream.MODEL, 44.0, _CASES, _classes, _CLASSES, is_mix=True),
    Measure("embedding", Stream.MODEL, 64.0, _STRANGE, _embedding),
)


def measures_of(stream: Stream) -> tuple[Measure, ...]:
    """Those that are watched in a stream."""
    return tuple(measure for measure in MEASURES if measure.stream is stream)


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the first images gave for one measure, D numbers wide; an aggregate, of no image.

    `inflation`: how many times the variance of a mean is that of as many independent images. A mix has no covariance:
    its shares are its mean.
    """

    images: int
    mean: tuple[float, ...]
    inflation: float
    covariance: tuple[tuple[float, ...], ...] = ()
    shown: Mapping[str, float] = field(default_factory=dict)


def learn(measure: Measure, images: Images) -> Baseline:
    """Make the baseline of one measure."""
    return summarise(measure, measure.values(images), images.patients, measure.show(images))


def summarise(
    measure: Measure, values: FloatArray, patients: NDArray[np.intp], shown: Mapping[str, float] | None = None
) -> Baseline:
    """Make it of the N×D numbers that the measure gives, and of whose images they are."""
    count, mean = len(values), values.mean(0)
    rest = values - mean
    covariance = rest.T @ rest / (count - 1)
    weights = np.diag(1.0 / np.maximum(mean, 1e-9)) if measure.is_mix else _inverse(covariance)
    together = np.zeros((int(patients.max()) + 1, values.shape[1]))
    np.add.at(together, patients, rest)
    sums = [float(((rows @ weights) * rows).sum()) for rows in (together, rest)]
    # Patients that have nothing in common make it about 1; less is chance, and would alarm too often.
    inflation = max(1.0, sums[0] / sums[1]) if sums[1] > 0.0 else 1.0
    return Baseline(
        images=count,
        mean=tuple(mean.tolist()),
        inflation=inflation,
        covariance=() if measure.is_mix else tuple(map(tuple, covariance.tolist())),
        shown=shown or {},
    )


def distance(measure: Measure, baseline: Baseline, mean: FloatArray, count: int) -> FloatArray:
    """How far means of `count` images, D or K×D, are from the baseline's: T², or chi-squared, over the inflation.

    Of D numbers it is about D where nothing has changed; each measure's limit is on this scale.
    """
    first = np.asarray(baseline.mean)
    apart = mean - first
    if measure.is_mix:
        pooled = (baseline.images * first + count * mean) / (baseline.images + count)
        squares = np.divide(apart**2, pooled, out=np.zeros_like(apart), where=pooled > 0.0).sum(-1)
    else:
        squares = ((apart @ _inverse(np.asarray(baseline.covariance))) * apart).sum(-1)
    return np.asarray(squares / (1.0 / baseline.images + 1.0 / count) / baseline.inflation)


def _inverse(covariance: FloatArray) -> FloatArray:
    """With a little added: a measure that never varied would make any change infinite."""
    return np.asarray(np.linalg.inv(covariance + 1e-6 * np.eye(len(covariance))))
