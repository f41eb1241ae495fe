"""What an intruder tries from within: in the database, at the backup store, and as another user of the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
import json
import multiprocessing
import os
from pathlib import Path
import re
import shutil
import stat
import subprocess
import sys
import tempfile

import asyncpg

from benchmarks.intruder_node import (
    APPLICATION,
    BACKUPS,
    LOCAL,
    SUPER,
    Refused,
    Verdict,
    Victim,
    attempt,
    each,
)
from cluster.postgres import SUPERUSER, EmbeddedPostgres
from cluster.ray_node import RayNode
from serve_app.settings import NodeFiles

_NOBODY = 65_534

# --- the role that the service itself has in the database


@attempt(APPLICATION, "changing, removing or disguising what is on record")
def application_statements(victim: Victim) -> tuple[Verdict, str]:
    """What a defect of the service, or who took it over, could ask of the database."""
    columns = "action, actor, outcome, request_id, detail"
    values = "'read', 'x', 'success', 'x', '{}'"
    statements = (
        "UPDATE audit_events SET actor = 'x'",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events CASCADE",
        "UPDATE audit_seals SET position = 1",
        f"INSERT INTO audit_events (event_id, {columns}) OVERRIDING SYSTEM VALUE VALUES (9e18::bigint, {values})",
        f"INSERT INTO audit_events (recorded_at, {columns}) VALUES ('2020-01-01', {values})",
        "INSERT INTO care_assignments VALUES ('demo-patient', 'me', now(), NULL)",
        "DELETE FROM legal_holds",
        "DELETE FROM lesion_images",
        "UPDATE serving SET model_id = 'mine'",
        (
            "INSERT INTO site_operating_points (model_id, model_digest, operating_points, approved_by, reason)"
            " SELECT model_id, model_digest, '{}', 'x', 'x' FROM serving"
        ),
        "CREATE TABLE mine (n int)",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
        "SELECT pg_read_file('postgresql.conf')",
        "COPY (SELECT 1) TO PROGRAM 'id'",
        "SELECT lo_import('/etc/passwd')",
    )
    return each({statement: _refusal(victim, "derm_app", statement) for statement in statements})


def _refusal(victim: Victim, user: str, statement: str) -> tuple[Verdict, str]:
    try:
        victim.sql(user, statement)
    except Refused as refusal:
        return "refused", re.sub(r" (for|of|to) .*", "", str(refusal))
    return "succeeded", "done"


@attempt(APPLICATION, "adding an event that never happened")
def invented_event(victim: Victim) -> tuple[Verdict, str]:
    """Who may record can record what is not true; it is sealed as what was recorded."""
    columns = "(action, actor, outcome, request_id, detail)"
    victim.sql("derm_app", f"INSERT INTO audit_events {columns} VALUES ('read', 'x', 'success', 'x', '{{}}')")
    return "not promised", "the event is in the log: whoever runs as the service can add, and not take away"


# --- the database's superuser


@contextmanager
def changed(victim: Victim, change: str, undo: str) -> Iterator[None]:
    """Make a change with all triggers off, and take it back."""
    victim.sql(SUPERUSER, "SET session_replication_role = replica", change)
    try:
        yield
    finally:
        victim.sql(SUPERUSER, "SET session_replication_role = replica", undo)


def told(victim: Victim) -> tuple[Verdict, str]:
    """Found when `audit verify` finds something."""
    finding = victim.verify()
    if finding is None or finding.startswith("Traceback"):
        return "succeeded", finding or "`audit verify` found nothing"
    return "found", finding[:160]


@attempt(SUPER, "editing an event with every trigger off")
def edited_event(victim: Victim) -> tuple[Verdict, str]:
    """Which function of the database says what matters no more: events are hashed outside it."""
    (row,) = victim.sql(SUPERUSER, "SELECT event_id, actor FROM audit_events ORDER BY event_id LIMIT 1")
    edit = f"UPDATE audit_events SET actor = '{{}}' WHERE event_id = {row['event_id']}"
    with changed(victim, edit.format("somebody-else"), edit.format(row["actor"])):
        return told(victim)


@attempt(SUPER, "changing an answer, an assignment or a model's row, and no event")
def rows_beside_the_log(victim: Victim) -> tuple[Verdict, str]:
    """Each is done, looked for with `audit verify`, and undone."""
    at = f"assessment_id = '{victim.lesion['assessment_id']}'"
    tries = {
        "an answer": (
            f"UPDATE assessments SET answer = jsonb_set(answer, '{{risk}}', 'null') WHERE {at}",
            f"UPDATE assessments SET answer = kept.answer FROM kept WHERE assessments.{at}",
        ),
        "an assignment": (
            "INSERT INTO care_assignments VALUES ('demo-patient', 'dr-friend', now(), NULL)",
            "DELETE FROM care_assignments WHERE clinician = 'dr-friend'",
        ),
    }
    victim.sql(SUPERUSER, f"CREATE TABLE kept AS SELECT answer FROM assessments WHERE {at}")
    try:
        found = {}
        for name, (change, undo) in tries.items():
            with changed(victim, change, undo):
                found[name] = told(victim)
        return each(found)
    finally:
        victim.sql(SUPERUSER, "DROP TABLE kept")


@attempt(SUPER, "reading the keyring through the server")
def keyring_through_the_server(victim: Victim) -> tuple[Verdict, str]:
    """A superuser reads what the server's account may read."""
    path = NodeFiles(victim.home).keyring
    tries = {
        "pg_read_file": f"SELECT pg_read_file('{path}')",
        "COPY FROM PROGRAM": f"COPY aside FROM PROGRAM 'cat {path}'",
    }
    found: dict[str, tuple[Verdict, str]] = {}
    victim.sql(SUPERUSER, "CREATE TABLE aside (line text)")
    try:
        for name, statement in tries.items():
            try:
                victim.sql(SUPERUSER, statement)
                found[name] = ("succeeded", "the keyring was read")
            except Refused as refusal:
                found[name] = (
                    "refused",
                    "Permission denied" if "ermission" in str(refusal) else str(refusal)[:80],
                )
    finally:
        victim.sql(SUPERUSER, "DROP TABLE aside")
    verdict, said = each(found)
    if verdict == "succeeded" and "superuser" in victim.derm_cds("status").stdout:
        return "found", f"{said}; `derm-cds status` says that it can be"
    return verdict, said


