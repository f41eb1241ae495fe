"""Settings of one node: environment variables DERM_*, or $DERM_HOME/secrets/service.env.

Secrets are here and nowhere else: never in `user_config`, graph arguments or the command
line, all of which Ray shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
import os
from pathlib import Path
import secrets
import tomllib
from typing import Annotated, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from serve_app.private_files import distrust, read_private

REPOSITORY = Path(__file__).resolve().parent.parent
OWNER_URL = "DERM_OWNER_DATABASE_URL"


def default_home() -> Path:
    """Where this node keeps its state: $DERM_HOME, else .derm beside the code."""
    return Path(os.environ.get("DERM_HOME", REPOSITORY / ".derm"))


def model_folder() -> Path:
    """Where the models are, for whoever needs no other setting ($DERM_MODELS)."""
    return Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))


def find_owner_url(home: Path) -> str | None:
    """The database's URL for the role that owns the schema: $DERM_OWNER_DATABASE_URL, or else what the node wrote.

    None when it is in neither. IntegrityError when another user may read the file.
    """
    if given := os.environ.get(OWNER_URL):
        return given
    path = home / "secrets" / "owner.env"
    return read_private(path).decode().strip().removeprefix(f"{OWNER_URL}=") if path.exists() else None


class NodeFiles:
    """Where a node keeps its keys, and what they sign: one place, for the service and for `derm-cds`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        #: The key-encryption keys, mode 0600.
        self.keyring = home / "keys" / "keyring.json"
        #: The wrapped data keys, apart from the clinical database.
        self.keystore = home / "keys" / "keystore.sqlite"
        #: What signs the audit log's checkpoints, mode 0600.
        self.audit_signing_key = home / "keys" / "audit-signing.key"
        self.audit_checkpoints = home / "audit" / "checkpoints.jsonl"
        #: There while retention waits for an operator, and says since when and why.
        self.retention_paused = home / "audit" / "retention-paused"


class KeySettings(BaseSettings):
    """Where the key-encryption keys are: what the service and `derm-cds keys` must agree on."""

    model_config = SettingsConfigDict(env_prefix="DERM_", extra="ignore")

    home: Path = Field(default_factory=default_home)

    #: `file:`, vault://HOST/MOUNT/KEY or kms:KEY; serve_app/keys/providers has the details.
    key_provider: str = "file:"
    #: Vault's token, read before every request: a Vault Agent renews it there.
    vault_token_file: Path | None = None
    vault_token: SecretStr = Field(
        default=SecretStr(""), validation_alias=AliasChoices("DERM_VAULT_TOKEN", "VAULT_TOKEN")
    )

    @property
    def files(self) -> NodeFiles:
        """The files that only this node's own user may read, and its checkpoints."""
        return NodeFiles(self.home)


