"""`derm-cds models promote | rollback | history`: which model answers, and since when and why."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
import sys
from types import ModuleType

from cluster.database import database
from data_jobs.promotion.rollback import roll_back
from serve_app.domain.errors import DermError
from serve_app.records.pool import open_pool
from serve_app.records.serving import LiveModel, Publication, live_model, publications
from serve_app.settings import model_folder

Run = Callable[[argparse.Namespace], int]


def load_job(module: str) -> ModuleType:
    """Import a job only when it is asked for: a node that serves lacks what most of them need.

    Raises DermError when this environment does.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DermError(
            f"{module} needs the `jobs` extra ({error}): pip install 'pms-derm-cds[jobs,cpu]' into this environment."
        ) from error


def define_promotion(
    action: Callable[[str, Run, str], argparse.ArgumentParser],
    add_threads: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Define the actions that change which model answers."""
    made = action(
        "promote", _promote, "compare a model with the one that answers, and let it answer if it may"
    )
    made.add_argument("model", help="the candidate")
    _add_approval(made)
    made.add_argument("--dry-run", action="store_true", help="compare, judge and report; change nothing")
    made.add_argument(
        "--cases", choices=("held-out", "references"), default="held-out", help="default: %(default)s"
    )
    made.add_argument(
        "--acceptance", type=Path, help="recipe (or JSON) to judge by, for a model that has no criteria"
    )
    made.add_argument(
        "--report", type=Path, help="where the report goes (default: beside the model's folder)"
    )
    add_threads(made)
    _add_approval(action("rollback", _roll_back, "let the model answer that answered before"))
    history = action(
        "history", _history, "say which model answers, and list what was published, newest first"
    )
    history.add_argument("--last", type=int, default=20, help="how many (default: %(default)s)")


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


def _promote(arguments: argparse.Namespace) -> int:
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
    return 0


def _roll_back(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        live = asyncio.run(
            roll_back(urls.owner, model_folder(), approved_by=arguments.approved_by, reason=arguments.reason)
        )
    _say(f"{live.model_id} answers again from the next request on.")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        live, published = asyncio.run(_read_history(urls.owner, arguments.last))
    _say(f"{live.model_id} answers" if live else "no model answers")
    for publication in published:
        _say(_tell(publication))
    return 0


async def _read_history(dsn: str, limit: int) -> tuple[LiveModel | None, list[Publication]]:
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        return await live_model(pool), await publications(pool, limit=limit)
    finally:
        await pool.close()


def _tell(publication: Publication) -> str:
    approval, model = publication.approval, publication.model
    report = f", report {approval.report_sha256[:12]}" if approval.report_sha256 else ""
    return (
        f"{publication.publication_id:>4}  {publication.published_at:%Y-%m-%d %H:%M:%S%z}  {approval.action:<8}  "
        f"{model.model_id} ({model.model_digest[:12]})  by {approval.approved_by}: {approval.reason}{report}"
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
