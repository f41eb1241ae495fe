from __future__ import annotations

from pathlib import Path

import pytest

from data_jobs.training.plans import WeightsPlan
from data_jobs.training.recipe import read_recipe

RECIPE = Path("data_jobs/training/recipes/tf_efficientnet_lite0.toml")
DIGEST = "ab" * 32
WEIGHTS = f'[weights]\nfile = "a.safetensors"\nsha256 = "{DIGEST}"'
SUCCESSOR = Path("data_jobs/training/recipes/tf_efficientnet_lite0_derm2.toml")
ENSEMBLE = Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml")
STUDENT = Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm8.toml")


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


def test_a_recipe_may_name_weights_for_its_trunk(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'{RECIPE.read_text(encoding="utf-8")}\n[weights]\nfile = "b4.safetensors"\nsha256 = "{DIGEST}"\n',
        encoding="utf-8",
    )
    recipe = read_recipe(path)
    assert recipe.weights == WeightsPlan("b4.safetensors", DIGEST)
    assert recipe.training_digest != read_recipe(RECIPE).training_digest


def test_the_digest_is_that_of_the_plan_and_not_of_its_words(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = RECIPE.read_text(encoding="utf-8")
    path.write_text(f"# another comment\n{text}", encoding="utf-8")
    digest = read_recipe(RECIPE).training_digest
    assert read_recipe(path).training_digest == digest
    path.write_text(text.replace("trunk_lr = 6e-4", "trunk_lr = 5e-4"), encoding="utf-8")
    assert read_recipe(path).training_digest != digest


def test_a_member_of_an_ensemble_leaves_out_a_fold_of_its_own() -> None:
    recipe = read_recipe(ENSEMBLE)
    members = [recipe.member(fold) for fold in recipe.data.train_folds]
    assert [m.data.left_out for m in members] == [1, 2, 3, 4]
    assert len({m.training_digest for m in members} | {recipe.training_digest}) == 5
    assert len({m.model_id for m in members} | {m.seed for m in members}) == 8
    with pytest.raises(ValueError, match="none of the training folds"):
        recipe.member(recipe.data.test_fold)


def test_one_fold_may_be_calibrated_and_tested_on(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        RECIPE.read_text(encoding="utf-8").replace("calibration_fold = 4", "calibration_fold = 0")
    )
    plan = read_recipe(path).data
    assert plan.test_fold == plan.calibration_fold == 0


@pytest.mark.parametrize(
    ("recipe", "old", "new", "message"),
    [
        (RECIPE, "seed = ", "sead = ", "seed"),
        (RECIPE, "clip_norm", "clip_nrom", "clip_nrom"),
        (RECIPE, "train_folds = [1, 2, 3]", "train_folds = [0, 1, 2]", "overlap"),
        (RECIPE, "calibration_fold = 4", "calibration_fold = 3", "overlap"),
        (RECIPE, "[serving]", '[start]\nmodel_id = "m"\n[serving]', "checkpoint_sha256"),
        (RECIPE, "[serving]", "[extra]\nx = 1\n[serving]", "extra"),
        (RECIPE, "[serving]", '[weights]\nfile = "a.safetensors"\n[serving]', "sha256"),
        (
            RECIPE,
            "[serving]",
            f'[weights]\nfile = "a.safetensors"\nsha256 = "{"A" * 64}"\n[serving]',
            "lower-case",
        ),
        (
            RECIPE,
            "[serving]",
            f'[weights]\nfile = "a.pth"\nsha256 = "{DIGEST}"\n[serving]',
            "safetensors files",
        ),
        (
            RECIPE,
            "[serving]",
            f'[start]\nmodel_id = "m"\ncheckpoint_sha256 = "{DIGEST}"\n{WEIGHTS}\n[serving]',
            "not from both",
        ),
        (STUDENT, "share = 0.7", "share = 0.8", "make up 1"),
        (STUDENT, "loss_share = 0.8", "loss_share = 0.0", "over 0 and at most 1"),
        (STUDENT, "loss_share = 0.8", "loss_share = 1.5", "over 0 and at most 1"),
        (STUDENT, "side = 160\nepochs", "side = 192\nepochs", "cannot see more than its teachers"),
        (STUDENT, 'model_sha256 = "', 'model_sha256 = "X', "lower-case"),
        (STUDENT, "prior_shift = 0.4 ", "prior = 0.4 ", "unknown prior"),
        (STUDENT, "[[distillation.teachers]]", "[[distillation.pupils]]", "teachers"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, recipe: Path, old: str, new: str, message: str) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_a_recipe_without_teachers_keeps_the_digest_that_its_checkpoint_names() -> None:
    """What derm6's checkpoint was written under, before recipes could name teachers."""
    recipe = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm6.toml"))
    assert recipe.training_digest == "0dc43ead662dbdd5938ac2184fd2fa5fef5953100e018b3e7b19e461e1e2326e"
