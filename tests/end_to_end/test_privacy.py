"""What a node leaves on disk in clear after a load: no image, no patient, no query string."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
import secrets
import subprocess
import sys
import time
from uuid import uuid4

import asyncpg
import pytest

from cluster.object_memory import is_memory
from cluster.postgres_state import PostgresState
from cluster.safety import process_findings
from serve_app.settings import REPOSITORY
from tests.end_to_end.conftest import draw_original
from tests.end_to_end.plaintext import Needles, files, parts

pytestmark = pytest.mark.ray

#: More than Serve keeps back before it writes its request log (RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE).
_FLUSH = 1_100
_AT_ONCE = 4
_TEMPORARY = Path("/tmp")
_GONE_S = 60.0


def _noise(side: int) -> bytes:
    """An original of three bytes a pixel that nobody else has: a lesion under noise, as PNG."""
    return draw_original(side, secrets.randbits(64))


@dataclass
class Load:
    """What was sent, and what became of it."""

    since: float = field(default_factory=time.time)
    images: dict[bytes, str] = field(default_factory=dict)
    words: dict[bytes, str] = field(default_factory=dict)
    patients: dict[bytes, str] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)

    def image(self, data: bytes, name: str) -> bytes:
        """Look for this image afterwards."""
        self.images |= parts(data, name)
        return data

    def patient(self, patient_id: str) -> str:
        """Look for this patient afterwards."""
        self.patients[patient_id.encode()] = patient_id
        return patient_id


@pytest.fixture(scope="module")
async def load(pms, node, lesion_image) -> Load:
    """Uploads, some at once; originals of every way of travel; refusals; everything read again."""
    load = Load()
    patients = [load.patient(await pms.care(f"dr-{n}")) for n in range(_AT_ONCE)]
    # The clocks of files tick more slowly than ours.
    load.since -= 1

    async def visit(n: int) -> None:
        images = [
            load.image(lesion_image(secrets.randbits(31)), f"photograph {n}.{turn}") for turn in range(2)
        ]
        # Over 1 MB a form's parser may put a file on disk; over 1.5 MB an argument goes through Ray's store.
        images += [load.image(_noise(side), f"original {n} of {side}") for side in (620, 800)[: n % 3]]
        for image in images:
            await _upload_and_read(pms, load, f"dr-{n}", patients[n], image)

    await asyncio.gather(*(visit(n) for n in range(_AT_ONCE)))
    # So large that they travel through Ray's object store.
    large = [load.image(_noise(2000), f"large original {n}") for n in range(_AT_ONCE)]
    for found in await asyncio.gather(*(_upload(pms, "dr-0", patients[0], image) for image in large)):
        load.statuses[f"large {found}"] += 1
    await _be_refused(pms, load, patients[0])
    await _flush(pms, patients)
    await pms.until_none_pending()
    state = PostgresState.read(node.home / "postgres.json")
    connection = await asyncpg.connect(
        host="127.0.0.1",
        port=state.port,
        user="derm_superuser",
        password=state.superuser_password,
        database="postgres",
    )
    await connection.execute("CHECKPOINT")  # or the images are in the write-ahead log alone
    await connection.close()
    return load


async def _upload(pms, subject: str, patient: str, image: bytes, **fields: str) -> int:
    response = await pms.client.post(
        "/api/lesions",
        data={"patient_id": patient, **fields},
        files={"image": ("lesion.jpg", image)},
        headers={**pms.token(subject), "X-Request-ID": f"{patient}.1950-01-31"},
    )
    return response.status_code


async def _upload_and_read(pms, load: Load, subject: str, patient: str, image: bytes) -> None:
    headers = {**pms.token(subject), "X-Request-ID": f"{patient}.1950-01-31"}
    files = {"image": ("lesion.jpg", image)}
    response = await pms.client.post(
        "/api/lesions", data={"patient_id": patient}, files=files, headers=headers
    )
    load.statuses[f"upload {response.status_code}"] += 1
    if response.status_code not in {201, 202}:
        return
    answer = response.json()
    path = f"/api/lesions/{answer['lesion_id']}"
    original = await pms.client.get(f"{path}/images/{answer['image_id']}", headers=headers)
    assert original.content == image
    assert original.headers["x-request-id"] == headers["X-Request-ID"]
    for params in ({}, {"patient_id": patient}):
        read = await pms.client.get(path if not params else "/api/lesions", params=params, headers=headers)
        load.statuses[f"read {read.status_code}"] += 1


async def _be_refused(pms, load: Load, patient: str) -> None:
    marked = f"marked-{uuid4().hex}"
    load.words |= {marked.encode(): "encounter", b"no-such-patient-": "stranger", b"patient_id=": "query"}
    image = load.image(_noise(620), "refused original")
    broken = load.image(b"\xff\xd8\xff\xe0" + secrets.token_bytes(1_200_000), "broken original")
    bomb = load.image(b"\x89PNG\r\n\x1a\n" + secrets.token_bytes(21 * 1024 * 1024), "original over the limit")
    assert await _upload(pms, "dr-0", f"no-such-patient-{marked[:20]}", image, encounter_id=marked) == 403
    assert await _upload(pms, "dr-1", patient, image, encounter_id=marked) == 403
    assert await _upload(pms, "dr-0", patient, image, encounter_id=marked, sex=marked) == 422
    assert await _upload(pms, "dr-0", patient, broken, encounter_id=marked) in {415, 422}
    assert await _upload(pms, "dr-0", patient, bomb, encounter_id=marked) == 413
    assert await _upload(pms, "dr-0", patient, image, encounter_id=marked) == 201
    for params in ({"patient_id": patient, "limit": "x"}, {"patient_id": "a b"}):
        await pms.client.get("/api/lesions", params=params, headers=pms.token("dr-0"))


async def _flush(pms, patients: list[str]) -> None:
    async def read(n: int) -> None:
        for turn in range(_FLUSH // 20):
            headers = pms.token(f"dr-{n % _AT_ONCE}") if turn < 5 else {}
            await pms.client.get(
                "/api/lesions", params={"patient_id": patients[n % _AT_ONCE]}, headers=headers
            )

    await asyncio.gather(*(read(n) for n in range(20)))


@pytest.fixture(scope="module")
def in_database(load: Load, node) -> dict[str, set[str]]:
    """What stands in clear in the database's files, the write-ahead log among them."""
    looked = list(files(node.home / "postgres" / "data"))
    assert sum(path.stat().st_size for path in looked) > 50e6
    return Needles(load.images | load.patients).among(looked)


