"""`derm-cds references`: the confirmed cases that similarity search finds, and the spaces they live in."""

from __future__ import annotations

import argparse
import asyncio
from importlib.util import find_spec
import os
from pathlib import Path
import subprocess
import sys

from cluster.commands import actions_of
from cluster.commands.records import ask_as_owner
from cluster.node_files import database
from cluster.prepare import choose_model
from data_jobs.references.load import publish_bundled, publish_space, verify_space
from model_store.registry import ModelStore
from serve_app.audit.events import os_account
from serve_app.domain.errors import Conflict, DermError
from serve_app.records.references import ReferenceCache, SpaceSummary
from serve_app.records.serving import Approval, live_model
from serve_app.settings import REPOSITORY, model_folder


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `references`."""
    action = actions_of(parser)
    load = action("load", _load, "load the references that ship with a model, and let it answer")
    load.add_argument("--model", help="default: the one that answers now, or the only one")
    embed = action("embed", _embed, "embed a folder of references into a space; started again, it goes on")
    embed.add_argument("folder", type=Path, help="what `python -m data_jobs.references.fetch` wrote")
    embed.add_argument("options", nargs=argparse.REMAINDER, help="as python -m data_jobs.references.embed")
    action("spaces", _spaces, "list the spaces: what fills them, how far, and which one is live")
    for name, run, purpose in (
        ("verify", _verify, "check a filled space: counts, norms, recall, canaries"),
        ("publish", _publish, "check a filled space, and let its model answer in it"),
    ):
        made = action(name, run, purpose)
        made.add_argument("model")
        made.add_argument("--space", help="default: the model's first")
        made.add_argument("--folder", type=Path, help="the images, for canaries")
        if name == "publish":
            made.add_argument(
                "--reason", default="a new reference space", help="for the history and the audit log"
            )
    drop = action("drop", _drop, "delete a space that is not live")
    drop.add_argument("space")


def _load(arguments: argparse.Namespace) -> None:
    models = model_folder()
    with database(arguments.home) as urls:
        live = ask_as_owner(arguments.home, live_model)
        model_id = choose_model(models, wanted=arguments.model, live=live.model_id if live else None)
        loaded = asyncio.run(publish_bundled(urls.owner, models, model_id))
    print(f"{model_id} answers; {loaded or 'no new'} references loaded")


def _embed(arguments: argparse.Namespace) -> int:
    """Run the job in a process of its own: it needs Ray Data, which the serving environment is spared."""
    if find_spec("pandas") is None:
        raise DermError("Embedding needs Ray Data: stop the service, then `DERM_LOCKS=jobs scripts/serve`.")
    command = [sys.executable, "-m", "data_jobs.references.embed", str(arguments.folder.resolve())]
    command += [*arguments.options]
    if "--models" not in arguments.options:
        command += ["--models", str(model_folder())]
    with database(arguments.home) as urls:
        environment = {**os.environ, "DERM_OWNER_DATABASE_URL": urls.owner}
        return subprocess.run(command, env=environment, cwd=REPOSITORY, check=False).returncode


def _spaces(arguments: argparse.Namespace) -> None:
    for summary in ask_as_owner(arguments.home, lambda pool: ReferenceCache(pool).spaces()):
        print(_describe(summary))


def _describe(summary: SpaceSummary) -> str:
    state = (
        "filled by nobody knows what"
        if summary.images_expected is None
        else f"filled by {summary.model_id}, {summary.images_expected} images expected"
        if summary.completed_at
        else f"being filled by {summary.model_id}, {summary.images_expected} images expected"
    )
    return (
        f"{'*' if summary.live else ' '} {summary.embedding_space}: {summary.images} references, "
        f"{summary.failures} failures; {state}"
    )


def _verify(arguments: argparse.Namespace) -> None:
    model = ModelStore(model_folder()).open(arguments.model)
    checks = ask_as_owner(
        arguments.home, lambda pool: verify_space(pool, model, arguments.space, folder=arguments.folder)
    )
    for check in checks:
        print(f"{'ok' if check.passed else 'NO':>3}  {check.name}: {check.found}")
    if not all(check.passed for check in checks):
        raise Conflict("This space must not answer yet.")


def _publish(arguments: argparse.Namespace) -> None:
    live = ask_as_owner(
        arguments.home,
        lambda pool: publish_space(
            pool,
            model_folder(),
            arguments.model,
            embedding_space=arguments.space,
            folder=arguments.folder,
            approval=Approval(approved_by=os_account(), reason=arguments.reason),
            say=lambda line: print(line, flush=True),
        ),
    )
    print(f"{live.model_id} answers in {live.embedding_space}")


def _drop(arguments: argparse.Namespace) -> None:
    dropped = ask_as_owner(arguments.home, lambda pool: ReferenceCache(pool).drop(arguments.space))
    print(f"{arguments.space} is gone, with {dropped} references")
