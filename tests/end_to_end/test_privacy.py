"""What a node leaves on disk in clear after a load: no image, no patient, no query string."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
import os
from pathlib import Path
import re
import secrets
import stat
import subprocess
import sys
import time
from uuid import uuid4

import asyncpg
import httpx
import numpy as np
import pytest

from cluster.accounts import DECODER, account_of
from cluster.postgres import PostgresState
from cluster.ray_node import SHARED, is_memory
from cluster.safety import account_findings, process_findings
from serve_app.settings import REPOSITORY
from tests.end_to_end.conftest import draw_original
from tests.waiting import until

pytestmark = pytest.mark.ray

#: More than Serve keeps back before it writes its request log (RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE).
_FLUSH = 1_100
_AT_ONCE = 4
_TEMPORARY = Path("/tmp")
_GONE_S = 60.0
_CAP_SYS_ADMIN = 21


_CHUNK = 16 * 1024 * 1024
_PREFIX = 2


class Needles:
    """Byte strings, each with the name under which a find is told."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._longest = max(map(len, names))
        self._by_beginning: dict[bytes, list[tuple[bytes, str]]] = {}
        # One search a needle is too slow: the first two bytes tell nearly all places apart, and their table
        # fits a processor's cache.
        self._begins = np.zeros(1 << 8 * _PREFIX, dtype=bool)
        for needle, name in names.items():
            assert len(needle) >= _PREFIX
            self._by_beginning.setdefault(needle[:_PREFIX], []).append((needle, name))
            self._begins[int.from_bytes(needle[:_PREFIX], "little")] = True

    def of(self, content: bytes) -> set[str]:
        """Name those that stand in `content`."""
        found: set[str] = set()
        for odd in range(_PREFIX):
            data = np.frombuffer(content[odd:][: (len(content) - odd) // _PREFIX * _PREFIX], "<u2")
            for place in (np.flatnonzero(self._begins[data]) * _PREFIX + odd).tolist():
                beginning = self._by_beginning[content[place : place + _PREFIX]]
                found |= {name for needle, name in beginning if content.startswith(needle, place)}
        return found

    def inside(self, path: Path) -> set[str]:
        """Name those that stand in a file; none when it goes while it is being read."""
        found: set[str] = set()
        try:
            with path.open("rb") as file:
                content = b""
                while chunk := file.read(_CHUNK):
                    content = content[-self._longest :] + chunk
                    found |= self.of(content)
        except FileNotFoundError:
            pass
        return found

    def among(self, paths: Iterable[Path]) -> dict[str, set[str]]:
        """Path: what was found in it, for all that hold anything."""
        return {str(path): found for path in paths if (found := self.inside(path))}


def parts(image: bytes, name: str) -> dict[bytes, str]:
    """Needles from an image's beginning (past what every image of its kind begins with), middle and end.

    The middle also in the hexadecimal form that PostgreSQL and Python print.
    """
    middle = image[len(image) // 2 :][:64]
    return {
        image[1024:1088]: f"{name}, beginning",
        image[len(image) // 4 :][:64]: f"{name}, first quarter",
        middle: f"{name}, middle",
        middle[:24].hex().encode(): f"{name}, in hexadecimal",
        image[-80:-16]: f"{name}, end",
    }


def files(root: Path, *, since: float = 0.0, without: Path | None = None) -> Iterator[Path]:
    """Every regular file below `root` that was changed at `since` (epoch, s) or later and may be read by us."""
    for folder, names, found in os.walk(root):
        names[:] = [name for name in names if Path(folder, name) != without]
        for name in found:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_ctime >= since and os.access(path, os.R_OK):
                yield path


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
        images += [
            load.image(draw_original(side, secrets.randbits(64)), f"original {n} of {side}")
            for side in (620, 800)[: n % 3]
        ]
        for image in images:
            await _upload_and_read(pms, load, f"dr-{n}", patients[n], image)

    await asyncio.gather(*(visit(n) for n in range(_AT_ONCE)))
    # So large that they travel through Ray's object store.
    large = [
        load.image(draw_original(2000, secrets.randbits(64)), f"large original {n}") for n in range(_AT_ONCE)
    ]
    for found in await asyncio.gather(*(_upload(pms, "dr-0", patients[0], image) for image in large)):
        load.statuses[f"large {found.status_code}"] += 1
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
    # Or nothing would be shown by finding nothing.
    assert load.statuses["upload 201"] >= 8
    assert load.statuses["read 200"] >= 16
    assert load.statuses["large 201"] + load.statuses["large 202"] >= 1
    assert {key.split()[1] for key in load.statuses} <= {"200", "201", "202", "429", "503"}
    return load


async def _upload(pms, subject: str, patient: str, image: bytes, **fields: str) -> httpx.Response:
    headers = {**pms.token(subject), "X-Request-ID": f"{patient}.1950-01-31"}
    return await pms.upload(patient, image, headers=headers, **fields)


async def _upload_and_read(pms, load: Load, subject: str, patient: str, image: bytes) -> None:
    response = await _upload(pms, subject, patient, image)
    load.statuses[f"upload {response.status_code}"] += 1
    if response.status_code not in {201, 202}:
        return
    headers = {name: response.request.headers[name] for name in ("authorization", "x-request-id")}
    path = f"/api/lesions/{response.json()['lesion_id']}"
    original = await pms.client.get(f"{path}/images/{response.json()['image_id']}", headers=headers)
    assert original.content == image
    assert original.headers["x-request-id"] == headers["x-request-id"]
    for url in (path, f"/api/lesions?patient_id={patient}"):
        load.statuses[f"read {(await pms.client.get(url, headers=headers)).status_code}"] += 1


async def _be_refused(pms, load: Load, patient: str) -> None:
    marked = f"marked-{uuid4().hex}"
    load.words |= {marked.encode(): "encounter", b"no-such-patient-": "stranger", b"patient_id=": "query"}
    image = load.image(draw_original(620, secrets.randbits(64)), "refused original")
    broken = load.image(b"\xff\xd8\xff\xe0" + secrets.token_bytes(1_200_000), "broken original")
    bomb = load.image(b"\x89PNG\r\n\x1a\n" + secrets.token_bytes(21 * 1024 * 1024), "original over the limit")
    for subject, whose, sent, fields, statuses in (
        ("dr-0", f"no-such-patient-{marked[:20]}", image, {}, {403}),
        ("dr-1", patient, image, {}, {403}),
        ("dr-0", patient, image, {"sex": marked}, {422}),
        ("dr-0", patient, broken, {}, {415, 422}),
        ("dr-0", patient, bomb, {}, {413}),
        ("dr-0", patient, image, {}, {201}),
    ):
        response = await _upload(pms, subject, whose, sent, encounter_id=marked, **fields)
        assert response.status_code in statuses, response.text
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


def test_of_patients_and_images_the_database_holds_only_ids_in_clear(load: Load, node) -> None:
    """The write-ahead log too. Patients' ids are found in both: so an image would be."""
    looked = list(files(node.home / "postgres" / "data"))
    assert sum(path.stat().st_size for path in looked) > 50e6
    found = Needles(load.images | load.patients).among(looked)
    assert any("/base/" in path for path in found)
    assert any("/pg_wal/" in path for path in found)
    assert set().union(*found.values()) == set(load.patients.values())


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


def test_no_temporary_file_and_no_object_of_ray_holds_an_image_or_a_patient(load: Load, node) -> None:
    """Whoever made it. What went through Ray's store is gone, from its spill directory too, once the request is over."""
    needles = Needles(load.images | load.patients)
    looked = list(files(_TEMPORARY, since=load.since, without=node.home / "postgres" / "data"))
    assert looked
    assert needles.among(looked) == {}
    assert until(lambda: not needles.among(files(node.ray.objects)), _GONE_S, 0.2)


def _may_leave_the_network() -> bool:
    rights = re.search(r"^CapEff:\t(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return rights is not None and bool(int(rights[1], 16) >> _CAP_SYS_ADMIN & 1)


def test_images_are_decoded_where_neither_keys_nor_ray_nor_the_database_are(load: Load, node) -> None:
    """Every process that has read an image: its account, its rights, and all that it has open."""
    assert load.statuses
    decoding = [process for process in node.ray.processes() if process.name() == "derm-decoding"]
    assert decoding
    (replica, *_) = node.replicas("preprocess")
    for process in decoding:
        place = Path(f"/proc/{process.pid}")
        assert set(process.uids()) == {account_of(DECODER).uid}
        status, limits = (place / "status").read_text(), (place / "limits").read_text()
        assert "NoNewPrivs:\t1\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        assert re.search(r"^Max open files +0 +0 ", limits, re.MULTILINE)
        assert b"RAY_" not in (place / "environ").read_bytes()
        opened = {str(each.readlink()) for each in (place / "fd").iterdir()}
        assert all(each.startswith(("socket:", "/dev/null", str(node.ray.directory))) for each in opened), (
            opened
        )
        if _may_leave_the_network():
            assert (place / "ns" / "net").readlink() != Path(f"/proc/{replica.pid}/ns/net").readlink()
    assert "accounts" not in {
        each.name for each in account_findings(node.home) if "root runs" not in each.advice
    }


_HOLDING = """
import sys
import numpy as np
import ray
ray.init(address=sys.argv[1], namespace="held", log_to_driver=False)
pixels = np.zeros(20_000_000, np.uint8)
pixels[:64] = np.frombuffer(bytes.fromhex(sys.argv[2]), np.uint8)
held = [ray.put(pixels) for _ in range(10)]
print("held", flush=True)
sys.stdin.readline()
held.clear()
sys.stdin.readline()
"""


@contextmanager
def _held(node, mark: bytes) -> Iterator[Callable[[], None]]:
    """Have a process hold ten objects of 20 MB, which begin with `mark`, until it is told to let go."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDING, node.ray.address, mark.hex()],
        env={**node.ray.environment, "PYTHONWARNINGS": ""},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield lambda: process.stdin.write(b"\n")
        finally:
            process.communicate(b"\n\n")


def test_what_does_not_fit_into_the_object_store_is_spilled_into_memory(node) -> None:
    """200 MB in a store of 150: Ray writes some to its spill directory, which no disk sees."""
    if node.ray.objects.parent != SHARED or not node.ray.objects.is_dir():
        pytest.skip("this machine has no room in /dev/shm")
    mark = secrets.token_bytes(64)
    needles, since = Needles({mark: "object"}), time.time() - 1
    assert is_memory(node.ray.objects)
    assert "object_memory" not in {finding.name for finding in process_findings(node.home)}
    with _held(node, mark) as let_go:
        assert until(lambda: needles.among(files(node.ray.objects)), _GONE_S, 0.2)
        on_disk = [*files(node.home), *files(node.ray.directory), *files(_TEMPORARY, since=since)]
        assert needles.among(on_disk) == {}
        let_go()
        assert until(lambda: not needles.among(files(node.ray.objects)), _GONE_S, 0.2), list(
            files(node.ray.objects)
        )


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
