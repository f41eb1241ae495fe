"""`derm-cds models`: what is in the store, how a model comes into it, and which one answers."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import import_module
import json
import os
from pathlib import Path
import sys
from types import ModuleType

from cluster.commands import actions_of
from cluster.commands.records import ask_as_owner
from cluster.node_files import database
from data_jobs.promotion.rollback import roll_back
from model_store.registry import ModelStore, StoredModel
from serve_app.audit.events import os_account
from serve_app.domain.errors import DermError, ModelContractError
from serve_app.records.serving import Publication, live_model, publications
from serve_app.settings import model_folder


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `models` and its actions."""
    action = actions_of(parser)
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
    promote = action(
        "promote", _promote, "compare a model with the one that answers, and let it answer if it may"
    )
    promote.add_argument("model", help="the candidate")
    _add_approval(promote)
    promote.add_argument("--dry-run", action="store_true", help="compare, judge and report; change nothing")
    promote.add_argument(
        "--cases", choices=("held-out", "references"), default="held-out", help="default: %(default)s"
    )
    promote.add_argument(
        "--acceptance", type=Path, help="recipe (or JSON) to judge by, for a model that has no criteria"
    )
    promote.add_argument(
        "--report", type=Path, help="where the report goes (default: beside the model's folder)"
    )
    _add_threads(promote)
    points = action(
        "operating-points",
        _set_points,
        "let the site's own operating points hold, proven on its own confirmed cases",
    )
    for name in ("melanoma", "malignant"):
        points.add_argument(
            f"--{name}", type=float, help="threshold, a probability (neither: the model's own)"
        )
    points.add_argument(
        "--cases", type=Path, help="folder with images/ID.jpg and train.csv: isic_id, lesion_id, diagnosis"
    )
    _add_approval(points)
    points.set_defaults(reason="the site's own validation")
    points.add_argument("--dry-run", action="store_true", help="measure and report; change nothing")
    points.add_argument(
        "--report", type=Path, help="where the report goes (default: beside the model's folder)"
    )
    _add_threads(points)
    _add_approval(action("rollback", _roll_back, "let the model answer that answered before"))
    history = action(
        "history", _history, "say which model answers, and list what was published, newest first"
    )
    history.add_argument("--last", type=int, default=20, help="how many (default: %(default)s)")


def _define_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="ONNX, safetensors or our own checkpoint: a path, an https URL, or hf-hub:ORG/NAME[@REVISION]",
    )
    parser.add_argument("--recipe", type=Path, required=True, help="TOML file with an [acceptance] table")
    parser.add_argument("--sha256", help="of the source; needed for all but a local ONNX or safetensors file")
    allowed = "a further host, with its subdomains, that the download may be led to"
    parser.add_argument("--allow-host", action="append", default=[], metavar="HOST", help=allowed)
    parser.add_argument("--label-map", type=Path, help="TOML file: modality, label_space, [label_map]")
    parser.add_argument("--licence", help="licence of the weights, for the manifest and the card")
    parser.add_argument("--training-data", help="what they were trained on, for the manifest and the card")
    parser.add_argument(
        "--side", type=int, help="input side of a safetensors model (default: the recipe's largest)"
    )
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")


def _add_approval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--approved-by", required=True, type=_said, help="who answers for it; kept in the history"
    )
    parser.add_argument(
        "--reason",
        default="annual model update",
        type=_said,
        help="kept in the history and the audit log: names no patient",
    )


