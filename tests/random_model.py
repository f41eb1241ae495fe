"""A model of any recipe with seeded random weights: made in the test, never committed."""

from __future__ import annotations

import json
from pathlib import Path
import tomllib

import numpy as np

from data_jobs.references.bundle import write_references
from data_jobs.references.embedder import embed_rows
from data_jobs.training.dataset import read_rows
from data_jobs.training.manifest_file import write_manifest
from data_jobs.training.recipe import Recipe
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore

RECIPES = Path(__file__).parents[1] / "data_jobs" / "training" / "recipes"
#: The eight of eleven logits, in an order that is not ours.
POSITIONS = [7, 8, 1, 0, 3, 4, 10, 9]


def random_checkpoint(architecture: str, path: Path, classes: int = 11) -> Path:
    """A timm classifier with seeded random weights, as safetensors."""
    from safetensors.torch import save_file
    import timm
    import torch

    torch.manual_seed(4)
    network = timm.create_model(architecture, pretrained=False, num_classes=classes)
    save_file(network.state_dict(), path)
    return path


def write_folder(store: Path, recipe: Recipe, export: Path, shipped: Path, archive: Path) -> Path:
    """A model folder around an export, with a calibration that says nothing: the weights are random."""
    exported = json.loads((export / "export.json").read_text())
    folder = store / recipe.model_id
    folder.mkdir(parents=True)
    (export / "model.onnx").rename(folder / "model.onnx")
    space = f"{recipe.model_id}.plain1"
    np.savez(
        folder / "ood.npz", means=np.zeros((8, 512), np.float32), precision=np.eye(512, dtype=np.float32)
    )
    np.savez(folder / f"{space}.npz", mean=np.zeros(512, np.float32), matrix=np.eye(512, dtype=np.float32))
    write_references(folder / "references.parquet", [], np.empty((0, 512), np.float32))
    content = tomllib.loads((shipped / MANIFEST_NAME).read_text())
    del content["files"]
    content |= {"model_id": recipe.model_id, "architecture": recipe.architecture, "tag": recipe.tag}
    content["input"] |= {
        "input_size": [3, exported["side"], exported["side"]],
        "mean": list(recipe.network.channel_mean),
        "std": list(recipe.network.channel_std),
    }
    del content["input"]["aspect_evidence"]  # another model's
    content["ood"] |= {"slope": 1e-6, "intercept": -6.0}
    content["spaces"] = [
        {
            "embedding_space": space,
            "transform": f"{space}.npz",
            "references": "references.parquet",
            "count": 0,
        }
    ]
    write_manifest(folder, content)
    model = ModelStore(store).open(recipe.model_id)
    rows = [row for row in read_rows(archive) if row.diagnosis_confirm_type][::3000]
    embeddings = embed_rows(rows, archive, model, model.manifest.live_space, threads=1)
    write_references(folder / "references.parquet", rows, embeddings)
    content["spaces"][0]["count"] = len(rows)
    write_manifest(folder, content)
    return folder