@attempt(SUPER, "reading what an image was made of, without the keyring")
def images_without_keys(victim: Victim) -> tuple[Verdict, str]:
    """Answers and context are plain rows; images are sealed."""
    (row,) = victim.sql(SUPERUSER, "SELECT sealed FROM lesion_images WHERE sealed IS NOT NULL LIMIT 1")
    magic = (b"\xff\xd8\xff", b"\x89PNG")
    if any(sign in bytes(row["sealed"])[:4096] for sign in magic):
        return "succeeded", "an image lies in clear"
    return (
        "not promised",
        "answers and context are plain rows (disk encryption is the operator's); images are sealed",
    )


# --- whoever can write to the backup store


@attempt(BACKUPS, "a command for the restore's check, a changed file, and a file more")
def poisoned_backup(victim: Victim) -> tuple[Verdict, str]:
    """Each on a copy of one backup, with every digest made to fit that can be; restored into a home of its own."""
    with tempfile.TemporaryDirectory(prefix="derm-intruder-") as folder:
        place = Path(folder)
        place.chmod(0o711)
        good, proof, key = place / "good", place / "executed", place / "audit.pem"
        key.write_text(victim.derm_cds("audit", "public-key").stdout)
        made = victim.derm_cds("backup", str(good))
        if made.returncode:
            return "succeeded", f"no backup could be made: {made.stderr[-160:]}"

        def poison_configuration(data: Path) -> None:
            with (data / "postgresql.auto.conf").open("a") as file:
                file.write(f"archive_mode = 'on'\narchive_command = 'touch {proof}'\n")

        def change_file(data: Path) -> None:
            path = next(
                p for p in sorted((data / "global").iterdir()) if p.name.isdigit() and p.stat().st_size
            )
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        def add_signal(data: Path) -> None:
            (data / "standby.signal").touch()

        found: dict[str, tuple[Verdict, str]] = {}
        for name, poison in (
            ("archive_command", poison_configuration),
            ("a bit of a file", change_file),
            ("standby.signal", add_signal),
        ):
            copy = place / "copy"
            shutil.copytree(good, copy)
            poison(copy / "data")
            _fit_digests(copy)
            home = place / f"home-{len(found)}"
            home.mkdir(mode=0o711)
            restored = victim.derm_cds("restore", str(copy), "--public-key", str(key), home=home)
            EmbeddedPostgres(home).stop(mode="immediate")
            said = (restored.stderr.strip().splitlines() or ["restored"])[-1][:120]
            through = restored.returncode == 0 or proof.exists()
            found[name] = ("succeeded" if through else "refused", "executed" if proof.exists() else said)
            shutil.rmtree(copy)
        return each(found)


