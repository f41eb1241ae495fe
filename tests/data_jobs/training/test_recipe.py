from __future__ import annotations

from pathlib import Path

import pytest

from data_jobs.training.recipe import WeightsPlan, read_recipe

RECIPES = Path("data_jobs/training/recipes")
SHIPPED = RECIPES / "tf_efficientnet_lite0_derm7.toml"
ENSEMBLE = RECIPES / "tf_efficientnet_lite2_derm10.toml"
DIGEST = "ab" * 32
WEIGHTS = f'[weights]\nfile = "a.safetensors"\nsha256 = "{DIGEST}"\n[serving]'
TEACHER = f'[[distillation.teachers]]\nmodel_id = "m"\nmodel_sha256 = "{DIGEST}"\nprior_shift = 0.4\nshare = '
TEACHERS = f"[distillation]\nside = 176\nloss_share = 0.8\n{TEACHER}0.3\n{TEACHER}0.7\n[serving]"


def written(folder: Path, recipe: Path, *changes: tuple[str, str]) -> Path:
    text = recipe.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_recipe_reads() -> None:
    recipe = read_recipe(SHIPPED)
    assert recipe.model_id == "tf_efficientnet_lite0.derm7"
    assert (recipe.data.test_fold, recipe.data.fitted_fold, recipe.data.train_folds) == (0, 4, (1, 2, 3))
    assert [s.side for s in recipe.epoch_stages] == 10 * [160] + 5 * [192]
    assert recipe.start is not None
    assert len(bytes.fromhex(recipe.start.checkpoint_sha256)) == 32


def test_a_recipe_may_name_weights_or_teachers(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, ENSEMBLE, ("[serving]", WEIGHTS)))
    assert recipe.weights == WeightsPlan("a.safetensors", DIGEST)
    taught = read_recipe(written(tmp_path, ENSEMBLE, ("[serving]", TEACHERS)))
    assert taught.distillation is not None
    assert [teacher.share for teacher in taught.distillation.teachers] == [0.3, 0.7]
    digests = {r.training_digest for r in (recipe, taught, read_recipe(ENSEMBLE))}
    assert len(digests) == 3, "what a run starts from, and who teaches it, shapes the weights"


def test_the_digest_is_that_of_the_plan_and_not_of_its_words(tmp_path: Path) -> None:
    digest = read_recipe(ENSEMBLE).training_digest
    assert read_recipe(written(tmp_path, ENSEMBLE, ("[data]", "# words\n[data]"))).training_digest == digest
    other = written(tmp_path, ENSEMBLE, ("trunk_lr = 5e-4", "trunk_lr = 6e-4"))
    assert read_recipe(other).training_digest != digest


def test_a_recipe_keeps_the_digest_that_its_checkpoints_name() -> None:
    """Without teachers and members, as before recipes could have any; and of a member."""
    assert read_recipe(SHIPPED).training_digest.startswith("1153438a37944803c61a7352c7a91a18")
    member = read_recipe(ENSEMBLE).member(1)
    assert member.training_digest.startswith("1223fc4953f67868")


def test_a_member_of_an_ensemble_leaves_out_a_fold_of_its_own_and_is_fitted_on_it() -> None:
    recipe = read_recipe(ENSEMBLE)
    members = [recipe.member(fold) for fold in recipe.data.train_folds]
    assert [m.data.left_out for m in members] == [m.data.fitted_fold for m in members] == [1, 2, 3, 4]
    assert len({m.training_digest for m in members} | {recipe.training_digest}) == 5
    assert len({m.model_id for m in members} | {m.seed for m in members}) == 8
    with pytest.raises(ValueError, match="none of the training folds"):
        recipe.member(recipe.data.test_fold)
    with pytest.raises(ValueError, match="Fold 0 is the test fold"):
        _ = recipe.data.fitted_fold


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 2026", "sead = 2026", "sead"),
        ("clip_norm", "clip_nrom", "clip_nrom"),
        ("train_folds = [1, 2, 3, 4]", "train_folds = [0, 1, 2]", "overlap"),
        ("calibration_fold = 0", "calibration_fold = 3", "overlap"),
        ("[serving]", '[start]\nmodel_id = "m"\n[serving]', "checkpoint_sha256"),
        ("[serving]", "[extra]\nx = 1\n[serving]", "extra"),
        ("[serving]", WEIGHTS.replace("sha256", "sha"), "unknown sha"),
        ("[serving]", WEIGHTS.replace("ab", "AB"), "lower-case"),
        ("[serving]", WEIGHTS.replace("safetensors", "pth"), "safetensors files"),
        ("[serving]", f'[start]\nmodel_id = "m"\ncheckpoint_sha256 = "{DIGEST}"\n{WEIGHTS}', "not from both"),
        ("[serving]", TEACHERS.replace("0.7", "0.8"), "make up 1"),
        ("[serving]", TEACHERS.replace("loss_share = 0.8", "loss_share = 0.0"), "over 0 and at most 1"),
        ("[serving]", TEACHERS.replace("loss_share = 0.8", "loss_share = 1.5"), "over 0 and at most 1"),
        ("[serving]", TEACHERS.replace("176", "160"), "cannot see more than its teachers"),
        ("[serving]", TEACHERS.replace("ab", "X"), "lower-case"),
        ("[serving]", TEACHERS.replace("prior_shift", "prior"), "unknown prior"),
        ("[serving]", TEACHERS.replace(".teachers", ".pupils"), "teachers"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(written(tmp_path, ENSEMBLE, (old, new)))
