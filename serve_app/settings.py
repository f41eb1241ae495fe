"""Settings of one node: environment variables DERM_*, or $DERM_HOME/secrets/service.env.

Secrets are here and nowhere else: never in `user_config`, graph arguments or the command
line, all of which Ray shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

REPOSITORY = Path(__file__).resolve().parent.parent


def default_home() -> Path:
    """Where this node keeps its state: $DERM_HOME, else .derm beside the code."""
    return Path(os.environ.get("DERM_HOME", REPOSITORY / ".derm"))


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """Where a node keeps its keys, and what they sign: one place, for the service and for `derm-cds`."""

    home: Path

    @property
    def keyring(self) -> Path:
        """The key-encryption keys, mode 0600."""
        return self.home / "keys" / "keyring.json"

    @property
    def keystore(self) -> Path:
        """The wrapped data keys, apart from the clinical database."""
        return self.home / "keys" / "keystore.sqlite"

    @property
    def audit_signing_key(self) -> Path:
        """What signs the audit log's checkpoints, mode 0600."""
        return self.home / "keys" / "audit-signing.key"

    @property
    def audit_checkpoints(self) -> Path:
        """The signed checkpoints of the audit log."""
        return self.home / "audit" / "checkpoints.jsonl"


class Settings(BaseSettings):
    """What a replica needs to know of its node; times in seconds, sizes in bytes or pixels."""

    model_config = SettingsConfigDict(env_prefix="DERM_", extra="ignore")

    home: Path = Field(default_factory=default_home)
    env: Literal["development", "production"] = "development"

    database_url: SecretStr
    database_pool_min: int = Field(default=1, ge=0)
    database_pool_max: int = Field(default=4, ge=1)
    database_timeout_s: float = Field(default=5.0, gt=0)

    token_secret: SecretStr
    token_issuer: str = "derm-cds"
    token_audience: str = "derm-cds"

    models: Path = REPOSITORY / "model_store" / "models"

    max_upload_bytes: int = Field(default=20 * 1024 * 1024, gt=0)
    max_upload_pixels: int = Field(default=40_000_000, gt=0)
    #: In one ingress process; what comes on top is answered 503 with Retry-After.
    max_uploads_in_flight: int = Field(default=32, ge=1)
    max_upload_bytes_in_flight: int = Field(default=160 * 1024 * 1024, gt=0)
    min_side: int = Field(default=224, ge=1)

    @property
    def files(self) -> NodeFiles:
        """The files that only this node's own user may read, and its checkpoints."""
        return NodeFiles(self.home)


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """Read this process's settings once; the environment wins over service.env."""
    return Settings(_env_file=default_home() / "secrets" / "service.env")  # type: ignore[call-arg]
