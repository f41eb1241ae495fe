from __future__ import annotations

from pathlib import Path

import pytest

from data_jobs.training.recipe import read_recipe

RECIPE = Path("data_jobs/training/recipes/tf_efficientnet_lite0.toml")
SUCCESSOR = Path("data_jobs/training/recipes/tf_efficientnet_lite0_derm2.toml")


def test_the_first_recipe_reads() -> None:
    recipe = read_recipe(RECIPE)
    assert recipe.model_id == "tf_efficientnet_lite0.derm1"
    assert recipe.data.test_fold == 0
    assert recipe.data.train_folds == (1, 2, 3)
    assert recipe.epoch_sides == tuple(s.side for s in recipe.stages for _ in range(s.epochs))


def test_the_shipped_recipe_starts_from_the_first_model() -> None:
    start = read_recipe(SUCCESSOR).start
    assert start is not None
    assert start.model_id == read_recipe(RECIPE).model_id
    assert len(bytes.fromhex(start.checkpoint_sha256)) == 32


def test_one_fold_may_be_calibrated_and_tested_on(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        RECIPE.read_text(encoding="utf-8").replace("calibration_fold = 4", "calibration_fold = 0")
    )
    plan = read_recipe(path).data
    assert plan.test_fold == plan.calibration_fold == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = ", "sead = ", "seed"),
        ("clip_norm", "clip_nrom", "clip_nrom"),
        ("train_folds = [1, 2, 3]", "train_folds = [0, 1, 2]", "overlap"),
        ("calibration_fold = 4", "calibration_fold = 3", "overlap"),
        ("[serving]", '[start]\nmodel_id = "m"\n[serving]', "checkpoint_sha256"),
        ("[serving]", "[extra]\nx = 1\n[serving]", "extra"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_recipe(path)
