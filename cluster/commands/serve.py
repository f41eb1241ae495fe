"""`derm-cds serve` and `derm-cds stop`."""

from __future__ import annotations

import argparse
from dataclasses import fields
import os
import shlex
import signal
import time

from cluster.running import AlreadyRunning, running_service
from cluster.supervisor import ServeRequest, end_leftovers, report, serve
from serve_app.domain.errors import DermError

_STOP_TIMEOUT_S = 60


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `serve` or `stop`."""
    if name == "stop":
        parser.set_defaults(run=_stop)
        return
    parser.add_argument("--host", default="127.0.0.1", help="where the API listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--profile", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--model", help="the model to answer (default: the one that answers now, or the only one)"
    )
    parser.add_argument(
        "--dashboard", action="store_true", help="run Ray's dashboard too, for `serve deploy`"
    )
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    names = (field.name for field in fields(ServeRequest))
    request = ServeRequest(**{name: getattr(arguments, name) for name in names})
    try:
        serve(request, on_ready=_welcome)
    except AlreadyRunning as error:
        print(error)


def _welcome(url: str, first: dict[str, str] | None) -> None:
    report(f"ready: {url}")
    if first is not None:
        print(
            "\nA first request (the token is for development and lasts an hour):\n\n"
            f"{curl(url, first)}\n\n"
            "The image is drawn, not photographed: `review` or `refused` is the right answer to it, `decided` proves nothing.\n"
            "Decision support for clinicians, never a diagnosis."
        )
    print("\nCtrl-C stops everything that was started here.", flush=True)


def curl(url: str, first: dict[str, str]) -> str:
    """Write the request as a command line to paste."""
    image = first["image"].replace("\\", "\\\\").replace('"', '\\"')
    fields = {
        "image": f'@"{image}"',
        "patient_id": first["patient_id"],
        "age_approx": "55",
        "sex": "female",
        "anatom_site_general": "upper extremity",
    }
    lines = [f"curl -sS {url}/api/lesions", f"-H 'Authorization: Bearer {first['token']}'"]
    lines += [f"-F {shlex.quote(f'{name}={value}')}" for name, value in fields.items()]
    return " \\\n  ".join(lines)


def _stop(arguments: argparse.Namespace) -> None:
    running = running_service(arguments.home)
    if running is None:
        try:
            left = end_leftovers(arguments.home)
        except AlreadyRunning as error:
            raise DermError(f"{error} Try again.") from error
        print("ended what a killed start had left" if left else "derm-cds is not running here.")
        return
    os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while running_service(arguments.home) is not None:
        if time.monotonic() > deadline:
            raise DermError(f"pid {running.pid} has not stopped within {_STOP_TIMEOUT_S} s.")
        time.sleep(0.1)
    print("stopped")
