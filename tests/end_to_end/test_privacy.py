"""What a node leaves on disk in clear: no query string, no patient, no image."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

pytestmark = pytest.mark.ray

#: More than Serve keeps back before it writes its request log (RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE).
_FLUSH = 1_100


def logs(node) -> Iterator[Path]:
    """Every file that a process of the node writes, but the database's own and the sealed secrets."""
    for root in (node.ray.directory, node.home):
        for path in root.rglob("*"):
            inside = path.relative_to(root).parts
            if path.is_file() and not path.is_symlink() and inside[:2] != ("postgres", "data"):
                yield path


async def test_no_log_holds_a_query_string_or_a_patient(pms, node, lesion_image) -> None:
    patient = await pms.care()
    marked = f"marked-{uuid4().hex}"
    assert (await pms.upload(patient, lesion_image(), encounter_id=marked)).status_code == 201
    refused = await pms.upload("no-such-patient-" + marked[:20], lesion_image())
    assert refused.status_code == 403
    for params in ({"patient_id": patient}, {"patient_id": patient, "limit": "x"}, {"patient_id": "a b"}):
        await pms.client.get("/api/lesions", params=params, headers=pms.token())

    async def knock() -> None:
        for _ in range(_FLUSH // 20):
            await pms.client.get("/api/lesions", params={"patient_id": patient})

    await asyncio.gather(*(knock() for _ in range(20)))
    needles = [patient.encode(), marked.encode(), b"patient_id=", b"no-such-patient-"]
    looked = 0
    for path in logs(node):
        content = path.read_bytes()
        looked += path.suffix in {".log", ".out", ".err"}
        for needle in needles:
            assert needle not in content, f"{needle!r} in {path}"
    assert looked > 5


async def test_no_file_of_the_node_holds_an_image_in_clear(pms, node, lesion_image, large_original) -> None:
    images = [lesion_image(77), large_original(800), large_original(2000)]
    for image in images:
        assert (await pms.upload(await pms.care(), image)).status_code == 201
    needles = [image[len(image) // 2 :][:64] for image in images]
    looked = 0
    for path in logs(node):
        content = path.read_bytes()
        looked += 1
        assert not any(needle in content for needle in needles), path
    assert looked > 20
    for path in (node.home / "postgres" / "data").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path


async def test_the_secrets_of_the_node_are_its_users_alone(node) -> None:
    secrets = [
        *(node.home / "secrets").iterdir(),
        *(node.home / "keys").iterdir(),
        node.home / "ray" / "token",
    ]
    assert len(secrets) >= 3
    for path in secrets:
        assert path.stat().st_mode & 0o077 == 0, path
    assert node.ray.directory.stat().st_mode & 0o077 == 0
