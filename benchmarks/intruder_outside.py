"""What an intruder tries over the network: without a token, and with a good one but without the patient in care."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import suppress
import json
import os
import re
import socket
import subprocess
import sys
from threading import Thread
import time
from uuid import uuid4

import httpx
import psutil

from benchmarks.intruder_node import CLINICIAN, STRANGER, Verdict, Victim, answered, attempt, each
from cluster.postgres import SUPERUSER
from cluster.ray_node import RayNode
from serve_app.access.tokens import mint_token

#: What one request may add to the memory of the process that takes it.
_MOST_GROWTH = 64 * 1024**2

# --- a stranger on the network: an address, and no token


def routes(victim: Victim) -> Iterator[tuple[str, str]]:
    """Every route of the OpenAPI document but the health checks, with the victim's ids filled in."""
    document = victim.ask("GET", "/api/openapi.json", victim.token("dr-demo")).json()
    ids = {name: str(victim.lesion.get(name, uuid4())) for name in ("lesion_id", "image_id", "assessment_id")}
    for path, methods in document["paths"].items():
        filled = re.sub(r"{(\w+)}", lambda found: ids.get(found[1], str(uuid4())), path)
        for method in methods:
            if method in {"get", "post", "put", "patch", "delete"} and path not in {"/healthz", "/readyz"}:
                yield method.upper(), filled


@attempt(STRANGER, "every route without a token, and with forged ones")
def without_a_token(victim: Victim) -> tuple[Verdict, str]:
    """No token; `alg: none`; another key; another issuer's audience."""
    claims = {"sub": "dr-demo", "iss": "derm-cds", "aud": "derm-cds", "exp": time.time() + 60}
    head, body = (
        urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "none"}, claims)
    )
    of_another_key = mint_token(
        secret="k" * 64,
        issuer="derm-cds",
        audience="derm-cds",
        subject="dr-demo",
        roles=["clinician"],
        lifetime_s=60,
    )
    forged = {"no": None, "an unsigned": f"{head}.{body}.", "another key's": of_another_key}
    return each(
        {
            f"{method} {path} with {name} token": answered(victim.ask(method, path, token), 401, 429)
            for method, path in routes(victim)
            for name, token in forged.items()
        }
    )


@attempt(STRANGER, "40 bad tokens, each with another X-Forwarded-For")
def forwarded_for(victim: Victim) -> tuple[Verdict, str]:
    """Guessing is limited by address: the caller must not choose what address that is."""
    codes = [
        victim.ask("GET", "/api/lesions", "guess", headers={"X-Forwarded-For": f"203.0.113.{n}"}).status_code
        for n in range(40)
    ]
    said = f"{codes.count(401)} × 401, {codes.count(429)} × 429"
    return ("refused" if codes[-1] == 429 else "succeeded"), said


@attempt(STRANGER, "a body of 2 GB without a token, with a length and without one")
def endless_body(victim: Victim) -> tuple[Verdict, str]:
    """What no process of the node may take into memory before the caller is known."""
    return _send_much(victim, f"/api/lesions/{uuid4()}/assessments/{uuid4()}/replay", None)


@attempt(CLINICIAN, "a body of 2 GB with a good token, to a route that takes none")
def endless_body_with_token(victim: Victim) -> tuple[Verdict, str]:
    """While the service is busy with the request, nobody reads its body."""
    answer, token = victim.lesion, victim.token("dr-demo")
    path = f"/api/lesions/{answer['lesion_id']}/assessments/{answer['assessment_id']}/replay"
    return _send_much(victim, path, token)


def _send_much(victim: Victim, path: str, token: str | None) -> tuple[Verdict, str]:
    processes = victim.processes()
    before = {process.pid: _resident(process) for process in processes}
    most, sent = 0, dict.fromkeys(("chunked", "with a length"), 0)
    for name in sent:

        def send(name: str = name) -> None:
            sent[name] = _stream(victim.url, path, token, 2 * 1024**3, chunked=name == "chunked")

        sender = Thread(target=send)
        sender.start()
        while sender.is_alive():
            most = max(most, *(_resident(process) - before[process.pid] for process in processes))
            sender.join(0.05)
    alive = victim.ask("GET", "/readyz").status_code == 200
    said = ", ".join(f"{name}: {mb} MB taken" for name, mb in sent.items())
    said += f"; largest growth of a process {most / 1024**2:.0f} MB"
    return ("refused" if most <= _MOST_GROWTH and alive else "succeeded"), said


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0


