"""`python -m data_jobs.references.embed FOLDER --model M`: what must be set before Ray is imported, then the job."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
import os
import secrets
import sys

#: As on the nodes of the service: no processes that nobody asked for, nothing sent anywhere, every port on loopback.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

if __name__ == "__main__":
    if find_spec("pandas") is None:
        sys.exit("Embedding needs Ray Data: stop the service, then `DERM_LOCKS=jobs scripts/serve`.")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        # A Ray of the job's own has a token of its own.
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    sys.exit(import_module("data_jobs.references.embed.job").main())
