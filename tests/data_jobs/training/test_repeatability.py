"""Limits are what 95 of 100 pairs stay within, made of one half of the lesions and of distinct captures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
import json
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest

from data_jobs.training.dataset import read_rows
from data_jobs.training.repeatability import (
    ALIKE_SCALE,
    LEAST_PAIRS,
    NEAR_IDENTICAL,
    Pair,
    archive_pictures,
    beyond_shares,
    compare_all,
    distinct,
    fit_limit,
    fit_repeatability,
    fit_strata,
    makes,
    repeated,
    seal,
    site_pairs,
    write_repeatability,
)
from deployments.change.segmenter import Segmenter
from model_store.segmenter import open_segmenter, read_repeatability
from serve_app.domain.comparison import Metric
from serve_app.domain.errors import ModelContractError
from serve_app.settings import REPOSITORY

(SHIPPED,) = (REPOSITORY / "model_store" / "segmenters").iterdir()


def made(count: int, spread: float, seed: int = 0, **values: object) -> list[Pair]:
    """Pairs of unchanged lesions, one a lesion."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0.0, spread, (count, len(Metric)))
    return [
        replace(
            Pair(f"L{seed}-{i}", ("a", "b"), 1.1, 99, float(rng.uniform(10, 90)), 0.4, {}, ()),
            changes={m: float(np.exp(v) if m.is_ratio else v) for m, v in zip(Metric, row, strict=True)},
            **values,
        )
        for i, row in enumerate(drawn)
    ]


def test_a_limit_is_the_95th_percentile_and_its_interval_holds_it() -> None:
    limit = fit_limit(made(2000, 0.1), Metric.AREA, 0)
    assert np.log(limit.limit) == pytest.approx(1.96 * 0.1, rel=0.06)
    assert limit.low < limit.limit < limit.high
    few = fit_limit(made(100, 0.1), Metric.AREA, 0)
    assert few.high - few.low > limit.high - limit.low


def test_the_interval_resamples_lesions_not_pairs() -> None:
    """A hundred pairs of ten lesions tell less than a hundred of a hundred."""
    pairs = made(100, 0.1)
    few = [
        replace(pair, lesion=f"L{i // 10}", changes=pairs[i // 10].changes) for i, pair in enumerate(pairs)
    ]
    wide, narrow = (fit_limit(kind, Metric.ASYMMETRY, 0) for kind in (few, pairs))
    assert wide.high - wide.low > narrow.high - narrow.low


def test_the_half_that_did_not_make_the_limits_is_called_changed_in_5_percent_at_most() -> None:
    found, report = fit_repeatability(made(3000, 0.1), "made up", "0" * 64)
    assert found.pairs == pytest.approx(1500, abs=150)
    for metric in Metric:
        assert report["tested"]["all"][metric]["beyond"] <= 0.05
    changed = beyond_shares(made(500, 0.4), found.strata)["all"]
    assert all(changed[metric]["beyond"] > 0.4 for metric in Metric)


def test_no_lesion_is_on_both_sides_and_the_halves_are_even() -> None:
    sides = [makes(f"HAM_{i:07d}") for i in range(2000)]
    assert np.mean(sides) == pytest.approx(0.5, abs=0.05)


def test_one_photograph_made_two_is_no_repeated_capture() -> None:
    """They would make the limits too narrow, at whatever magnification."""
    pairs = made(400, 0.1)
    copies = made(400, 0.001, 1, likeness=NEAR_IDENTICAL + 0.01, scale=1.6)
    assert distinct(pairs + copies) == pairs
    found, report = fit_repeatability(pairs + copies, "made up", "0" * 64)
    assert found.near_identical == report["near_identical"] == 400
    assert found.strata == fit_repeatability(pairs, "made up", "0" * 64)[0].strata


def test_limits_go_by_magnification_and_sharpness_where_there_are_enough() -> None:
    near = [replace(p, scale=1.1) for p in made(400, 0.05)]
    far = [replace(p, scale=1.8) for p in made(400, 0.2, 1)]
    strata = fit_strata(near + far)
    assert len(strata) == 4
    assert [s.most_scale == ALIKE_SCALE for s in strata] == [True, True, False, False]
    assert strata[1].limits[Metric.AREA].limit < 1.2 < strata[3].limits[Metric.AREA].limit
    assert strata[0].least_sharpness > 0.0 == strata[1].least_sharpness


def test_too_few_pairs_of_a_kind_count_for_the_next_and_too_few_at_all_are_refused() -> None:
    near = made(LEAST_PAIRS, 0.1)
    strata = fit_strata(near)
    assert len(strata) == 1
    assert strata[0].limits[Metric.AREA].pairs == len(near)
    assert strata[0].least_sharpness == 0.0
    with pytest.raises(ValueError, match=str(LEAST_PAIRS)):
        fit_strata(near[: LEAST_PAIRS - 1])
    with pytest.raises(ValueError, match=str(LEAST_PAIRS)):
        fit_strata([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / SHIPPED.name))


def test_limits_are_sealed_into_the_segmenters_folder(folder: Path) -> None:
    stored = open_segmenter(folder)
    found, _ = fit_repeatability(made(3000, 0.1), "made up", stored.graph)
    after = seal(stored, found)
    assert after.repeatability == found
    assert after.manifest.model_id == stored.manifest.model_id
    assert after.digest != stored.digest
    path = folder / after.manifest.repeatability
    path.write_text(path.read_text().replace("made up", "forged"))
    with pytest.raises(ModelContractError, match=path.name):
        open_segmenter(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(graph="1" * 64), "another graph"),
        (lambda c: c["strata"][0]["limits"].pop("area"), "lacks a metric"),
        (lambda c: c.update(strata=[]), "every pair"),
        (lambda c: c["strata"][-1].update(least_sharpness=1.0), "every pair"),
        (lambda c: c["strata"][0]["limits"]["area"].update(high=float("nan")), "finite"),
        (lambda c: c["strata"][0]["limits"]["area"].update(low=0.9), "finite"),
        (lambda c: c.update(live=True), "live"),
    ],
)
def test_limits_that_are_none_are_refused(tmp_path: Path, change, named: str) -> None:
    found, _ = fit_repeatability(made(600, 0.1), "made up", "0" * 64)
    write_repeatability(found, path := tmp_path / "site.json")
    assert read_repeatability(path, "0" * 64) == found
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ModelContractError, match=named):
        read_repeatability(path, "0" * 64)


