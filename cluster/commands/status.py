"""`derm-cds status`: what runs here and how it is; exit code 0 ready, 1 in trouble, 3 not running, 4 unsafe."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
import json
from pathlib import Path
from typing import Any
import urllib.error
import urllib.request

import psutil
from pydantic import ValidationError

from cluster.commands.audit import checkpoint_log
from cluster.node_files import explain, own_database
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.ray_node import RayNode
from cluster.running import Running, running_service
from cluster.safety import Finding, all_findings, copy_findings, file_findings, prevents_ready
from serve_app.audit.chain import describe
from serve_app.domain.errors import DermError, IntegrityError
from serve_app.records.audit_log import AuditChain, describe_overdue, examine
from serve_app.records.drift import DriftStore
from serve_app.records.health import INVARIANTS, find_violations
from serve_app.records.migrate import pending
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import live_model
from serve_app.reports.drift_watch import describe as describe_drift
from serve_app.reports.drift_watch import unacknowledged
from serve_app.settings import load_settings

READY, TROUBLE, STOPPED, UNSAFE = 0, 1, 3, 4

_UNSOUND, _UNSEALED = "not what was signed", "not sealed"


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `status`."""
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    status, code = _look(arguments.home)
    if arguments.json:
        print(json.dumps(status, indent=1))
    else:
        width = max(len(part) for part in status)
        for part, found in status.items():
            for number, line in enumerate(_lines(found)):
                print(f"{'' if number else part:>{width}}  {line}")
    return code


def _lines(found: str | dict[str, Any]) -> list[str]:
    """Write what was found of one part: in one line, findings in one each."""
    if isinstance(found, str):
        return [found]
    if any(isinstance(value, list) for value in found.values()):
        return [f"{name} {each}" for name, several in found.items() for each in several]
    return [", ".join(f"{name} {value}" for name, value in found.items())]


def _look(home: Path) -> tuple[dict[str, Any], int]:
    running = running_service(home)
    status: dict[str, Any] = {"home": str(home)}
    status["service"] = asdict(running) if running else "not running"
    status["ray"] = _ray(home)
    own = own_database(home)
    status["database"], urls = ("DERM_DATABASE_URL", own) if own else _embedded(home)
    if urls is not None:
        try:
            status |= asyncio.run(_records(home, urls))
        except DermError as error:
            status["records"] = str(error)
    env, found = _safety(home, urls, own=own is not None)
    safety: dict[str, list[str]] = {}
    for finding in found:
        safety.setdefault(finding.name, []).append(finding.advice)
    status["safety"] = safety or "nothing found"
    if running is None:
        return status, STOPPED
    status["readyz"] = _readyz(running)
    if status["readyz"] != "ready" or str(status.get("audit", "")).startswith((_UNSOUND, _UNSEALED)):
        return status, TROUBLE
    return status, UNSAFE if any(prevents_ready(finding, env=env) for finding in found) else READY


def _safety(home: Path, urls: DatabaseUrls | None, *, own: bool) -> tuple[str, list[Finding]]:
    if not home.exists():
        return "development", []
    try:
        settings = load_settings()
    except ValidationError as error:
        found = [*file_findings(home), *copy_findings(home)]
        return "production", [Finding("settings", explain(error)), *found]

    try:
        return settings.env, asyncio.run(all_findings(home, urls, settings, own=own))
    except (DermError, OSError) as error:
        return settings.env, [Finding("not_checked", f"the set-up could not be looked at: {error}")]


def _ray(home: Path) -> dict[str, Any] | str:
    processes = RayNode(home).processes()
    if not processes:
        return "not running"
    memory = 0
    for process in processes:
        try:
            memory += process.memory_full_info().pss
        except psutil.Error:
            continue
    return {"processes": len(processes), "pss_mb": round(memory / 1e6)}


def _embedded(home: Path) -> tuple[dict[str, Any] | str, DatabaseUrls | None]:
    if not (home / "postgres.json").exists():
        return "not set up", None
    server = EmbeddedPostgres(home)
    if not server.is_running():
        return "embedded PostgreSQL, not running", None
    return {"embedded PostgreSQL, pid": server.pid()}, server.ensure()


async def _records(home: Path, urls: DatabaseUrls) -> dict[str, Any]:
    if missing := await pending(urls.owner):
        return {"schema": f"pending: {', '.join(missing)}"}
    pool = await open_pool(urls.app, minimum=0, maximum=1)
    try:
        live = await live_model(pool)
        count = await ReferenceStore(pool).count(live.embedding_space) if live else 0
        violations = await find_violations(pool)
        drifted = unacknowledged(await DriftStore(pool).current())
        audit = await _audit(home, pool)
    finally:
        await pool.close()
    return {
        "schema": "up to date",
        "model": {name: value for name, value in asdict(live).items() if value} if live else "none published",
        "references": str(count),
        "invariants": "; ".join(f"violated: {v.invariant} ({v.count} rows)" for v in violations)
        or f"all {len(INVARIANTS)} hold",
        "audit": audit,
        "drift": "; ".join(describe_drift(drifted)) or "no alarm",
    }


async def _audit(home: Path, pool: Pool) -> str:
    """Hold the audit log against its last checkpoint, and look for events without a seal."""
    try:
        checkpoints = checkpoint_log(home).read()
    except IntegrityError as error:
        return f"{_UNSOUND}: {error}"
    chain = AuditChain(pool)
    found = (await examine(chain, checkpoints, whole=False)).findings
    if found:
        return f"{_UNSOUND}: {describe(found[0])}; `derm-cds audit verify` says more"
    if overdue := await chain.overdue():
        return f"{_UNSEALED}: {describe_overdue(overdue)}; a running service seals them"
    if not checkpoints:
        return "no checkpoint yet"
    return f"as it was signed; last checkpoint {checkpoints[-1].at.isoformat(timespec='seconds')}"


def _readyz(running: Running) -> str:
    try:
        ready = _ask(running.url)
        if "findings" not in ready:  # `--host` is another address than loopback, to which alone all is told
            ready = _ask(f"http://127.0.0.1:{running.fallback_port}")
        return "; ".join([str(ready["status"]), *ready["findings"]])
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        return f"no answer ({error})"


def _ask(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:  # noqa: S310
        ready: dict[str, Any] = json.load(answer)
        return ready