def _said(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must say something")
    return text.strip()


def _list(_arguments: argparse.Namespace) -> None:
    for model_id in ModelStore(model_folder()):
        print(model_id)


def _show(arguments: argparse.Namespace) -> None:
    _open_each(arguments.model, _describe)


def _verify(arguments: argparse.Namespace) -> None:
    _open_each(arguments.model, lambda model: f"{model.manifest.model_id}: verified")


def _open_each(wanted: Iterable[str], tell: Callable[[StoredModel], str]) -> None:
    store = ModelStore(model_folder())
    failures = 0
    for model_id in wanted or store:
        try:
            print(tell(store.open(model_id)))
        except ModelContractError as error:
            failures += 1
            print(f"{model_id}: {error}", file=sys.stderr)
    if failures:
        raise DermError(f"{failures} of the models must not be loaded.")


def _import(arguments: argparse.Namespace) -> None:
    job = load_job("data_jobs.promotion.import_model")
    names = (field.name for field in fields(job.ImportRequest))
    request = job.ImportRequest(**{name: getattr(arguments, name) for name in names})
    model = job.import_model(model_folder(), request, _say)
    _say(f"Next: derm-cds models promote {model.manifest.model_id} --dry-run --approved-by {os_account()}")


def _evaluate(arguments: argparse.Namespace) -> None:
    job = load_job("data_jobs.promotion.import_model")
    evaluated = job.evaluate_model(
        model_folder(), arguments.model, recipe=arguments.recipe, threads=arguments.threads
    )
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(evaluated, indent=1) + "\n", encoding="utf-8")
    _say(f"{arguments.model}: {job.headline(evaluated)}")


def _promote(arguments: argparse.Namespace) -> None:
    job = load_job("data_jobs.promotion.promotion")
    request = job.PromotionRequest(
        candidate=arguments.model,
        approved_by=arguments.approved_by,
        reason=arguments.reason,
        cache=arguments.home / "promotion",
        kind=arguments.cases,
        acceptance=arguments.acceptance,
        report=arguments.report,
        dry_run=arguments.dry_run,
        threads=arguments.threads,
    )
    with database(arguments.home) as urls:
        asyncio.run(job.promote(urls.owner, model_folder(), request, _say))


def _set_points(arguments: argparse.Namespace) -> None:
    job = load_job("data_jobs.promotion.site_points")
    given = {name: getattr(arguments, name) for name in ("melanoma", "malignant")}
    request = job.SiteRequest(
        points={name: threshold for name, threshold in given.items() if threshold is not None},
        cases=arguments.cases,
        approved_by=arguments.approved_by,
        reason=arguments.reason,
        cache=arguments.home / "promotion",
        report=arguments.report,
        dry_run=arguments.dry_run,
        threads=arguments.threads,
    )
    with database(arguments.home) as urls:
        asyncio.run(job.set_site_points(urls.owner, model_folder(), request, _say))


def _roll_back(arguments: argparse.Namespace) -> None:
    with database(arguments.home) as urls:
        live = asyncio.run(
            roll_back(urls.owner, model_folder(), approved_by=arguments.approved_by, reason=arguments.reason)
        )
    _say(f"{live.model_id} answers again from the next request on.")


def _history(arguments: argparse.Namespace) -> None:
    limit = arguments.last
    live = ask_as_owner(arguments.home, live_model)
    published = ask_as_owner(arguments.home, lambda pool: publications(pool, limit=limit))
    points = ", ".join(f"{name} {at:g}" for name, at in live.operating_points.items()) if live else ""
    said = f"{live.model_id} answers" if live else "no model answers"
    print(f"{said} at the site's own operating points: {points}" if points else said)
    for publication in published:
        print(_tell(publication))


def _tell(publication: Publication) -> str:
    approval, model = publication.approval, publication.model
    report = f", report {approval.report_sha256[:12]}" if approval.report_sha256 else ""
    return (
        f"{publication.publication_id:>4}  {publication.published_at:%Y-%m-%d %H:%M:%S%z}  {approval.action:<8}  "
        f"{model.model_id} ({model.model_digest[:12]})  by {approval.approved_by}: {approval.reason}{report}"
    )


def load_job(module: str) -> ModuleType:
    """Import a job only when it is asked for: a node that serves lacks what most of them need.

    Raises DermError when this environment does.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DermError(
            f"{module} needs the lock `jobs` ({error}): stop the service, then `DERM_LOCKS=jobs scripts/serve`."
        ) from error


def _say(line: str) -> None:
    print(line, flush=True)  # these commands take minutes


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
    return "".join(f"{name:>17}  {value}\n" for name, value in lines.items())