def write_captures(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), (200, 160, 150)).save(folder / name)


def test_a_site_gives_a_folder_of_lesions_or_a_list_of_pairs(tmp_path: Path) -> None:
    write_captures(tmp_path, ("l1/a.png", "l1/b.png", "l1/c.png", "l2/a.png", "l2/b.png"))
    assert len(site_pairs(tmp_path)) == 4
    (tmp_path / "pairs.csv").write_text("earlier,later,lesion\nl1/a.png,l1/b.png,x\nl2/a.png,l2/b.png,y\n")
    pairs = site_pairs(tmp_path / "pairs.csv")
    assert [(a.lesion, a.path.name, b.path.name) for a, b in pairs] == [
        ("x", "a.png", "b.png"),
        ("y", "a.png", "b.png"),
    ]
    assert pairs[0][0].read().shape == (200, 300, 3)
    (tmp_path / "pairs.csv").write_text("first,second\n1,2\n")
    with pytest.raises(ValueError, match="earlier and later"):
        site_pairs(tmp_path / "pairs.csv")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no repeated"):
        site_pairs(tmp_path / "none")


def test_the_shipped_limits_hold_on_real_captures_that_nothing_was_fitted_on(isic_dir: Path) -> None:
    stored = open_segmenter(SHIPPED)
    assert stored.repeatability is not None
    pairs = repeated(archive_pictures(read_rows(isic_dir), isic_dir, (0,)))
    compared = compare_all(pairs[:: len(pairs) // 40], Segmenter(stored, threads=1), 1)
    assert np.mean([bool(pair.changes) for pair in compared]) > 0.3
    beyond = beyond_shares(distinct(compared), stored.repeatability.strata)["all"]
    assert np.mean([beyond[metric]["beyond"] for metric in Metric]) < 0.12


def test_archive_images_are_read_at_true_aspect(isic_dir: Path) -> None:
    pictures = list(archive_pictures(read_rows(isic_dir), isic_dir, (0,)))
    shapes = {picture.squashed: picture.read().shape for picture in pictures}
    assert shapes[True][1] * 3 == shapes[True][0] * 4
