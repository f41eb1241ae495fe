"""Two EHRs that call the service: `west`, whose keys are in a file, and `east`, which publishes them over https."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
import ipaddress
import json
from pathlib import Path
import ssl
import time
from typing import Any
from uuid import uuid4

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
import httpx
from joserfc import jwt
from joserfc.jwk import ECKey, Key, RSAKey
import pytest

from serve_app.hooks.service import FEEDBACK_PATH, SERVICE_PATH
from serve_app.records.hooks import HookStore, Identity
from tests.http_server import serving
from tests.serve_app.conftest import Service

BASE = "https://derm.hospital.example"
#: The clinician and how each EHR names her.
DOCTOR, USER = "dr-hooks", "Practitioner/17"


@dataclass
class Ehr:
    """An EHR with its key."""

    name: str
    issuer: str
    algorithm: str
    key: Key
    service: Service
    header: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)

    def token(
        self,
        path: str = SERVICE_PATH,
        *,
        key: Key | None = None,
        algorithm: str | None = None,
        header: dict[str, Any] | None = None,
        **changed: Any,
    ) -> str:
        """Sign a token for a path; a claim or a header that is None is left out."""
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": f"{BASE}{path}",
            "iat": now,
            "exp": now + 300,
            "jti": str(uuid4()),
        }
        whole = {"alg": algorithm or self.algorithm, "kid": self.key.kid, "typ": "JWT"} | self.header
        kept = [
            {name: value for name, value in each.items() if value is not None}
            for each in (whole | (header or {}), claims | self.claims | changed)
        ]
        return jwt.encode(*kept, key or self.key, algorithms=[kept[0]["alg"]])

    async def post(self, body: Any, path: str = SERVICE_PATH, *, token: str | None = None) -> httpx.Response:
        """Send a body, JSON unless it is bytes."""
        headers = {"Authorization": f"Bearer {token or self.token(path)}"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.service.client.post(path, content=content, headers=headers)

    async def look(self, patient: str, *, user: str = USER, token: str | None = None) -> httpx.Response:
        """Open a patient's record."""
        return await self.post(view(patient, user), token=token)

    async def tell(self, *feedback: dict[str, Any], token: str | None = None) -> httpx.Response:
        """Tell what became of cards."""
        return await self.post({"feedback": feedback}, FEEDBACK_PATH, token=token)

    async def map(
        self, *, patient: tuple[str, str] | None = None, user: tuple[str, str] | None = None
    ) -> None:
        """Have it mean one of ours, as `derm-cds hooks map` does."""
        found = [
            Identity(self.name, kind, *pair)
            for kind, pair in (("patient", patient), ("user", user))
            if pair is not None
        ]
        await HookStore(self.service.owner).map(found)


def view(patient: str, user: str = USER) -> dict[str, Any]:
    """What an EHR sends when a patient's record is opened, with more than is asked for."""
    return {
        "hook": "patient-view",
        "hookInstance": str(uuid4()),
        "fhirServer": "https://ehr.hospital.example/fhir",
        "fhirAuthorization": {
            "access_token": "an-opaque-token",
            "token_type": "Bearer",
            "expires_in": 300,
            "scope": "user/Patient.read",
            "subject": "derm-cds",
        },
        "context": {"userId": user, "patientId": patient, "encounterId": "89284"},
        "prefetch": {"patient": {"resourceType": "Patient", "id": patient}},
    }


def overridden(card: str, **reason: Any) -> dict[str, Any]:
    """What an EHR tells of a card that was dismissed just now."""
    return {
        "card": card,
        "outcome": "overridden",
        "outcomeTimestamp": datetime.now(UTC).isoformat(),
        **({"overrideReason": reason} if reason else {}),
    }


def published(*keys: Key) -> bytes:
    """The keys as an EHR publishes them."""
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ehr")]),
    )
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1)
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "ehr.pem", folder / "ehr.key"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private


@pytest.fixture(scope="module")
def east_key() -> Key:
    return RSAKey.generate_key(2048, {"kid": "east-1"})


@pytest.fixture(scope="module")
def east_keys(east_key, tmp_path_factory) -> Iterator[str]:
    """Where `east` publishes its keys, over https with a certificate that this process trusts."""
    certificate, private = make_certificate(tmp_path_factory.mktemp("tls"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(published(east_key))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    with serving(Handler, context) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        yield f"https://127.0.0.1:{port}/jwks.json"


@pytest.fixture(scope="module")
def west_key() -> Key:
    return ECKey.generate_key("P-384", {"kid": "west-1"})


@pytest.fixture(scope="module")
def clients_file(west_key, east_keys, tmp_path_factory) -> Path:
    """DERM_HOOKS_CLIENTS."""
    folder = tmp_path_factory.mktemp("hooks")
    (folder / "west.json").write_bytes(published(west_key))
    file = folder / "hooks.toml"
    file.write_text(f"""
base_url = "{BASE}"
source_url = "https://intranet.hospital.example/derm"

[clients.west]
issuer = "https://west.example"
jwks = "west.json"
encounter_page = "https://west.example/encounters/{{encounter_id}}"

[clients.east]
issuer = "https://cloud.example"
tenant = "hospital-7"
jwks = "{east_keys}"
jku = "{east_keys}"
algorithms = ["RS384"]
patient_ids = "same"
""")
    return file


@pytest.fixture(scope="module")
async def hooked(start_service, local_stages, clients_file) -> AsyncIterator[Service]:
    """The service that both may call."""
    async with start_service(local_stages(), hooks_clients=clients_file) as service:
        yield service


@pytest.fixture(scope="module")
async def west(hooked: Service, west_key: Key) -> Ehr:
    ehr = Ehr("west", "https://west.example", "ES384", west_key, hooked)
    await ehr.map(user=(USER, DOCTOR))
    return ehr


@pytest.fixture(scope="module")
async def east(hooked: Service, east_key: Key, east_keys: str) -> Ehr:
    tenant = {"tenant": "hospital-7"}
    ehr = Ehr("east", "https://cloud.example", "RS384", east_key, hooked, {"jku": east_keys}, tenant)
    await ehr.map(user=(USER, DOCTOR))
    return ehr


@pytest.fixture
async def lesion(west: Ehr) -> dict[str, Any]:
    """The answer to an image of a patient in the doctor's care; `fhir` is how `west` names the patient."""
    patient = await west.service.care(DOCTOR)
    response = await west.service.upload(
        patient, subject=DOCTOR, encounter_id="e-1", anatom_site_general="posterior torso"
    )
    assert response.status_code == 201, response.text
    fhir = f"fhir-{uuid4().hex[:12]}"
    await west.map(patient=(fhir, patient))
    return {**response.json(), "fhir": fhir}