def _stream(url: str, path: str, token: str | None, size: int, *, chunked: bool) -> int:
    """Send a body as fast as it is taken, for 10 seconds at most; how many MB were taken."""
    parts = httpx.URL(url)
    block, taken, until = b"x" * 65_536, 0, time.monotonic() + 10
    head = [f"POST {path} HTTP/1.1", "Host: node"]
    head += ["Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"]
    head += [f"Authorization: Bearer {token}"] if token else []
    with suppress(OSError), socket.create_connection((parts.host, parts.port or 80), timeout=5) as connection:
        connection.sendall("".join(f"{line}\r\n" for line in [*head, ""]).encode())
        piece = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
        while taken < size and time.monotonic() < until:
            connection.sendall(piece)
            taken += len(block)
    return taken // 1024**2


@attempt(STRANGER, "whatever listens on another address than loopback")
def listeners(victim: Victim) -> tuple[Verdict, str]:
    """The API ends in the operator's TLS proxy; nothing else is to be reached at all."""
    found = {
        f"{connection.laddr.ip}:{connection.laddr.port}"
        for process in victim.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith(("127.", "::1"))
    }
    return ("succeeded", ", ".join(sorted(found))) if found else ("refused", "everything listens on loopback")


@attempt(STRANGER, "Ray's own ports, from this machine, without its token")
def ray_without_token(victim: Victim) -> tuple[Verdict, str]:
    """Who may submit a task to Ray runs code with the node's keys."""
    program = "import ray, sys; ray.init(address=sys.argv[1]); print(ray.get(ray.remote(lambda: 1).remote()))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DERM_"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "HOME": "/nonexistent"}
    command = [sys.executable, "-W", "ignore", "-c", program, RayNode(victim.home).address]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=40, env=environment, cwd="/"
        )
    except subprocess.TimeoutExpired:
        return "refused", "no connection within 40 s"
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1][:120]
    return ("succeeded", done.stdout.strip()) if done.returncode == 0 else ("refused", said)


# --- a clinician with a good token, and without this patient in care


@attempt(CLINICIAN, "every route of another clinician's lesion")
def another_patient(victim: Victim) -> tuple[Verdict, str]:
    """Nothing of the lesion comes back, and every denial is an event."""
    token = victim.token("dr-other")
    mine = [(method, path) for method, path in routes(victim) if str(victim.lesion["lesion_id"]) in path]
    return each({f"{m} {p}": answered(victim.ask(m, p, token), 403, 404, 405, 422) for m, p in mine})


@attempt(CLINICIAN, "a denial that leaves no event, by Ray's own headers or by hanging up")
def unseen_denial(victim: Victim) -> tuple[Verdict, str]:
    """Ask what is denied so that the answer is cut off before it is recorded."""
    token, path = victim.token("dr-quiet"), f"/api/lesions/{victim.lesion['lesion_id']}"
    tries = 6
    for n in range(tries):
        headers = {"x-request-timeout-seconds": "0.001", "x-request-disconnect-disabled": "?1"}
        with suppress(httpx.HTTPError):
            timeout = httpx.Timeout(30 if n % 2 else 0.02)
            bearer = {"Authorization": f"Bearer {token}"}
            httpx.get(victim.url + path, headers={**bearer, **(headers if n % 2 else {})}, timeout=timeout)
    time.sleep(2)
    (row,) = victim.sql(
        SUPERUSER, "SELECT count(*) FROM audit_events WHERE actor = 'dr-quiet' AND outcome = 'denied'"
    )
    return ("refused" if row[0] >= tries else "succeeded"), f"{row[0]} events of {tries} denials"


@attempt(CLINICIAN, "a token whose subject is one of the service's own actors, or that lives for years")
def our_own_names(victim: Victim) -> tuple[Verdict, str]:
    """What an event says was done by the node's own account must not be a caller's doing."""
    path = f"/api/lesions/{victim.lesion['lesion_id']}"
    subjects = ("os:root", "OS:root", "derm-cds:outbox", " dr-demo", "dr-demo\u200b", "retention")
    tries = {repr(s): answered(victim.ask("GET", path, victim.token(s)), 401) for s in subjects}
    old = victim.token("dr-demo", lifetime_s=10 * 365 * 86_400)
    return each(tries | {"ten years": answered(victim.ask("GET", path, old), 401)})


@attempt(CLINICIAN, "an emergency access that was judged unjustified, used on")
def judged_emergency(victim: Victim) -> tuple[Verdict, str]:
    """The review ends it."""
    token, path = victim.token("dr-glass"), f"/api/lesions/{victim.lesion['lesion_id']}"
    asked = {"patient_id": victim.lesion["patient_id"], "reason": "unconscious, on call tonight"}
    opened = victim.ask("POST", "/api/emergency-access", token, json=asked)
    if victim.ask("GET", path, token).status_code != 200:
        return "succeeded", f"the emergency access did not open: {opened.text[:80]}"
    judged = f"/api/emergency-access/{opened.json()['emergency_id']}/review"
    chief = victim.token("chief", ("supervisor",))
    victim.ask("POST", judged, chief, json={"outcome": "not_justified", "note": "no reason to"})
    return answered(victim.ask("GET", path, token), 403)
