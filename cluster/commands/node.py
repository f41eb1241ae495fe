"""What an operator tries a node with: `derm-cds environment`, `token` and `sample`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
import shlex

from cluster.ray_node import RayNode
from cluster.running import running_service
from data_jobs.sample_lesion import write_sample
from serve_app.access.tokens import issue_token
from serve_app.domain.errors import DermError
from serve_app.settings import load_settings


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define one of them."""
    if name == "token":
        parser.add_argument("--subject", default="dr-demo", help="`sub`, who calls (default: %(default)s)")
        parser.add_argument("--role", action="append", help="repeatable (default: clinician)")
        parser.add_argument(
            "--minutes", type=int, help="lifetime (default: 60, or as long as the node allows)"
        )
    elif name == "sample":
        parser.add_argument("path", type=Path, help="the JPEG file to write")
    parser.set_defaults(run={"environment": _environment, "token": _token, "sample": _sample}[name])


def _environment(arguments: argparse.Namespace) -> None:
    """Print what a shell needs to talk to the node with `ray` and `serve`."""
    running = running_service(arguments.home)
    node = RayNode(arguments.home, **(running.ports if running else {}))
    new = {name: value for name, value in node.environment.items() if os.environ.get(name) != value}
    # With the mark, `derm-cds stop` would end the shell as well.
    new.pop("DERM_NODE", None)
    new.pop("PYTHONPATH", None)
    new["RAY_ADDRESS"] = node.address
    new["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{node.dashboard_port}"
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in sorted(new.items())))


def _token(arguments: argparse.Namespace) -> None:
    """Sign a bearer token with the node's own secret, for development."""
    settings = load_settings()
    if settings.env == "production":
        raise DermError("DERM_ENV is production: tokens come from the PMS's issuer, not from here.")
    if settings.token_jwks:
        raise DermError(
            "DERM_TOKEN_JWKS names an issuer's keys: tokens come from that issuer, not from here."
        )
    minutes, longest = arguments.minutes, settings.token_max_lifetime_s // 60
    if minutes is not None and not 0 < minutes <= longest:
        raise DermError(f"--minutes: 1 to {longest} (DERM_TOKEN_MAX_LIFETIME_S).")
    lifetime_s = None if minutes is None else 60 * minutes
    print(issue_token(settings, arguments.subject, arguments.role or ["clinician"], lifetime_s=lifetime_s))


def _sample(arguments: argparse.Namespace) -> None:
    write_sample(arguments.path)
    print(f"{arguments.path}: a drawing, not a photograph")
