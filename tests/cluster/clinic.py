"""A home with images in it, for what is backed up and restored."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.accounts import Account
from cluster.backups import run
from cluster.postgres import EmbeddedPostgres, PostgresState
from serve_app.audit.checkpoints import signing_key
from serve_app.erasure.eraser import Eraser
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import Erasure, ErasureRequest, ErasureStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.settings import KeySettings, NodeFiles
from tests.pools import connected

#: A sealed image of patient p-1, of 2020, whose assessment failed, in an earlier version: ids of its lesion, itself and its key; itself.
IMAGE = """
WITH lesion AS (
    INSERT INTO lesions VALUES ($1, 'p-1', '2020-01-01'::timestamptz) RETURNING lesion_id
), image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, sealed)
    SELECT $2, lesion_id, 'p-1', '2020-01-01'::timestamptz, 'image/png', 300, 300, $3, $4 FROM lesion
    RETURNING image_id, lesion_id, gen_random_uuid() AS assessment_id
), events AS (
    INSERT INTO audit_events (action, actor, outcome, patient_id, lesion_id, image_id, assessment_id, request_id, detail)
    SELECT action, 'dr', outcome, 'p-1', lesion_id, image_id, assessment_id, 'r', '{}'
    FROM image, (VALUES ('upload', 'success'), ('classify', 'failed')) AS done (action, outcome)
)
INSERT INTO assessments (assessment_id, image_id, created_at, outcome, failure, completed_at, context, top_k, licences,
    actor, request_id)
SELECT assessment_id, image_id, now(), 'failed', 'test', now(), '{}', 10, '{}', 'dr', 'r' FROM image
RETURNING assessment_id
"""


@dataclass
class Clinic:
    """A home with images in it: which, and what each opens to."""

    home: Path
    images: dict[tuple[UUID, UUID], bytes] = field(default_factory=dict)

    @property
    def server(self) -> EmbeddedPostgres:
        return EmbeddedPostgres(self.home)

    def open_keys(self) -> KeyStore:
        files = NodeFiles(self.home)
        made = files.keystore.exists()
        return KeyStore(files.keystore, open_key_provider(KeySettings(home=self.home), first_start=not made))

    def ask(self, question: Callable[[Pool], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with connected(self.server.ensure().owner) as pool:
                return await question(pool)

        return asyncio.run(run())

    def add_images(self, count: int) -> None:
        with closing(self.open_keys()) as keys:
            for number in range(count):
                lesion_id, image_id, content = uuid4(), uuid4(), b"image %d " % number + os.urandom(5000)
                key, binding = keys.create(), ImageBinding(image_id, "p-1", "image/png")
                values = (lesion_id, image_id, key.id, seal(content, data_key=key, binding=binding))
                self.ask(lambda pool, values=values: pool.fetch(IMAGE, *values))
                self.images[lesion_id, image_id] = content

    def sealed(self, at: tuple[UUID, UUID]) -> tuple[bytes, ImageBinding]:
        found = self.ask(lambda pool: LesionStore(pool).sealed_image(*at))
        return found.sealed, ImageBinding(at[1], found.patient_id, found.content_type)

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What its backups are checked by."""
        return signing_key(NodeFiles(self.home).audit_signing_key).public_key()

    def as_superuser(self, *statements: str) -> None:
        """Do what a superuser of the database could."""
        self.server.ensure()
        state = PostgresState.read(self.server.state_file)
        assert state is not None
        at = state.superuser_environment(self.server.socket_directory(state)) | {"PGDATABASE": "derm"}
        at |= {"PGOPTIONS": "-c event_triggers=off"}
        done = [part for statement in statements for part in ("-c", statement)]
        run("psql", "--no-psqlrc", "--quiet", *done, environment=at)

    def sign(self, folder: Path, **changes: object) -> None:
        """Change the manifest of a backup and sign it anew, as only this node can."""
        written = folder / "manifest.json"
        content = json.dumps(json.loads(written.read_bytes()) | changes).encode()
        signature = signing_key(NodeFiles(self.home).audit_signing_key).sign(b"derm-cds backup\n" + content)
        for path, data in ((written, content), (folder / "manifest.sig", b64encode(signature))):
            path.unlink(missing_ok=True)  # it may be linked to
            path.write_bytes(data)

    def erase(self, at: tuple[UUID, UUID]) -> Erasure:
        """Erase one of its images as the service does: accepted, destroyed, proven."""
        request = ErasureRequest(
            lesion_id=at[0],
            image_id=at[1],
            reason=ErasureReason.PATIENT_REQUEST,
            actor="chief",
            request_id="r",
        )
        with closing(self.open_keys()) as keys:
            erasure, accepted = self.ask(lambda pool: Eraser(ErasureStore(pool), keys).erase(request))
        assert accepted
        assert erasure.receipt is not None
        del self.images[at]
        return erasure

    def opens(self, at: tuple[UUID, UUID]) -> bool:
        return self.open_image(at) == self.images[at]

    def open_image(self, at: tuple[UUID, UUID]) -> bytes:
        with closing(self.open_keys()) as keys:
            return keys.open_image(*self.sealed(at))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may be linked to
    path.write_bytes(content)


def python_for(account: Account) -> str | None:
    """A Python that an account may run: this one, or the system's own of the same version."""
    code = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    for python in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            if subprocess.run([python, "-c", code], check=False, cwd="/", **account.popen).returncode == 0:
                return python
    return None