class Settings(KeySettings):
    """What a replica needs to know of its node; times in seconds, sizes in bytes or pixels."""

    env: Literal["development", "production"] = "development"

    database_url: SecretStr
    database_pool_min: int = Field(default=1, ge=0)
    database_pool_max: int = Field(default=4, ge=1)
    database_timeout_s: float = Field(default=5.0, gt=0)

    #: Tokens are checked with the one or the other: a secret shared with the issuer, or the keys it publishes
    #: as a JWK set (a path, an http or an https URL).
    token_secret: SecretStr = SecretStr("")
    token_jwks: str = ""
    #: Of the published keys: RS256, RS384, ES256, ES384, EdDSA, Ed25519.
    token_algorithms: str = "RS256,ES256,EdDSA"
    #: A key that the issuer withdrew is refused after that long.
    token_jwks_refresh_s: float = Field(default=600.0, ge=30, le=86_400)
    token_issuer: str = "derm-cds"
    token_audience: str = "derm-cds"
    #: From a token's `iat` (without one, from now) to its `exp`; one that is valid for longer is refused.
    token_max_lifetime_s: int = Field(default=86_400, ge=60, le=2_592_000)

    models: Path = Field(default_factory=model_folder)

    max_upload_bytes: int = Field(default=20 * 1024 * 1024, gt=0)
    max_upload_pixels: int = Field(default=40_000_000, gt=0)
    #: In one ingress process; what comes on top is answered 503 with Retry-After.
    max_uploads_in_flight: int = Field(default=32, ge=1)
    max_upload_bytes_in_flight: int = Field(default=160 * 1024 * 1024, gt=0)
    #: For the whole of a request's body; below HAProxy's own time limits (cluster/ray_node.py).
    body_timeout_s: float = Field(default=30.0, gt=0, le=60)
    #: And after 5 s, at least so many bytes a second, on average.
    body_min_bytes_per_s: float = Field(default=16_384.0, gt=0)
    min_side: int = Field(default=224, ge=1)

    #: Of one principal in one ingress process; what comes on top is answered 429 with Retry-After.
    rate_limit_per_s: float = Field(default=50.0, gt=0)
    rate_limit_burst: int = Field(default=200, ge=1)
    #: Requests without a valid token, of one address; what comes on top is answered 429.
    unauthenticated_per_minute: int = Field(default=30, ge=1)
    #: Refusals of one kind that are audited singly, of all addresses together; the rest is one event with a count.
    refusal_events_per_minute: int = Field(default=300, ge=1)
    #: Addresses, at commas, whose X-Forwarded-For is believed: a proxy that sets it, and nobody else.
    trusted_proxies: str = ""

    emergency_access_minutes: int = Field(default=240, ge=1)
    emergency_access_max_minutes: int = Field(default=720, ge=1, le=1440)

    #: By when the patient should have been seen, days from the image on: what the worklist is sorted by. Urgent is at
    #: most the two weeks of NICE NG12.
    due_days_urgent: int = Field(default=14, ge=1, le=14)
    due_days_expedited: int = Field(default=28, ge=1, le=3650)
    due_days_routine: int = Field(default=126, ge=1, le=3650)

    #: How long a request with an Idempotency-Key may be repeated.
    idempotency_days: int = Field(default=7, ge=1)
    #: How long images are kept once their patient's record is closed; unset: for good.
    retention_days: int | None = Field(default=None, ge=0)

    #: Who is asked of patients at an upload: nobody, a table of our own, or the PMS.
    patient_directory: Literal["none", "local", "pms"] = "none"
    #: The PMS's address, as this node reaches it.
    pms_url: str | None = None
    #: Bearer token for it (mode 0600), read before every request; certificates to trust instead of the system's.
    pms_token_file: Path | None = None
    pms_ca_file: Path | None = None
    #: For all that an upload asks the directory of patients.
    pms_timeout_s: float = Field(default=0.3, gt=0, le=10)
    #: How long what the PMS said of a patient is used again.
    pms_cache_s: float = Field(default=300.0, ge=0, le=86_400)
    #: Whether finished assessments are posted to the PMS: a disclosure, so only where somebody asked for it.
    pms_deliver: bool = False
    #: Whether reports, which hold no patient, are posted to it as well.
    pms_reports: bool = False
    #: Whether each lesion's FHIR report is posted, too, whenever something of it changed.
    pms_fhir: bool = False
    #: How long a message waits for the PMS before an operator must look at it.
    pms_dead_after_days: int = Field(default=7, ge=1)

    #: A TOML file (docs/pms.md): which EHRs may ask for cards by CDS Hooks. Unset: none may.
    hooks_clients: Path | None = None

    @property
    def due_days(self) -> dict[str, int]:
        """How many days each urgency leaves."""
        return {
            "urgent": self.due_days_urgent,
            "expedited": self.due_days_expedited,
            "routine": self.due_days_routine,
        }

    @field_validator("pms_url")
    @classmethod
    def _without_slash(cls, url: str | None) -> str | None:
        if not url:
            return None
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be an http(s) address without a query")
        if parts.username or parts.password:
            raise ValueError("holds no credentials: the token is in DERM_PMS_TOKEN_FILE")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _tokens_have_one_issuer(self) -> Self:
        secret = self.token_secret.get_secret_value()
        if bool(secret) == bool(self.token_jwks):
            raise ValueError(
                "set DERM_TOKEN_SECRET, or DERM_TOKEN_JWKS, and never both: one issuer signs in one way"
            )
        if self.env == "production":
            if secret and (weakness := find_weakness(secret)):
                raise ValueError(
                    f"DERM_TOKEN_SECRET is refused in production: {weakness}. Set the one that the PMS's issuer"
                    " signs with, or DERM_TOKEN_JWKS"
                )
            if _is_open_http(self.token_jwks):
                raise ValueError(
                    "DERM_TOKEN_JWKS must be https or a file in production: it says who may sign"
                )
        if self.emergency_access_minutes > self.emergency_access_max_minutes:
            raise ValueError("DERM_EMERGENCY_ACCESS_MINUTES is above DERM_EMERGENCY_ACCESS_MAX_MINUTES")
        if not self.due_days_urgent <= self.due_days_expedited <= self.due_days_routine:
            raise ValueError("DERM_DUE_DAYS_URGENT, _EXPEDITED and _ROUTINE must not fall")
        return self

    @model_validator(mode="after")
    def _pms_is_whole(self) -> Self:
        if self.pms_url is None and (self.patient_directory == "pms" or self.pms_deliver):
            raise ValueError("DERM_PMS_URL is missing: DERM_PATIENT_DIRECTORY or DERM_PMS_DELIVER needs it")
        if self.pms_reports and not self.pms_deliver:
            raise ValueError("DERM_PMS_REPORTS needs DERM_PMS_DELIVER: reports go the way of all messages")
        if self.pms_fhir and not self.pms_deliver:
            raise ValueError("DERM_PMS_FHIR needs DERM_PMS_DELIVER: reports go the way of assessments")
        if self.env == "production" and self.pms_url is not None and _is_open_http(self.pms_url):
            raise ValueError("DERM_PMS_URL must be https in production: patients' data goes there")
        return self

    @model_validator(mode="after")
    def _hooks_can_be_read(self) -> Self:
        hooks = read_hooks(self.hooks_clients) if self.hooks_clients else None
        if hooks and self.env == "production" and any(map(_is_http, hooks.addresses())):
            raise ValueError("DERM_HOOKS_CLIENTS: each address must be https in production")
        return self


