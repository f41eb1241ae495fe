"""`derm-cds models`: what is in the store, and whether it is what its manifest says."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
import sys

from cluster.node_files import model_folder
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import DermError, ModelContractError


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `models`."""
    parser.add_argument("action", choices=("list", "show", "verify"))
    parser.add_argument("model", nargs="*", help="model ids (default: all)")
    parser.set_defaults(run=_models)


def _models(arguments: argparse.Namespace) -> int:
    store = ModelStore(model_folder())
    wanted: Iterable[str] = arguments.model or store
    if arguments.action == "list":
        sys.stdout.write("".join(f"{model_id}\n" for model_id in store))
        return 0
    failures = 0
    for model_id in wanted:
        try:
            model = store.open(model_id)
        except ModelContractError as error:
            failures += 1
            sys.stderr.write(f"{model_id}: {error}\n")
            continue
        sys.stdout.write(_describe(model) if arguments.action == "show" else f"{model_id}: verified\n")
    if failures:
        raise DermError(f"{failures} of the models must not be loaded.")
    return 0


def _describe(model: StoredModel) -> str:
    manifest = model.manifest
    spaces = ", ".join(f"{space.embedding_space} ({space.count} references)" for space in manifest.spaces)
    lines = {
        "model_id": manifest.model_id,
        "digest": model.digest,
        "created": manifest.created,
        "architecture": manifest.architecture,
        "input_size": "×".join(map(str, manifest.input.input_size)),
        "licence": manifest.licence,
        "training_data": manifest.training_data,
        "coverage": f"{manifest.conformal.coverage:g}, fitted on {manifest.conformal.fitted_on}",
        "embedding_spaces": spaces,
        "operating_points": ", ".join(manifest.operating_points) or "none",
        "folder": str(model.folder),
    }
    return "".join(f"{name:>17}  {value}\n" for name, value in lines.items()) + "\n"
