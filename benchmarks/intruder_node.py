"""The node that the intruder comes to, and what everybody needs to try something on it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any, Literal
from uuid import uuid4

import asyncpg
import httpx
from joserfc import jwt
from joserfc.jwk import OctKey
import psutil

from benchmarks.faults_load import new_home
from benchmarks.systems import with_descendants
from cluster.node_files import read_service_environment
from cluster.ports import choose_port
from cluster.postgres import DATABASE, SUPERUSER, EmbeddedPostgres, PostgresState
from cluster.ray_node import RayNode
from serve_app.settings import REPOSITORY

Verdict = Literal["refused", "found", "not promised", "succeeded"]
_STARTS_WITHIN_S, _STOPS_WITHIN_S = 300.0, 90.0


class Refused(Exception):
    """The attempt was not let; the text is what it met."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A running node, and the lesion of a patient in the care of `dr-demo`."""

    home: Path
    url: str
    server: EmbeddedPostgres
    lesion: Mapping[str, Any] = field(default_factory=dict)

    def derm_cds(self, *arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one command of the operator's."""
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--home", str(home or self.home)]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=300, cwd=REPOSITORY
        )

    def token(self, subject: str, roles: tuple[str, ...] = ("clinician",), lifetime_s: int = 600) -> str:
        """What an issuer that looks at nothing would sign."""
        secret = read_service_environment(self.home)["DERM_TOKEN_SECRET"]
        claims: jwt.Claims = {"iss": "derm-cds", "aud": "derm-cds", "sub": subject, "roles": list(roles)}
        claims |= {"iat": int(time.time()), "exp": int(time.time()) + lifetime_s, "jti": str(uuid4())}
        return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(secret))

    def ask(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:  # noqa: ANN401
        """Send one request, with a bearer token if there is one."""
        headers = {**options.pop("headers", {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **options)

    def state(self) -> PostgresState:
        """The database's passwords and port."""
        state = PostgresState.read(self.server.state_file)
        if state is None:
            raise RuntimeError("the node's database is not set up")
        return state

    def sql(self, user: str, *statements: str) -> list[asyncpg.Record]:
        """Run statements as one of the database's roles; the last one's rows. Refused where the server refuses."""
        state = self.state()
        password = {
            SUPERUSER: state.superuser_password,
            "derm_owner": state.owner_password,
            "derm_app": state.app_password,
        }[user]
        place = self.server.socket_directory(state) or "127.0.0.1"

        async def run() -> list[asyncpg.Record]:
            connection = await asyncpg.connect(
                host=str(place), port=state.port, user=user, password=password, database=DATABASE
            )
            try:
                rows: list[asyncpg.Record] = []
                for statement in statements:
                    rows = await connection.fetch(statement, timeout=30)
                return rows
            finally:
                await connection.close()

        try:
            return asyncio.run(run())
        except asyncpg.PostgresError as error:
            raise Refused(str(error).splitlines()[0]) from error

    def processes(self) -> list[psutil.Process]:
        """Everything that runs of the node."""
        roots = [*RayNode(self.home).processes()]
        if (pid := self.server.pid()) is not None:
            roots.append(psutil.Process(pid))
        return list(with_descendants(roots).values())

    def verify(self) -> str | None:
        """What `audit verify` finds, in its first line; None when it finds nothing."""
        said = self.derm_cds("audit", "verify")
        return said.stderr.strip().splitlines()[0] if said.returncode else None


@contextmanager
def running_node() -> Iterator[Victim]:
    """A node from nothing, as `derm-cds serve` starts it, with one lesion on record; stopped and removed after."""
    home, port = new_home("derm-intruder-"), choose_port()
    victim = Victim(home, f"http://127.0.0.1:{port}", EmbeddedPostgres(home))
    said = home.with_name(f"{home.name}.log")
    command = [sys.executable, "-m", "cluster.cli", "serve", "--home", str(home), "--port", str(port)]
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
    try:
        until = time.monotonic() + _STARTS_WITHIN_S
        while "Ctrl-C stops" not in said.read_text():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(said.read_text()[-4000:])
            time.sleep(0.5)
        with (home / "sample-lesion.jpg").open("rb") as image:
            sent = victim.ask(
                "POST", "/api/lesions", victim.token("dr-demo"),
                files={"image": image}, data={"patient_id": "demo-patient"},
            )  # fmt: skip
        sent.raise_for_status()
        victim.derm_cds("audit", "checkpoint")
        yield Victim(home, victim.url, victim.server, sent.json())
    finally:
        process.terminate()
        try:
            process.wait(_STOPS_WITHIN_S)
        finally:
            RayNode(home).stop()
            victim.server.stop(mode="immediate")
            shutil.rmtree(RayNode(home).directory, ignore_errors=True)
            shutil.rmtree(home, ignore_errors=True)
            said.unlink(missing_ok=True)


# --- what is tried

ACTORS = STRANGER, CLINICIAN, APPLICATION, SUPER, BACKUPS, LOCAL = (
    "stranger",
    "clinician without care",
    "application's role",
    "database's superuser",
    "writer of the backup store",
    "another user of the machine",
)
Attack = Callable[[Victim], tuple[Verdict, str]]
ATTACKS: list[tuple[str, str, Attack]] = []


def attempt(actor: str, tried: str) -> Callable[[Attack], Attack]:
    """Have a function tried as `actor`; they run in the order of ACTORS, the gentle ones first."""

    def add(attack: Attack) -> Attack:
        ATTACKS.append((actor, tried, attack))
        return attack

    return add


def answered(response: httpx.Response, *allowed: int) -> tuple[Verdict, str]:
    """Refused when the answer is one of `allowed`, as a problem document; else it got through."""
    problem = response.headers.get("content-type", "").startswith("application/problem+json")
    said = (
        f"{response.status_code} {response.json().get('code') if problem else 'without a problem document'}"
    )
    return ("refused" if response.status_code in allowed and problem else "succeeded"), said


def each(answers: Mapping[str, tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """The verdict of several tries together: those that got through are named."""
    through = {what: said for what, (verdict, said) in answers.items() if verdict == "succeeded"}
    if through:
        return "succeeded", "; ".join(f"{what}: {said}" for what, said in through.items())
    met = Counter(said for _, said in answers.values())
    verdict: Verdict = "found" if any(v == "found" for v, _ in answers.values()) else "refused"
    return verdict, f"{len(answers)} tries: " + ", ".join(f"{n} × {said}" for said, n in met.most_common(4))
