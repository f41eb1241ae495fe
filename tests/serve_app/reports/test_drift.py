"""What drift finds in numbers drawn like a clinic's, and what it publishes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.reports.drift import (
    BASELINE,
    MEASURES,
    STEP,
    WINDOW,
    Images,
    Stream,
    distance,
    learn,
    measures_of,
)

NAMES = tuple(measure.name for measure in MEASURES)
#: Mean and standard deviation over HAM10000's images of fold 0, as derm10 measures them.
QUALITY = {
    "sharpness": (60.0, 30.0),
    "exposure": (0.63, 0.09),
    "contrast": (0.10, 0.04),
    "colour": (8.0, 2.5),
    "red": (0.33, 0.17),
    "blue": (0.05, 0.07),
}
MIX = (0.10, 0.66, 0.06, 0.02, 0.12, 0.01, 0.01, 0.01, 0.01)
CANCER_CLINIC = (0.23, 0.33, 0.23, 0.06, 0.09, 0.01, 0.01, 0.03, 0.01)


def draw(rng: np.random.Generator, count: int, *, mix=MIX, turned: float = 0.0, **shift: float) -> Images:
    """Images of visits of four: half of what they measure is the patient's. `shift` is in standard deviations."""
    patients = np.arange(count) // 4

    def drawn(name: str) -> np.ndarray:
        own, patient = rng.normal(size=count), rng.normal(size=count)[patients]
        mean, deviation = QUALITY[name]
        return mean + deviation * (0.7 * own + 0.7 * patient + shift.get(name, 0.0))

    top = rng.choice(9, count, p=mix)
    nine = rng.dirichlet(np.full(9, 0.3), count) * 0.3
    nine[np.arange(count), top] += 0.7
    nine[:, -1] *= 0.1
    nine /= nine.sum(1, keepdims=True)
    embedding = rng.normal(size=(count, 512)) + turned
    level = np.where(np.isin(top, (0, 2, 3, 7)), "high", np.where(rng.random(count) < 0.3, "medium", "low"))
    outcome = np.where(rng.random(count) < 0.05, "refused", np.where(nine.max(1) < 0.8, "review", "decided"))
    quality = {
        name: np.maximum(drawn(name), 1e-3) if name in {"sharpness", "colour"} else drawn(name)
        for name in QUALITY
    }
    return Images(
        quality,
        nine,
        embedding / np.linalg.norm(embedding, axis=1, keepdims=True),
        np.where(outcome == "refused", "", level).tolist(),
        outcome.tolist(),
        patients,
    )


def part(images: Images, picked: slice | np.ndarray) -> Images:
    return Images(
        {name: found[picked] for name, found in images.quality.items()},
        images.nine[picked],
        images.embedding[picked],
        np.asarray(images.levels)[picked].tolist(),
        np.asarray(images.outcomes)[picked].tolist(),
        images.patients[picked],
    )


def joined(*several: Images) -> Images:
    return Images(
        {name: np.concatenate([each.quality[name] for each in several]) for name in QUALITY},
        np.concatenate([each.nine for each in several]),
        np.concatenate([each.embedding for each in several]),
        [level for each in several for level in each.levels],
        [outcome for each in several for outcome in each.outcomes],
        np.concatenate([each.patients + 10_000 * i for i, each in enumerate(several)]),
    )


def alarms(images: Images) -> dict[str, int]:
    """Each measure that is ever over its limit, and after how many images it was first."""
    found: dict[str, int] = {}
    ends = np.arange(BASELINE + WINDOW, len(images.outcomes) + 1, STEP)
    for measure in MEASURES:
        baseline = learn(measure, part(images, slice(BASELINE)))
        values = measure.values(images)
        for end in ends:
            mean = values[end - WINDOW : end].mean(0)
            if distance(measure, baseline, mean, WINDOW) > measure.limit:
                found[measure.name] = int(end)
                break
    return found


def test_quiet_images_raise_no_alarm() -> None:
    """Three years' worth; twenty of real images are benchmarks/drift.py's."""
    assert [alarms(draw(np.random.default_rng(year), BASELINE + 5_000)) for year in range(3)] == [{}] * 3


SHIFTS = {
    "colour_balance": {"blue": -1.5},
    "exposure": {"exposure": -1.0},
    "contrast": {"contrast": -1.0},
    "colour": {"colour": 1.0},
    "sharpness": {"sharpness": -1.0},
    "malignant": {"mix": CANCER_CLINIC},
    "classes": {"mix": CANCER_CLINIC},
    "levels": {"mix": CANCER_CLINIC},
    "embedding": {"turned": 0.3},
}


