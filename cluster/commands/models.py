"""`derm-cds models`: what is in the store, how a model comes into it, and which one answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
import json
import os
from pathlib import Path
import sys

from cluster.commands.promotion import define_promotion, load_job
from model_store.registry import ModelStore, StoredModel
from serve_app.audit.events import os_account
from serve_app.domain.errors import DermError, ModelContractError
from serve_app.settings import model_folder


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `models` and its actions."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        made.add_argument("--home", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        made.set_defaults(run=run)
        return made

    action("list", _list, "list the models in the store")
    for name, run, purpose in (
        ("show", _show, "show what models say of themselves"),
        ("verify", _verify, "verify that every file is the one its manifest names"),
    ):
        action(name, run, purpose).add_argument("model", nargs="*", help="model ids (default: all)")
    _define_import(
        action("import", _import, "import a model: check, export, calibrate, bundle and evaluate it")
    )
    evaluate = action(
        "evaluate", _evaluate, "measure a model on its recipe's test fold; the store stays as it is"
    )
    evaluate.add_argument("model")
    evaluate.add_argument("--recipe", type=Path, required=True, help="TOML file; says which fold")
    evaluate.add_argument("--report", type=Path, help="write all figures into this JSON file")
    _add_threads(evaluate)
    define_promotion(action, _add_threads)


def _define_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="ONNX, safetensors or our own checkpoint: a path, an https URL, or hf-hub:ORG/NAME[@REVISION]",
    )
    parser.add_argument("--recipe", type=Path, required=True, help="TOML file with an [acceptance] table")
    parser.add_argument("--sha256", help="of the source; needed for all but a local ONNX or safetensors file")
    parser.add_argument("--label-map", type=Path, help="TOML file: modality, label_space, [label_map]")
    parser.add_argument("--licence", help="licence of the weights, for the manifest and the card")
    parser.add_argument("--training-data", help="what they were trained on, for the manifest and the card")
    parser.add_argument(
        "--side", type=int, help="input side of a safetensors model (default: the recipe's largest)"
    )
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")


def _list(_arguments: argparse.Namespace) -> int:
    sys.stdout.write("".join(f"{model_id}\n" for model_id in ModelStore(model_folder())))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    return _open_each(arguments.model, _describe)


def _verify(arguments: argparse.Namespace) -> int:
    return _open_each(arguments.model, lambda model: f"{model.manifest.model_id}: verified\n")


def _open_each(wanted: Iterable[str], tell: Callable[[StoredModel], str]) -> int:
    store = ModelStore(model_folder())
    failures = 0
    for model_id in wanted or store:
        try:
            sys.stdout.write(tell(store.open(model_id)))
        except ModelContractError as error:
            failures += 1
            sys.stderr.write(f"{model_id}: {error}\n")
    if failures:
        raise DermError(f"{failures} of the models must not be loaded.")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    job = load_job("data_jobs.promotion.import_model")
    request = job.ImportRequest(
        source=arguments.source,
        recipe=arguments.recipe,
        sha256=arguments.sha256,
        label_map=arguments.label_map,
        licence=arguments.licence,
        training_data=arguments.training_data,
        side=arguments.side,
        threads=arguments.threads,
    )
    model = job.import_model(model_folder(), request, say)
    say(f"Next: derm-cds models promote {model.manifest.model_id} --dry-run --approved-by {os_account()}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    job = load_job("data_jobs.promotion.import_model")
    evaluated = job.evaluate_model(
        model_folder(), arguments.model, recipe=arguments.recipe, threads=arguments.threads
    )
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(evaluated, indent=1) + "\n", encoding="utf-8")
    say(f"{arguments.model}: {job.headline(evaluated)}")
    return 0


def say(line: str) -> None:
    """Print a line at once: these commands take minutes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


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