class HookClient(BaseModel):
    """An EHR that may call by CDS Hooks: by which tokens it is known, and what its ids mean.

    `jwks`: its public keys, a path or a URL; `jku`: what its tokens may name as that place, which is never asked.
    `tenant`: the claim that its tokens must have, where several organisations share an issuer. `patient_ids`: whether its
    patients' ids are ours, or are mapped one by one; its users always are. `encounter_page`: the page of an
    encounter, for a card's link, with `{encounter_id}` in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    issuer: str = Field(min_length=1)
    tenant: str | None = None
    jwks: str = Field(min_length=1)
    jku: str | None = None
    algorithms: tuple[Literal["ES384", "RS384", "ES256", "RS256"], ...] = Field(
        default=("ES384", "RS384", "ES256", "RS256"), min_length=1
    )
    patient_ids: Literal["mapped", "same"] = "mapped"
    encounter_page: str | None = Field(default=None, pattern=r"^https?://[^/].*\{encounter_id\}")


class HookSettings(BaseModel):
    """Who may call by CDS Hooks, by a name for the audit log, and where: `base_url` is what they reach this service by.

    `source_url`: a page about this service, for clinicians.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern=r"^https?://[^/?#@]+[^?#@]*$")
    source_url: str | None = Field(default=None, pattern=r"^https?://[^/]")
    clients: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")], HookClient]

    @model_validator(mode="after")
    def _clients_are_told_apart(self) -> Self:
        by_issuer: dict[str, list[str | None]] = {}
        for client in self.clients.values():
            by_issuer.setdefault(client.issuer, []).append(client.tenant)
        if any(
            len(names) > 1 and (None in names or len(set(names)) < len(names)) for names in by_issuer.values()
        ):
            raise ValueError("clients of one issuer have a tenant each")
        return self

    def addresses(self) -> tuple[str, ...]:
        """Every address that is asked, shown or asked by."""
        pages = (each.encounter_page for each in self.clients.values())
        keys = (each.jwks for each in self.clients.values())
        return tuple(each for each in (self.base_url, self.source_url, *pages, *keys) if each)


