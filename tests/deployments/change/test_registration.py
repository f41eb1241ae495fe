"""Skin is found again under another turn, magnification and light, and other skin is not."""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np
import pytest

from data_jobs.training.repeatability import Picture
from deployments.change.registration import (
    LEAST_INLIERS,
    MOST_SCALE,
    MOST_SCALE_ERROR,
    SIDE,
    Features,
    Matches,
    carried,
    dark_field,
    find_features,
    fit,
    make_frame,
    match,
)


def recaptured(
    frame: np.ndarray, degrees: float, scale: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The frame as another capture would have it, and where its points then lie, 2×3."""
    rng = np.random.default_rng(seed)
    height, width = frame.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)
    matrix[:, 2] += rng.uniform(-15, 15, 2)
    moved = cv2.warpAffine(frame, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    moved = cv2.GaussianBlur(moved, (0, 0), 0.7) * rng.uniform(0.85, 1.1, 3) + rng.normal(0, 4, moved.shape)
    return np.clip(moved, 0, 255).astype(np.uint8), matrix


@pytest.mark.parametrize(("degrees", "scale"), [(0, 1.0), (25, 0.85), (-60, 1.2), (180, 1.5), (10, 0.6)])
def test_a_turn_a_magnification_and_another_light_are_found_to_a_pixel(whole, degrees, scale) -> None:
    for pixels in whole:
        frame = make_frame(pixels)
        later, matrix = recaptured(frame, degrees, scale)
        found = fit(match(find_features(frame), find_features(later)))
        assert found is not None
        assert found.inliers >= LEAST_INLIERS
        corners = np.array([(0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7)]) * frame.shape[1::-1]
        error = np.linalg.norm(carried(corners, found.matrix) - carried(corners, matrix), axis=1)
        assert error.max() < 3.0
        assert found.scale == pytest.approx(scale, rel=0.01)
        assert found.scale_error < MOST_SCALE_ERROR


def test_the_similarity_holds_for_images_of_any_resolution(whole) -> None:
    frame = make_frame(whole[0])
    later, matrix = recaptured(frame, 30, 1.2)
    double = cv2.resize(frame, None, fx=2.5, fy=2.5, interpolation=cv2.INTER_CUBIC)
    found = fit(match(find_features(make_frame(double)), find_features(later)))
    assert found is not None
    x, y = found.similarity().carry(0.5, 0.6)
    (wanted,) = carried(np.array([(0.5 * SIDE, 0.6 * SIDE)]), matrix) / SIDE
    assert (x, y) == pytest.approx(wanted, abs=0.01)


def test_the_same_pair_has_the_same_numbers_whatever_ran_before_and_on_however_many_threads(whole) -> None:
    first, second = make_frame(whole[0]), recaptured(make_frame(whole[0]), 20, 0.9)[0]
    found, threads = [], cv2.getNumThreads()
    try:
        for count in (1, 4, 2):
            cv2.setNumThreads(count)
            cv2.setRNGSeed(count)
            found.append(fit(match(find_features(first), find_features(second))))
            fit(match(find_features(second), find_features(make_frame(whole[1]))))
    finally:
        cv2.setNumThreads(threads)
    assert all(np.array_equal(each.matrix, found[0].matrix) for each in found)
    assert len({(each.inliers, each.scale_error) for each in found}) == 1


def test_different_lesions_do_not_register(pictures: list[Picture]) -> None:
    firsts = list({picture.lesion: picture for picture in pictures}.values())
    chosen = firsts[:: len(firsts) // 15][:15]
    features = [find_features(make_frame(picture.read())) for picture in chosen]
    fits = [fit(match(a, b)) for a, b in combinations(features, 2)]
    held = [f for f in fits if f and f.inliers >= LEAST_INLIERS and 1 / MOST_SCALE <= f.scale <= MOST_SCALE]
    assert not held


def test_the_rim_of_a_dark_field_is_no_feature(whole) -> None:
    """Two lesions under one dermatoscope have the same rim."""
    frames = [make_frame(pixels) for pixels in whole[:4]]
    y, x = np.indices(frames[0].shape[:2])
    outside = np.hypot(x - frames[0].shape[1] / 2, y - SIDE / 2) > 130
    under = [
        np.where(outside[..., None], 6, cv2.resize(f, outside.shape[::-1])).astype(np.uint8) for f in frames
    ]
    assert (dark_field(under[0]) == outside).mean() > 0.995
    features = [find_features(frame) for frame in under]
    for found in features:
        away = 130 - np.hypot(found.points[:, 0] - outside.shape[1] / 2, found.points[:, 1] - SIDE / 2)
        assert away.min() > 10
    for a, b in combinations(features, 2):
        found = fit(match(a, b))
        assert found is None or found.inliers < LEAST_INLIERS


def test_a_black_lesion_is_no_dark_field(whole) -> None:
    frame = np.full((SIDE, SIDE, 3), 190, np.uint8)
    cv2.circle(frame, (150, 150), 60, (10, 8, 9), -1)
    assert not dark_field(frame).any()


def test_what_lies_in_one_spot_gives_no_scale_to_measure_by() -> None:
    rng = np.random.default_rng(0)
    spot = rng.uniform(100, 112, (20, 2)).astype(np.float32)
    wide = rng.uniform(20, 280, (20, 2)).astype(np.float32)
    noise = rng.normal(0, 1.0, (20, 2)).astype(np.float32)
    near, far = (fit(Matches(points, points + noise)) for points in (spot, wide))
    assert far is not None
    assert far.scale_error < MOST_SCALE_ERROR
    assert near is not None
    assert near.scale_error > MOST_SCALE_ERROR


def test_of_several_matches_to_one_corner_one_is_kept() -> None:
    rng = np.random.default_rng(0)
    later = Features(
        rng.uniform(0, 300, (30, 2)).astype(np.float32), rng.integers(0, 256, (30, 32), np.uint8)
    )
    twice = Features(np.tile(later.points, (2, 1)), np.tile(later.descriptors, (2, 1)))
    found = match(twice, later)
    assert len(found.earlier) == len(np.unique(found.later, axis=0)) == 30


def test_a_strip_of_an_image_makes_no_huge_frame() -> None:
    assert make_frame(np.zeros((224, 40000, 3), np.uint8)).shape == (7, 4 * SIDE, 3)
    assert make_frame(np.zeros((1200, 900, 3), np.uint8)).shape == (400, SIDE, 3)


def test_an_image_without_features_registers_with_nothing() -> None:
    blank = find_features(np.full((SIDE, SIDE, 3), 180, np.uint8))
    assert len(blank.points) == 0
    assert fit(match(blank, blank)) is None
