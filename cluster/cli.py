"""`derm-cds`: what an operator needs at a desk."""

from __future__ import annotations

import argparse
from importlib import import_module
import os
from pathlib import Path
import sys

from pydantic import ValidationError

from cluster.accounts import step_down
from cluster.node_files import explain
from cluster.ray_node import RayFailed
from serve_app.domain.errors import DermError
from serve_app.private_files import forbid_core_dumps, hide_memory
from serve_app.settings import default_home

#: Command: the module that defines it, and what it does. Only the chosen one's module is
#: imported: the supervisor stays in memory, and most others bring 40 MB along.
COMMANDS = {
    "serve": ("serve", "start everything and keep it running"),
    "stop": ("serve", "stop what `serve` runs"),
    "status": ("status", "say what runs, and how it is"),
    "migrate": ("records", "bring the schema up to date"),
    "assign": ("access", "put a patient into a clinician's care"),
    "access": ("access", "care assignments and revocations: assign, end, list, revoke, restore"),
    "references": ("references", "the confirmed cases that similarity search finds, and their spaces"),
    "keys": ("keys", "the keys that wrap every image's key: status, rotate, rewrap, sweep, retire"),
    "backup": ("backup", "back up the database, or apart from it the keys, while serving"),
    "restore": ("backup", "check a backup and put it in place; what was there is kept"),
    "hold": ("retention", "legal holds, which keep images from being erased: set, release, list"),
    "retention": ("retention", "close patients' records, and erase what is past its retention"),
    "audit": ("audit", "verify, sign and export the audit log"),
    "models": ("models", "list, show, verify, import, evaluate, promote and roll back models"),
    "drift": ("drift", "whether the newest images are still like this site's first: show, acknowledge"),
    "outbox": ("pms", "what the PMS is still to be told of: status, list, retry"),
    "reports": ("reports", "what the service does as a whole: show, push"),
    "hooks": ("hooks", "whom an EHR means by its ids, for CDS Hooks: map, load, unmap, list"),
    "patients": ("pms", "load the directory of patients of a node without a PMS"),
    "environment": ("node", "print what a shell needs to use `ray` and `serve` on this node"),
    "token": ("node", "sign a bearer token, for development"),
    "sample": ("node", "draw a lesion to try the service with"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an expected failure is one line on standard error and exit code 1."""
    given = sys.argv[1:] if arguments is None else arguments
    parsed = _parser(given).parse_args(given)
    # Settings, and every process that is started, read it from here.
    parsed.home = parsed.home.expanduser().resolve()
    os.environ["DERM_HOME"] = str(parsed.home)
    # They run our code: never what lies in the folder that this was called in.
    os.environ["PYTHONSAFEPATH"] = "1"
    # Secrets, patients' images, logs: nobody else's to read.
    os.umask(0o077)
    if arguments is None:  # a process of our own
        forbid_core_dumps()
        if given[:1] != ["serve"]:
            hide_memory()
    try:
        step_down(parsed.home, new=given[:1] == ["serve"])
        return parsed.run(parsed) or 0
    except ValidationError as error:
        missing = any(at["type"] == "missing" for at in error.errors())
        hint = f" Has `derm-cds serve` run in {parsed.home}?" if missing else ""
        return _fail(f"{explain(error)}.{hint}")
    except (DermError, RayFailed, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")


def _parser(given: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="derm-cds", description="Dermatology decision support for clinicians, never a diagnosis."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.add_argument(
            "--home",
            type=Path,
            default=default_home(),
            help="where the node keeps its state ($DERM_HOME; default: %(default)s)",
        )
        if given[:1] == [name]:
            import_module(f"cluster.commands.{module}").define(name, command)
    return parser


def _fail(message: str) -> int:
    print(f"derm-cds: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