@pytest.mark.parametrize("measure", SHIFTS)
def test_a_shift_is_found_within_300_images_and_by_the_measure_that_it_is_of(measure: str) -> None:
    rng = np.random.default_rng(7)
    found = alarms(joined(draw(rng, 1_000), draw(rng, 300, **SHIFTS[measure])))
    assert 1_000 < found.get(measure, 0) <= 1_300
    alike = {"malignant", "classes", "levels", "outcomes", "confidence"}
    assert set(found) <= (alike if measure in alike else {measure})


def test_one_long_visit_is_no_shift() -> None:
    """60 images of one patient, much darker than others': as patients come, and no news of the clinic."""
    rng = np.random.default_rng(3)
    visit = draw(rng, 60, exposure=-1.5)
    visit = replace(visit, patients=np.zeros(60, np.intp))
    assert "exposure" not in alarms(joined(draw(rng, 1_000), visit, draw(rng, 300)))


def test_images_of_one_patient_count_as_fewer() -> None:
    """Each image four times over: the mean of n is as sure as that of n / 4 different ones."""
    rng = np.random.default_rng(1)
    single, again = draw(rng, 125), np.repeat(np.arange(125), 4)
    fourfold = replace(part(single, again), patients=again)
    for measure in MEASURES:
        assert learn(measure, fourfold).inflation == pytest.approx(4.0, rel=0.01)
        assert learn(measure, replace(fourfold, patients=np.arange(500))).inflation == pytest.approx(1.0)


@pytest.mark.parametrize("measure", MEASURES, ids=NAMES)
def test_the_same_images_are_not_apart_and_what_never_varied_is_finite(measure) -> None:
    images = draw(np.random.default_rng(2), BASELINE)
    values = measure.values(images)
    assert distance(measure, learn(measure, images), values.mean(0), BASELINE) == pytest.approx(0.0, abs=1e-9)
    same = part(images, slice(0, 1))
    baseline = learn(measure, part(images, np.zeros(BASELINE, np.intp)))
    assert np.isfinite(distance(measure, baseline, values.mean(0), WINDOW))
    assert distance(measure, baseline, measure.values(same)[0], WINDOW) == pytest.approx(0.0, abs=1e-9)


def test_a_class_that_was_never_there_is_a_shift() -> None:
    rng = np.random.default_rng(4)
    without = tuple(share / 0.99 if i != 5 else 0.0 for i, share in enumerate(MIX))
    (classes,) = [measure for measure in MEASURES if measure.name == "classes"]
    baseline = learn(classes, draw(rng, BASELINE, mix=without))
    many = (*MIX[:1], 0.36, *MIX[2:5], 0.31, *MIX[6:])
    assert (
        distance(classes, baseline, classes.values(draw(rng, WINDOW, mix=many)).mean(0), WINDOW)
        > classes.limit
    )


@pytest.mark.parametrize("count", [WINDOW, BASELINE])
def test_no_count_under_5_can_be_told_from_none(count: int) -> None:
    (classes,) = [measure for measure in MEASURES if measure.name == "classes"]
    nine = np.zeros((count, 9))
    nine[:, 1] = 1.0
    images = replace(draw(np.random.default_rng(5), count), nine=nine)
    none = classes.show(images)
    for few in range(1, 5):
        nine[few - 1] = np.eye(9)[0]
        assert classes.show(images) == none
    assert set(none) == {diagnosis.value for diagnosis in Diagnosis}


def test_nothing_of_an_embedding_is_shown_and_means_have_three_figures() -> None:
    images = draw(np.random.default_rng(6), WINDOW)
    shown = {measure.name: measure.show(images) for measure in MEASURES}
    assert shown["embedding"] == {}
    assert all(float(f"{mean:.3g}") == mean for each in shown.values() for mean in each.values())
    assert shown["exposure"]["exposure"] == pytest.approx(images.quality["exposure"].mean(), rel=0.005)


def test_what_depends_on_the_model_is_not_held_against_another_models() -> None:
    assert {measure.name for measure in measures_of(Stream.PICTURES)} == {
        *("exposure", "contrast", "colour", "colour_balance")
    }
    assert sum(len(measures_of(stream)) for stream in Stream) == len(MEASURES) == len(set(NAMES))
