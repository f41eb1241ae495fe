"""`derm-cds token`: a bearer token for development, signed with the node's own secret."""

from __future__ import annotations

import argparse
import sys

from serve_app.access.tokens import mint_token
from serve_app.domain.errors import DermError
from serve_app.settings import load_settings


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `token`."""
    parser.add_argument("--subject", default="dr-demo", help="`sub`, who calls (default: %(default)s)")
    parser.add_argument("--role", action="append", help="repeatable (default: clinician)")
    parser.add_argument("--minutes", type=int, default=60, help="lifetime (default: %(default)s)")
    parser.set_defaults(run=_token)


def _token(arguments: argparse.Namespace) -> int:
    settings = load_settings()
    if settings.env == "production":
        raise DermError("DERM_ENV is production: tokens come from the PMS's issuer, not from here.")
    if settings.token_jwks:
        raise DermError(
            "DERM_TOKEN_JWKS names an issuer's keys: tokens come from that issuer, not from here."
        )
    token = mint_token(
        secret=settings.token_secret.get_secret_value(),
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        subject=arguments.subject,
        roles=arguments.role or ["clinician"],
        lifetime_s=60 * arguments.minutes,
    )
    sys.stdout.write(f"{token}\n")
    return 0