def _fit_digests(backup: Path) -> None:
    """Make PostgreSQL's manifest and ours fit what the files are now, as far as digests without a key go."""
    data, ours = backup / "data", backup / "manifest.json"
    text = (data / "backup_manifest").read_text()
    for file in json.loads(text)["Files"]:
        path = data / file.get("Path", "")
        if "Path" in file and path.is_file():
            now = sha256(path.read_bytes()).hexdigest()
            text = text.replace(file["Checksum"], now)
    body, _, _ = text.partition('"Manifest-Checksum"')
    text = f'{body}"Manifest-Checksum": "{sha256(body.encode()).hexdigest()}"}}\n'
    before = sha256((data / "backup_manifest").read_bytes()).hexdigest()
    (data / "backup_manifest").write_text(text)
    ours.write_text(ours.read_text().replace(before, sha256(text.encode()).hexdigest()))


# --- another user of the machine


@attempt(LOCAL, "reading the node's files, and its processes' environments")
def files_of_others(victim: Victim) -> tuple[Verdict, str]:
    """By their modes: what others may open of the home, of Ray's folders, and of shared memory."""
    exempt = (stat.S_ISLNK, stat.S_ISSOCK)
    open_to_all = []
    for folder in (victim.home, RayNode(victim.home).directory):
        for path in _reachable(folder):
            mode = path.lstat().st_mode
            if mode & 0o004 and not any(kind(mode) for kind in exempt) and not stat.S_ISDIR(mode):
                open_to_all.append(str(path.relative_to(folder)))
    limits = [Path(f"/proc/{process.pid}/limits").read_text() for process in victim.processes()]
    # 1 byte is none, and keeps a core pattern that is a program from being run, which 0 does not.
    dumps = [text for text in limits if not re.search(r"core file size +[01] +[01] ", text)]
    if dumps:
        return "succeeded", f"{len(dumps)} processes may leave a core dump"
    secrets = [name for name in open_to_all if "key" in name or "secret" in name or "token" in name]
    if secrets:
        return "succeeded", ", ".join(secrets[:5])
    return "refused", f"none of {len(open_to_all)} files that others may read holds a secret; no core dumps"


def _reachable(folder: Path) -> Iterator[Path]:
    """What lies below, as far as another user gets."""
    if not folder.exists() or not folder.stat().st_mode & 0o001:
        return
    with suppress(PermissionError):
        for path in folder.iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from _reachable(path)


@attempt(LOCAL, "the database's socket and port, without a password")
def database_without_password(victim: Victim) -> tuple[Verdict, str]:
    """As another account: neither trust nor peer lets it in."""
    state = victim.state()
    found: dict[str, tuple[Verdict, str]] = {}
    for place in filter(None, (victim.server.socket_directory(state), "127.0.0.1")):
        with multiprocessing.get_context("fork").Pool(1) as child:
            said = child.apply(_connect_as_nobody, (str(place), state.port))
        found["socket" if "/" in str(place) else "port"] = (
            "refused" if said else "succeeded",
            said or "connected",
        )
    return each(found)


def _connect_as_nobody(host: str, port: int) -> str:
    """Connect as the superuser from another account; what it met, or nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    try:
        asyncio.run(
            asyncpg.connect(host=host, port=port, user=SUPERUSER, database="derm", passfile="/dev/null")
        )
    except Exception as error:  # noqa: BLE001 - any of them keeps it out
        return type(error).__name__
    return ""


@attempt(LOCAL, "a folder with its own cluster/, in which the operator runs derm-cds")
def hostile_folder(victim: Victim) -> tuple[Verdict, str]:
    """The modules of the folder one stands in must not run."""
    with tempfile.TemporaryDirectory(prefix="derm-intruder-") as folder:
        proof = Path(folder) / "executed"
        for name in ("cluster", "serve_app", "ray"):
            package = Path(folder) / name
            package.mkdir()
            for module in ("__init__", "prepare", "cli"):
                (package / f"{module}.py").write_text(f"open({str(proof)!r}, 'w')\n")
        command = shutil.which("derm-cds", path=str(Path(sys.executable).parent))
        if command is None:
            return "refused", "derm-cds is not installed as a command here"
        for name in ("status", "serve"):
            subprocess.run(
                [command, name, "--home", str(victim.home)],
                check=False, capture_output=True, timeout=120, cwd=folder,
            )  # fmt: skip
        return ("succeeded", "theirs was run") if proof.exists() else ("refused", "ours were run")
