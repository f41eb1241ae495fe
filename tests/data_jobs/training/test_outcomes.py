"""What a clinician would be told of a fold, counted; and what turns and clutter do to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
import pytest

from data_jobs.references.load import ReferenceBundle
from data_jobs.training.dataset import LabelledImage, read_clinical, read_rows
from data_jobs.training.evaluation import robustness
from data_jobs.training.evaluation.outcomes import (
    Answers,
    LocalService,
    ReferenceSearch,
    outcome_figures,
)
from deployments.preprocess.preprocess import PreparedImage, measure_quality
from deployments.risk.policy import read_policy
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.records.references import ReferenceImage

MEL, NV, BCC = (TRAINED.index(d) for d in (Diagnosis.MEL, Diagnosis.NV, Diagnosis.BCC))


def test_the_less_favourable_image_of_a_lesion_counts(
    make_row: Callable[..., LabelledImage], make_answers: Callable[..., Answers]
) -> None:
    labels = [MEL, MEL, NV, NV, MEL, BCC]
    rows = [replace(make_row(i, label), lesion_id=f"L{i // 2}") for i, label in enumerate(labels)]
    found = outcome_figures(
        rows,
        make_answers(
            *(("decided", "high"), ("decided", "low"), ("review", "low"), ("decided", "high")),
            *(("refused", None), ("review", "low")),
            reasons=["low_margin", "out_of_distribution"],
        ),
        read_policy(),
    )
    melanomas, naevi = found["by_lesion"]["MEL"], found["by_lesion"]["NV"]
    assert melanomas == {"cases": 2, "low": 1, "medium": 0, "high": 0, "low_decided": 1, "refused": 1}
    assert naevi == {"cases": 1, "low": 0, "medium": 0, "high": 1, "low_decided": 0, "refused": 0}
    # One lesion under two diagnoses counts for each; in review, it was not let go.
    assert found["by_lesion"]["BCC"] | {"low_decided": 0} == found["by_lesion"]["BCC"]
    assert found["by_image"]["MEL"] == {
        "cases": 3,
        "low": 1,
        "medium": 0,
        "high": 1,
        "low_decided": 1,
        "refused": 1,
    }
    assert (found["review"], found["refused"], found["for_unknown"]) == (0.3333, 0.1667, 0.5)
    assert found["causes"] == {"low_margin": 0.5, "out_of_distribution": 0.5}
    assert found["mean_set_size"] == 2.0


def test_neighbours_are_of_other_lesions_and_one_of_each() -> None:
    cases = [("a", "NV"), ("a", "NV"), ("b", "MEL"), ("c", "NV"), (None, "BCC")]
    images = [
        ReferenceImage(f"ISIC_{i}", lesion, Diagnosis(d), "histo", None, None, None, "CC-0", "")
        for i, (lesion, d) in enumerate(cases)
    ]
    angles = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    search = ReferenceSearch(ReferenceBundle(images, embeddings))
    query = embeddings[0]
    found = search.nearest(query, k=3, lesion="unseen")
    assert [case.isic_id for case in found.similar] == ["ISIC_0", "ISIC_2", "ISIC_3"]
    assert found.malignant_share == pytest.approx(1 / 3)
    mine = search.nearest(query, k=3, lesion="a")
    assert [case.isic_id for case in mine.similar] == ["ISIC_2", "ISIC_3", "ISIC_4"]
    assert mine.nearest_benign is not None
    assert mine.nearest_malignant is not None
    assert (mine.nearest_benign.isic_id, mine.nearest_malignant.isic_id) == ("ISIC_3", "ISIC_2")


def test_a_fold_is_answered_from_its_files(isic_dir: Path, models: Path, model_id: str) -> None:
    rows = [row for row in read_rows(isic_dir) if row.fold == 0][:5] + read_clinical(isic_dir)[:2]
    model = ModelStore(models).open(model_id)
    service = LocalService(model, read_policy(), threads=1)
    images = service.prepare(rows, isic_dir)
    found = service.answer(rows, images)
    assert found.nine.sum(1) == pytest.approx(np.ones(len(rows)))
    assert all((found.levels == "") == (found.outcomes == "refused"))
    picked = np.array([3, 1])
    again = service.answer([rows[i] for i in picked], [images[i] for i in picked])
    assert again.nine == pytest.approx(found[picked].nine, abs=1e-5)
    assert list(again.urgencies) == list(found.urgencies[picked])


def noise(side: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rough = np.random.default_rng(2).integers(90, 200, (8, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", robustness.CLUTTER)
def test_clutter_is_put_on_the_same_way_twice(kind: str) -> None:
    image = Image.fromarray(noise())
    first, second, other = (
        np.asarray(robustness.CLUTTER[kind](image, np.random.default_rng(seed))) for seed in (4, 4, 5)
    )
    assert np.array_equal(first, second)
    assert first.shape == noise().shape
    touched = (np.abs(first.astype(int) - noise()).max(2) > 3).mean()
    assert 0.02 < touched <= 1.0
    if not kind.startswith("JPEG"):
        assert not np.array_equal(first, other)


def test_four_quarter_turns_are_none() -> None:
    turned = [noise(), *(turn(noise()) for name, turn in robustness.TURNS.items() if "turned" in name)]
    for one, next_one in pairwise(turned):
        assert np.array_equal(np.rot90(one), next_one)
    assert np.array_equal(robustness.TURNS["mirrored"](noise())[:, -1], noise()[:, 0])
    assert robustness.softened(noise(96)).shape == (96, 96, 3)


class BrightnessService:
    """`high` where the upper half is darker than the lower one, `low` elsewhere."""

    def __init__(self, make_answers: Callable[..., Answers]) -> None:
        self.make_answers = make_answers

    def answer(self, _: Sequence[LabelledImage], images: Sequence[PreparedImage]) -> Answers:
        told: list[tuple[str, str | None]] = []
        for image in images:
            upper, lower = (half.mean() for half in np.array_split(image.pixels, 2))
            told.append(("decided", "high" if upper < lower else "low"))
        return self.make_answers(*told)


def test_a_level_that_hangs_on_the_view_is_counted(
    make_row: Callable[..., LabelledImage], make_answers: Callable[..., Answers]
) -> None:
    service: Any = BrightnessService(make_answers)
    rows = [make_row(i, MEL if i < 10 else NV) for i in range(30)]
    dark = np.full((64, 64, 3), 120, np.uint8)
    dark[:32] = 60
    prepared = PreparedImage(dark, 64, 64, "image/png", measure_quality(dark, damaged=0.01))
    images = [prepared] * len(rows)
    before = service.answer(rows, images)
    views = robustness.view_figures(service, rows, images, before)
    assert views["images"] == 30
    assert views["views"]["turned by 180°"] == {"top1_changes": 0.0, "level_changes": 1.0}
    assert views["views"]["mirrored"] == {"top1_changes": 0.0, "level_changes": 0.0}
    assert robustness.altered(prepared, dark[::-1]).quality.damaged == 0.01
    found = robustness.clutter_figures(service, rows, images, before, seed=1)
    # Two images a lesion, one of which is taken; every tenth has none.
    assert found["melanomas"] == found["melanomas_high"] == len({row.lesion for row in rows[:10]})
    assert found["kinds"]["colour cast"]["lost"] == 0
    assert found["kinds"].keys() == robustness.CLUTTER.keys()