def read_hooks(file: Path) -> HookSettings:
    """Read who may call by CDS Hooks; ValueError says what is wrong. A path of keys is as seen from the file's folder."""
    try:
        hooks = HookSettings.model_validate(tomllib.loads(file.expanduser().read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"DERM_HOOKS_CLIENTS: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"DERM_HOOKS_CLIENTS: {faults}") from None
    folder = file.expanduser().absolute().parent
    clients = {
        name: client
        if _is_url(client.jwks)
        else client.model_copy(update={"jwks": str(folder / client.jwks.removeprefix("file://"))})
        for name, client in hooks.clients.items()
    }
    return hooks.model_copy(update={"base_url": hooks.base_url.rstrip("/"), "clients": clients})


def _is_url(text: str) -> bool:
    return urlsplit(text).scheme in {"http", "https"}


def _is_http(text: str) -> bool:
    return urlsplit(text).scheme == "http"


def _is_open_http(url: str) -> bool:
    """Whether an address is asked unencrypted, on another machine than this."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "::1", "localhost"}


#: Certificates to trust, and what a client is known by, of libraries that look for them in the environment.
_CERTIFICATES = ("SSL_CERT_FILE", "VAULT_CACERT", "AWS_CA_BUNDLE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY")
#: And in a PostgreSQL URL.
_IN_URL = ("sslrootcert", "sslcert", "sslkey")
#: Of all these files, those that nobody else may read, either.
_SECRET = frozenset(
    {"DERM_VAULT_TOKEN_FILE", "DERM_PMS_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH", "PGSSLKEY", "sslkey"}
)


def find_untrustworthy(settings: Settings, *database_urls: str) -> list[str]:
    """Files that say whom this node believes, or who it is, and that another user could change: a line for each."""
    return [
        f"{name}: {why}"
        for name, path in _trust_files(settings, database_urls)
        if (why := distrust(Path(path).expanduser(), secret=name in _SECRET)) is not None
    ]


def _trust_files(settings: Settings, database_urls: tuple[str, ...]) -> Iterator[tuple[str, str | Path]]:
    jwks = settings.token_jwks.removeprefix("file://")
    named: dict[str, str | Path | None] = {
        "DERM_TOKEN_JWKS": "" if _is_url(jwks) else jwks,
        "DERM_VAULT_TOKEN_FILE": settings.vault_token_file,
        "DERM_PMS_TOKEN_FILE": settings.pms_token_file,
        "DERM_PMS_CA_FILE": settings.pms_ca_file,
        **{name: os.environ.get(name) for name in (*_CERTIFICATES, "RAY_AUTH_TOKEN_PATH")},
    }
    if settings.hooks_clients:
        named["DERM_HOOKS_CLIENTS"] = settings.hooks_clients
        for client, known in read_hooks(settings.hooks_clients).clients.items():
            named[f"DERM_HOOKS_CLIENTS ({client})"] = "" if _is_url(known.jwks) else known.jwks
    yield from ((name, path) for name, path in named.items() if path)
    for url in {settings.database_url.get_secret_value(), *database_urls}:
        query = parse_qs(urlsplit(url).query)
        yield from ((name, query[name][-1]) for name in _IN_URL if name in query)


def split_words(text: str) -> tuple[str, ...]:
    """Split a setting of several words at its commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """Read this process's settings once; the environment wins over service.env."""
    return Settings(_env_file=default_home() / "secrets" / "service.env")  # type: ignore[call-arg]


def load_key_settings() -> KeySettings:
    """Read the key settings alone: they are there before anything else of the node is."""
    return KeySettings(_env_file=default_home() / "secrets" / "service.env")  # type: ignore[call-arg]


#: RFC 7518 3.2: at least as long as HS256's hash.
SECRET_BYTES = 32
#: What a secret begins with that a node made for itself, so that no PMS signs with it.
DEVELOPMENT_PREFIX = "development-"
_EXAMPLES = ("changeme", "change-me", "change_me", "secret", "password", "example", "development")


def make_development_secret() -> str:
    """Make a secret for a node without an issuer; production refuses it."""
    return DEVELOPMENT_PREFIX + secrets.token_urlsafe(48)


def find_weakness(secret: str) -> str | None:
    """Say why a secret must not sign tokens in production; None when nothing is known against it."""
    if len(secret.encode()) < SECRET_BYTES:
        return f"it has fewer than {SECRET_BYTES} bytes"
    if secret.startswith(DEVELOPMENT_PREFIX):
        return "`derm-cds serve` made it for development"
    if any(example in secret.lower() for example in _EXAMPLES):
        return "it reads like an example"
    if len(set(secret)) < 10:
        return "it has fewer than 10 different characters"
    return None
