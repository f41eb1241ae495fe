"""One lesion under two names is found whatever was done to its image, and the test fold keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from data_jobs.training.dataset import BCN84, EXCLUDED, LabelledImage, read_bcn84, read_rows

pytest.importorskip("skimage", reason="needs the train extra")

from skimage import data

from data_jobs.training.augment import soften
from data_jobs.training.duplicates import (
    INLIERS,
    Keypoints,
    across_folds,
    near_embeddings,
    near_hashes,
    perceptual_hashes,
    twin_of,
    write_excluded,
)


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()[..., :3]).resize((224, 224))


def test_a_hash_knows_an_image_softened_and_turned() -> None:
    image = photograph("astronaut")
    turned = soften(image).rotate(90)
    images = [image, photograph("coffee"), turned, photograph("chelsea")]
    assert list(near_hashes(np.stack([perceptual_hashes(np.asarray(i)) for i in images]))) == [(0, 2)]


def test_neighbours_are_pairs_of_like_direction() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    vectors[31] = 2.0 * vectors[4] + 0.01
    assert set(near_embeddings(vectors, chunk=16)) == {(4, 31)}


def test_keypoints_tell_another_view_of_one_thing_from_another_thing() -> None:
    image = photograph("astronaut")
    other_view = image.rotate(25, Image.Resampling.BICUBIC).crop((20, 20, 204, 204))
    keypoints = Keypoints(
        [np.asarray(i) for i in (image, other_view, photograph("coffee"), Image.new("RGB", (224, 224)))]
    )
    assert keypoints.inliers((0, 1)) >= INLIERS
    assert keypoints.inliers((0, 2)) < INLIERS
    assert keypoints.inliers((0, 3)) == 0


def test_the_test_fold_keeps_a_lesion_and_the_archive_before_bcn84(
    tmp_path: Path, make_row: Callable[..., LabelledImage]
) -> None:
    test, train = make_row(9), replace(make_row(3), fold=2)
    other = replace(make_row(1), fold=3, source=BCN84)
    assert across_folds([test, train, make_row(5)], {(0, 1), (0, 2)}) == [(0, 1)]
    twins = [twin_of(train, test, 40, 0), twin_of(other, train, 15, 0), twin_of(other, test, 20, 0)]
    assert [(t.kept, t.dropped) for t in twins] == [(test, train), (train, other), (test, other)]
    write_excluded(twins, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {train.lesion, other.lesion}
    assert found[other.lesion]["twin"] == test.isic_id


def test_what_was_found_is_of_this_archive_and_not_of_the_test_fold(isic_dir: Path) -> None:
    rows = {row.isic_id: row for row in read_rows(isic_dir) + read_bcn84(isic_dir)}
    excluded = json.loads(EXCLUDED.read_text())
    assert excluded
    for lesion, twin in excluded.items():
        dropped, kept = rows[twin["image"]], rows[twin["twin"]]
        assert (dropped.lesion, dropped.fold, kept.fold) == (lesion, twin["fold"], twin["twin_fold"])
        assert dropped.fold not in {0, kept.fold}
