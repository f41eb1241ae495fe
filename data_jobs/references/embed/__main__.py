"""`python -m data_jobs.references.embed FOLDER --model M`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
import os
import secrets
import sys

from cluster.ray_environment import NODE_ENVIRONMENT


def set_up_ray_environment() -> None:
    """Before `import ray`: nothing leaves the premises, and a Ray of this job's own has a token of its own."""
    for name, value in NODE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)


if __name__ == "__main__":
    if find_spec("pandas") is None:
        sys.exit("Embedding needs Ray Data: pip install 'pms-derm-cds[jobs]' into this environment.")
    set_up_ray_environment()
    sys.exit(import_module("data_jobs.references.embed.command").main())