def test_the_load_was_one(load: Load) -> None:
    """Or nothing would be shown by finding nothing."""
    assert load.statuses["upload 201"] >= 8
    assert load.statuses["read 200"] >= 16
    assert load.statuses["large 201"] + load.statuses["large 202"] >= 1
    assert {key.split()[1] for key in load.statuses} <= {"200", "201", "202", "429", "503"}


def test_what_stands_in_the_database_in_clear_is_found_there(load: Load, in_database) -> None:
    """Patients' ids do, in tables and in the write-ahead log: so an image would be found."""
    assert any("/base/" in path for path in in_database)
    assert any("/pg_wal/" in path for path in in_database)
    assert set(load.patients.values()) <= set().union(*in_database.values())


def test_no_image_is_in_the_database_in_clear(load: Load, in_database) -> None:
    patients = set(load.patients.values())
    assert {path: images for path, found in in_database.items() if (images := found - patients)} == {}


async def test_the_audit_log_keeps_no_id_that_could_name_somebody(load: Load, pms) -> None:
    assert load.patients
    assert (
        await pms.owner.fetchval("SELECT count(*) FROM audit_events WHERE request_id LIKE '%.1950-01-31%'")
        == 0
    )


def test_no_file_of_the_node_holds_an_image_or_a_patient_or_a_query(load: Load, node) -> None:
    needles = Needles(load.images | load.words | load.patients)
    looked = list(files(node.home, without=node.home / "postgres" / "data"))
    looked += files(node.ray.directory)
    assert len([path for path in looked if path.suffix in {".log", ".out", ".err"}]) > 5
    assert needles.among(looked) == {}


def test_no_temporary_file_holds_an_image_or_a_patient(load: Load, node) -> None:
    """Whoever made it: the service, a library of it, PostgreSQL or Ray."""
    data = node.home / "postgres" / "data"
    looked = list(files(_TEMPORARY, since=load.since, without=data))
    assert looked
    assert Needles(load.images | load.patients).among(looked) == {}


def test_ray_keeps_nothing_of_a_request(load: Load, node) -> None:
    """What went through its store is gone, from its spill directory too, once the request is over."""
    needles = Needles(load.images | load.patients)
    deadline = time.monotonic() + _GONE_S
    while found := needles.among(files(node.ray.objects)):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


_HOLDING = """
import sys
import numpy as np
import ray
ray.init(address=sys.argv[1], namespace="held", log_to_driver=False)
mark = bytes.fromhex(sys.argv[2])
held = []
for n in range(int(sys.argv[3])):
    pixels = np.zeros(20_000_000, np.uint8)
    pixels[:len(mark)] = np.frombuffer(mark, np.uint8)
    held.append(ray.put(pixels))
print("held", flush=True)
sys.stdin.readline()
held.clear()
sys.stdin.readline()
"""


@contextmanager
def _held(node, mark: bytes, count: int) -> Iterator[Callable[[], None]]:
    """Have a process hold as many objects of 20 MB, which begin with `mark`, until it is told to let go."""
    command = [sys.executable, "-c", _HOLDING, node.ray.address, mark.hex(), str(count)]
    with subprocess.Popen(
        command,
        env={**node.ray.environment, "PYTHONWARNINGS": ""},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout.readline() == b"held\n"

            def let_go() -> None:
                process.stdin.write(b"\n")
                process.stdin.flush()

            yield let_go
        finally:
            process.communicate(b"\n\n")


def test_what_does_not_fit_into_the_object_store_is_spilled_into_memory(node) -> None:
    """200 MB in a store of 150: Ray writes some to its spill directory, which no disk sees."""
    if node.ray.objects.parent != node.ray.memory or not node.ray.objects.is_dir():
        pytest.skip("this machine has no room in /dev/shm")
    mark = secrets.token_bytes(64)
    needles, since = Needles({mark: "object"}), time.time() - 1
    assert is_memory(node.ray.objects)
    assert "object_memory" not in {finding.name for finding in process_findings(node.home)}
    with _held(node, mark, count=10) as let_go:
        assert _until(lambda: needles.among(files(node.ray.objects)))
        on_disk = [*files(node.home), *files(node.ray.directory), *files(_TEMPORARY, since=since)]
        assert needles.among(on_disk) == {}
        let_go()
        assert _until(lambda: not needles.among(files(node.ray.objects))), list(files(node.ray.objects))


def _until(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + _GONE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(condition())


async def test_the_secrets_of_the_node_are_its_users_alone(node) -> None:
    secrets = [
        *(node.home / "secrets").iterdir(),
        *(node.home / "keys").iterdir(),
        node.home / "ray" / "token",
    ]
    assert len(secrets) >= 3
    for path in secrets:
        assert path.stat().st_mode & 0o077 == 0, path
    for folder in (node.ray.directory, node.ray.objects):
        assert not folder.exists() or folder.stat().st_mode & 0o077 == 0, folder
