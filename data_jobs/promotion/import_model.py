"""Import: from a file to a verified model folder in the store, or nothing at all; and the evaluation of a stored one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
import json
from pathlib import Path
import shutil
import tempfile
import tomllib
from typing import Any

from data_jobs.promotion.candidate import ImportRefused, open_whole
from data_jobs.promotion.source import ImportRequest, export_source, run_step, take_source
from data_jobs.training.manifest_file import write_manifest
from data_jobs.training.recipe import Recipe, read_recipe
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, StoredModel


def evaluate_model(models: Path, model_id: str, *, recipe: Path, threads: int) -> dict[str, Any]:
    """Measure a model on its recipe's test fold and return all figures.

    Raises ModelContractError when it must not be loaded, ImportRefused when the job fails.
    """
    model = ModelStore(models).open(model_id)
    with tempfile.TemporaryDirectory(prefix="derm-evaluate-") as scratch:
        shutil.copytree(model.folder, Path(scratch) / model_id)
        run_step(
            "data_jobs.training.evaluate",
            *("--model", model_id, "--models", scratch, "--recipe", recipe, "--threads", threads),
        )
        evaluated: dict[str, Any] = json.loads((Path(scratch) / model_id / "evaluation.json").read_text())
    return evaluated


def import_model(models: Path, request: ImportRequest, say: Callable[[str], None]) -> StoredModel:
    """Take, check, export, calibrate, bundle and evaluate a model, and give it a canary; it is in the store when all of it succeeded.

    Raises ImportRefused, and leaves nothing behind, when the source or its labels do not keep the
    contract, a step fails, or the store has a model of this name; ModelContractError when
    what came out must not be loaded.
    """
    try:
        recipe = read_recipe(request.recipe)
    except (ValueError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ImportRefused(f"{request.recipe}: {error}") from error
    if recipe.acceptance is None:
        raise ImportRefused(
            f"{request.recipe} has no [acceptance] table: say what this model must keep before it is measured, not after."
        )
    folder = models / recipe.model_id
    if folder.exists():
        raise ImportRefused(
            f"{folder} is there already. A model never changes: give the recipe another tag than {recipe.tag!r}."
        )
    # In the store's own folder, so that the last step is one rename; two levels down, where no model is looked for.
    with tempfile.TemporaryDirectory(prefix=".importing-", dir=models) as staging:
        built = _build(Path(staging), recipe, request, say)
        model = open_whole(ModelStore(built.parent), recipe.model_id)
        try:
            built.rename(folder)
        except OSError as error:
            raise ImportRefused(f"{folder} appeared meanwhile: {error}.") from error
    say(f"{recipe.model_id}: imported, digest {model.digest}")
    return ModelStore(models).open(recipe.model_id)


def _build(staging: Path, recipe: Recipe, request: ImportRequest, say: Callable[[str], None]) -> Path:
    """Run every step inside the staging folder; returns the finished model folder there."""
    export, store = staging / "export", staging / "models"
    export.mkdir()
    store.mkdir()
    source, digest = take_source(request.source, request.sha256, staging, hosts=request.allow_host)
    say(f"source: {request.source}, SHA-256 {digest}")
    exported = export_source(source, recipe, request, export)
    say(f"export: {exported.kind}, {exported.parity}")
    if exported.kind != "checkpoint" and not (request.licence and request.training_data):
        raise ImportRefused(
            "State the licence of the weights and what they were trained on, with --licence and --training-data."
        )
    run_step(
        "data_jobs.training.calibrate", "--recipe", request.recipe, "--export", export, "--models", store
    )
    folder = store / recipe.model_id
    # What calibration cannot know: origin and licence.
    origin = {
        "source": request.source,
        "sha256": digest,
        "kind": exported.kind,
        "label_space": exported.labels.label_space,
        "ignored_labels": exported.labels.ignored,
        "recipe_sha256": sha256(request.recipe.read_bytes()).hexdigest(),
        "imported": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(origin, indent=1, ensure_ascii=False) + "\n"
    (folder / "origin.json").write_text(text, encoding="utf-8")
    content = tomllib.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    del content["files"]
    content["licence"] = request.licence or content["licence"]
    content["training_data"] = request.training_data or content["training_data"]
    content["input"]["mean"] = list(recipe.network.channel_mean)
    content["input"]["std"] = list(recipe.network.channel_std)
    write_manifest(folder, content)
    say("calibration: temperature, sets, operating points and p(UNK) fitted")
    where = ("--model", recipe.model_id, "--models", store, "--threads", request.threads)
    say(f"references: {run_step('data_jobs.references.bundle', *where).strip()}")
    run_step("data_jobs.training.evaluate", *where, "--recipe", request.recipe)
    say(f"evaluation: {headline(json.loads((folder / 'evaluation.json').read_text()))}")
    say(f"canary: {run_step('data_jobs.training.canary', *where).strip()}")
    return folder


def headline(evaluated: dict[str, Any]) -> str:
    """The figures of an evaluation that decide most, in one line."""
    figures, point = evaluated["with_unk"], evaluated["operating_points"]["melanoma"]
    return (
        f"fold {evaluated['fold']}, {figures['images']} images: top-1 {figures['top1']}, top-3 {figures['top3']}, "
        f"balanced {figures['balanced_accuracy']}, melanoma AUC {figures['melanoma_auc']}, ECE {figures['ece']}; "
        f"{point['misses']} of {point['positives']} melanomas missed"
    )
