"""The state folder of one node, and the environment its processes read their settings from."""

from __future__ import annotations

import os
from pathlib import Path
import secrets

from pydantic import ValidationError

from cluster.postgres_state import DatabaseUrls
from serve_app.security.private_files import locked_folder, write_private
from serve_app.settings import REPOSITORY


def model_folder() -> Path:
    """Where the models are, for whoever needs no other setting ($DERM_MODELS)."""
    return Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))


def write_service_environment(home: Path, urls: DatabaseUrls) -> None:
    """Write `home`/service.env (0600): the application role's URL, and the token secret.

    The secret is made once and kept; the URL follows the embedded server's port.
    """
    path = home / "secrets" / "service.env"
    with locked_folder(path.parent):
        known = read_service_environment(home)
        secret = known.get("DERM_TOKEN_SECRET") or secrets.token_urlsafe(48)
        lines = {"DERM_DATABASE_URL": urls.app, "DERM_TOKEN_SECRET": secret}
        write_private(path, "".join(f"{key}={value}\n" for key, value in lines.items()).encode())


def read_service_environment(home: Path) -> dict[str, str]:
    """Read what `write_service_environment` wrote; empty before the first start."""
    path = home / "secrets" / "service.env"
    if not path.exists():
        return {}
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def explain(error: ValidationError) -> str:
    """Say in one line which settings are missing or wrong, without their values."""
    return "; ".join(f"DERM_{'_'.join(map(str, at['loc'])).upper()}: {at['msg']}" for at in error.errors())
