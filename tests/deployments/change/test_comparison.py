"""A comparison says what changed and what it could not tell; what did not change is within, and nothing is guessed."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from pydantic import TypeAdapter
import pytest

from benchmarks.change import cluttered, darkened, grown
from deployments.change.comparison import Capture, Comparer, capture, examine, judge
from deployments.change.metrics import METHOD, describe, measure_shape
from deployments.change.registration import Fit, make_frame
from deployments.change.segmenter import OutlineDoubt, Segmenter
from model_store.segmenter import Limit, Repeatability, StoredSegmenter, Stratum
from serve_app.domain.comparison import SIZES, Comparison, Metric, Obstacle, Verdict, Which
from serve_app.domain.errors import ModelContractError

LIMITS = Repeatability(
    "made up", "", "", METHOD, 1, 1, 0,
    (Stratum("any", 9.0, 0.0, {m: Limit(1.2 if m.is_ratio else 0.1, 1.1 if m.is_ratio else 0.05, 1.25 if m.is_ratio else 0.2, 99) for m in Metric}),),
)  # fmt: skip


@pytest.fixture(scope="session")
def comparer(segmenter: Segmenter, stored: StoredSegmenter) -> Comparer:
    assert stored.repeatability is not None, "python -m data_jobs.training.repeatability"
    return Comparer(segmenter, stored.repeatability)


def again(pixels: np.ndarray, degrees: float = 20.0, scale: float = 0.85, seed: int = 0) -> np.ndarray:
    """Another capture: turned, at another magnification, in another light, a little softer."""
    rng = np.random.default_rng(seed)
    frame = make_frame(pixels)
    height, width = frame.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)
    moved = cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    moved = cv2.GaussianBlur(moved, (0, 0), 0.6) * rng.uniform(0.92, 1.05, 3) + rng.normal(0, 3, moved.shape)
    return np.clip(moved, 0, 255).astype(np.uint8)


def by_metric(found: Comparison) -> dict[Metric, float]:
    return {measure.metric: measure.change for measure in found.measures}


def test_another_capture_of_the_same_is_within(comparer: Comparer, whole) -> None:
    found = [comparer.compare(pixels, again(pixels, seed=i)) for i, pixels in enumerate(whole)]
    compared = [each for each in found if each.comparable]
    assert len(compared) >= 6
    assert sum(bool(each.beyond) for each in compared) <= 1
    for each in compared:
        assert {m.metric for m in each.measures} == set(Metric)
        assert by_metric(each)[Metric.AREA] == pytest.approx(1.0, abs=0.12)
        assert each.registration is not None
        assert each.registration.similarity.scale == pytest.approx(0.85, rel=0.02)
        assert set(each.milliseconds) == {"features", "outline", "registration", "metrics"}
        assert each.stratum


def test_growth_at_another_magnification_is_beyond(comparer: Comparer, segmenter: Segmenter, whole) -> None:
    """The later image is smaller: in its pixels, the lesion that doubled is not."""
    found = []
    for i, pixels in enumerate(whole):
        frame = make_frame(pixels)
        larger = grown(frame, segmenter.outline(frame).mask, np.random.default_rng(i), by=2.0)
        found.append(comparer.compare(pixels, again(larger, scale=0.75, seed=i)))
    compared = [each for each in found if each.comparable]
    assert len(compared) >= 5
    assert sum(Metric.AREA in each.beyond for each in compared) >= len(compared) - 1
    assert np.median([by_metric(each)[Metric.AREA] for each in compared]) == pytest.approx(2.0, rel=0.15)


def test_a_part_that_darkens_is_beyond_and_another_white_balance_is_not(
    comparer: Comparer, segmenter, whole
) -> None:
    dark, cast = [], []
    for i, pixels in enumerate(whole):
        frame, rng = make_frame(pixels), np.random.default_rng(i)
        changed = darkened(frame, segmenter.outline(frame).mask, rng, to=0.5)
        dark.append(comparer.compare(pixels, again(changed, seed=i)))
        warm = np.clip(frame * np.array([1.1, 1.0, 0.88]), 0, 255).astype(np.uint8)
        cast.append(comparer.compare(pixels, again(warm, seed=i)))
    colours = {Metric.COLOUR, Metric.FOCAL_COLOUR}
    dark, cast = ([set(each.beyond) for each in kind if each.comparable] for kind in (dark, cast))
    assert sum(bool(beyond & colours) for beyond in dark) >= 0.75 * len(dark) > 3
    assert sum(bool(beyond & colours) for beyond in cast) <= 1


def test_different_lesions_are_not_comparable_and_it_says_what_would_mend_it(
    comparer: Comparer, whole
) -> None:
    found = comparer.compare(whole[0], whole[1])
    assert not found.comparable
    assert found.measures == ()
    assert found.registration is None
    (told,) = (h for h in found.hindrances if h.obstacle is Obstacle.TOO_FEW_MATCHES)
    assert told.image is None
    assert set(told.withheld) == set(Metric)
    assert "same lesion" in told.action


def test_too_different_a_magnification_is_named(comparer: Comparer, whole) -> None:
    found = [comparer.compare(pixels, again(pixels, 0.0, 0.36)) for pixels in whole]
    named = {h.obstacle for each in found for h in each.hindrances}
    assert not any(each.comparable for each in found)
    assert named & {Obstacle.SCALE_TOO_DIFFERENT, Obstacle.TOO_FEW_MATCHES}


@pytest.fixture(scope="module")
def pair(segmenter: Segmenter, whole) -> tuple[Capture, Capture]:
    before, after = capture(whole[0], segmenter), capture(again(whole[0]), segmenter)
    assert examine(before, after).changes
    return before, after


@pytest.mark.parametrize(
    ("doubt", "obstacle"),
    [
        (OutlineDoubt.NO_LESION, Obstacle.NO_LESION),
        (OutlineDoubt.TOUCHES_FRAME, Obstacle.LESION_NOT_WHOLE),
        (OutlineDoubt.SEVERAL_COMPONENTS, Obstacle.SEVERAL_LESIONS),
        (OutlineDoubt.LOW_CONFIDENCE, Obstacle.OUTLINE_NOT_SURE),
    ],
)
def test_a_doubt_about_either_outline_withholds_everything(
    pair, doubt: OutlineDoubt, obstacle: Obstacle
) -> None:
    for at, which in enumerate(Which):
        doubted = replace(pair[at], outline=replace(pair[at].outline, doubts=(doubt,)))
        found = judge(examine(*(doubted if i == at else one for i, one in enumerate(pair))), LIMITS, {})
        assert not found.comparable
        assert [(h.obstacle, h.image) for h in found.hindrances] == [(obstacle, which)]
        assert found.registration is not None, "an overlay may still be shown"


def test_a_lesion_under_the_dark_field_is_not_whole(pair) -> None:
    before, after = pair
    rows = np.flatnonzero(before.outline.mask.any(1))
    field = np.zeros_like(before.field)
    field[: rows[0] - 2] = True
    found = examine(replace(before, field=field), after)
    assert not found.changes
    assert [(h.obstacle, h.image) for h in found.hindrances] == [(Obstacle.LESION_NOT_WHOLE, Which.EARLIER)]


def test_colour_is_withheld_without_skin_around_and_size_is_not(pair) -> None:
    before, after = pair
    field = ~(cv2.dilate(before.outline.mask.astype(np.uint8), np.ones((15, 15))) > 0)
    found = judge(examine(replace(before, field=field), after), LIMITS, {})
    assert {m.metric for m in found.measures} == set(Metric) - {Metric.COLOUR, Metric.FOCAL_COLOUR}
    (told,) = found.hindrances
    assert told.obstacle is Obstacle.SKIN_NOT_VISIBLE
    assert set(told.withheld) == {Metric.COLOUR, Metric.FOCAL_COLOUR}


def test_size_is_withheld_where_the_scale_is_not_known_unless_the_device_says_it(pair, monkeypatch) -> None:
    monkeypatch.setattr("deployments.change.comparison.MOST_SCALE_ERROR", 0.0)
    found = examine(*pair)
    assert set(found.changes) == set(Metric) - SIZES
    assert [h.obstacle for h in found.hindrances] == [Obstacle.SCALE_NOT_KNOWN]
    assert set(found.hindrances[0].withheld) == SIZES
    assert set(examine(*pair, (0.02, 0.02)).changes) == set(Metric)


def test_the_devices_scale_decides_size_where_it_is_known(pair, whole) -> None:
    """Registered, the second capture shows the same lesion at 0.85; by its device it is larger than it was."""
    before, after = pair
    by_skin = examine(before, after).changes
    one = 0.03 * before.reduction  # so that a pixel of the earlier frame is 0.03 mm
    other = 0.03 / 0.85 * after.reduction
    same = examine(before, after, (one, other)).changes
    assert same[Metric.AREA].change == pytest.approx(by_skin[Metric.AREA].change, rel=0.03)
    assert same[Metric.AREA].earlier == pytest.approx(before.outline.mask.sum() * 0.03**2)
    assert same[Metric.DIAMETER].earlier == pytest.approx(describe(before.outline.mask)[0].diameter * 0.03)
    larger = examine(before, after, (one, 1.2 * other)).changes
    assert larger[Metric.DIAMETER].change == pytest.approx(1.2 * by_skin[Metric.DIAMETER].change, rel=0.02)
    assert larger[Metric.AREA].change == pytest.approx(1.44 * by_skin[Metric.AREA].change, rel=0.03)


def test_without_a_device_scale_no_size_has_a_unit(pair) -> None:
    for metric in SIZES:
        change = examine(*pair).changes[metric]
        assert (change.earlier, change.later) == (None, None)


@pytest.mark.parametrize(("change", "verdict"), [
    (1.24, Verdict.WITHIN), (1.26, Verdict.BEYOND_REPEATABILITY), (1 / 1.24, Verdict.WITHIN), (1 / 1.26, Verdict.BEYOND_REPEATABILITY),
])  # fmt: skip
def test_a_verdict_takes_the_limits_upper_end_either_way(pair, change: float, verdict: Verdict) -> None:
    found = examine(*pair)
    area = replace(found.changes[Metric.AREA], change=change)
    (told,) = judge(replace(found, changes={Metric.AREA: area}), LIMITS, {}).measures
    assert (told.verdict, told.limit, told.limit_interval) == (verdict, 1.2, (1.1, 1.25))


def test_limits_of_another_method_are_refused(segmenter: Segmenter) -> None:
    with pytest.raises(ModelContractError, match="method"):
        Comparer(segmenter, replace(LIMITS, method=METHOD + 1))


def test_limits_are_those_of_pairs_like_this_one() -> None:
    strata = [
        Stratum(name, scale, sharp, {})
        for name, scale, sharp in (("a", 1.25, 50.0), ("b", 1.25, 0.0), ("c", 2.0, 50.0), ("d", 2.0, 0.0))
    ]
    limits = replace(LIMITS, strata=tuple(strata))
    asked = ((1.1, 60.0), (1.1, 40.0), (1.5, 60.0), (1.5, 40.0), (9.0, 60.0))
    assert "".join(limits.stratum(*pair).name for pair in asked) == "abcdd"


def disc(radius: float, centre: tuple[float, float] = (150.0, 150.0), stretch: float = 1.0) -> np.ndarray:
    y, x = np.indices((300, 300))
    return ((x - centre[0]) / stretch) ** 2 + (y - centre[1]) ** 2 < radius**2


def test_shapes_are_what_geometry_says() -> None:
    round_, axis = describe(disc(60))
    assert round_.area == pytest.approx(np.pi * 60**2, rel=0.01)
    assert round_.diameter == pytest.approx(120, abs=1.5)
    assert round_.asymmetry < 0.02
    assert round_.irregularity < 0.02
    ellipse, axis = describe(disc(40, stretch=2.0))
    assert ellipse.diameter == pytest.approx(160, abs=2)
    assert abs(axis) < 0.02
    bitten, _ = describe(disc(60) & ~disc(40, (210, 150)))
    assert bitten.irregularity > 0.08
    assert bitten.asymmetry > 0.05


def test_asymmetry_is_about_the_same_axes_of_the_skin_in_both() -> None:
    """A lesion that is turned and nothing else keeps its asymmetry, also where its long axis is hard to tell."""
    mask = disc(60) | disc(25, (195, 170))
    matrix = cv2.getRotationMatrix2D((150, 150), -35, 1.0)
    turned = cv2.warpAffine(mask.astype(np.uint8), matrix, (300, 300), flags=cv2.INTER_NEAREST) > 0
    found = measure_shape(mask, turned, Fit(matrix, 99, 0.0))
    assert abs(found[Metric.ASYMMETRY].change) < 0.01
    assert found[Metric.AREA].change == pytest.approx(1.0, abs=0.01)


def test_a_comparison_is_written_as_json_and_read_again(pair) -> None:
    found = judge(examine(*pair), LIMITS, {"features": 1.0})
    adapter = TypeAdapter(Comparison)
    assert adapter.validate_json(adapter.dump_json(found)) == found


def test_the_same_pair_has_the_same_answer(comparer: Comparer, whole) -> None:
    later = again(whole[1])
    first, second = (replace(comparer.compare(whole[1], later), milliseconds={}) for _ in range(2))
    assert first == second


def test_a_dark_field_or_ink_over_the_second_image_calls_nothing_changed(
    comparer: Comparer, segmenter, whole
) -> None:
    called, compared = 0, 0
    for i, pixels in enumerate(whole):
        frame = again(pixels, 10.0, 0.95, seed=i)
        mask = segmenter.outline(frame).mask
        for kind in ("round dark field", "ink ring"):
            found = comparer.compare(pixels, cluttered(frame, mask, np.random.default_rng(i), kind=kind))
            compared += found.comparable
            called += bool(found.beyond)
    assert compared >= 5
    assert called <= 1


def test_grown_is_as_much_larger_as_it_says(whole, segmenter: Segmenter) -> None:
    """The benchmark's own injection: a painted lesion comes out with the area asked for, its middle where it was."""
    mask = disc(40)
    frame = np.where(mask[..., None], (90, 50, 40), (220, 180, 160)).astype(np.uint8)
    frame[145:155, 145:155] = 0
    for by in (1.2, 1.4, 2.0):
        larger = grown(frame, mask, np.random.default_rng(0), by=by)
        assert (larger[..., 0] < 155).sum() == pytest.approx(by * mask.sum(), rel=0.03)
        assert np.array_equal(larger[146:154, 146:154], frame[146:154, 146:154])
