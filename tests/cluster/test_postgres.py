"""The embedded server: safe by default, found again, and never down for long."""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor
import json
import multiprocessing
import os
from pathlib import Path
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from threading import Event, Thread

import asyncpg
import psutil
import pytest

from cluster.accounts import POSTGRES, AccountFailed, account_of
from cluster.postgres import EmbeddedPostgres, PostgresState, supervise
from serve_app.sandbox import landlock_version
from serve_app.settings import REPOSITORY
from tests.cluster.clinic import Clinic, python_for

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def server(clinic: Clinic) -> EmbeddedPostgres:
    return clinic.server


async def _value(url: str, query: str, *values: object, **options: object):
    connection = await asyncpg.connect(url, timeout=10, **options)
    try:
        return await connection.fetchval(query, *values)
    finally:
        await connection.close()


def _state(server: EmbeddedPostgres) -> PostgresState:
    state = PostgresState.read(server.home / "postgres.json")
    assert state is not None
    return state


async def _superuser(server: EmbeddedPostgres, query: str, *values: object):
    password = _state(server).superuser_password
    return await _value(server.ensure().app, query, *values, user="derm_superuser", password=password)


async def test_a_second_start_finds_the_first_with_safe_settings_and_no_powerful_role(server) -> None:
    pid, urls = server.pid(), server.ensure()
    again = EmbeddedPostgres(server.home)
    assert (again.ensure(), again.pid()) == (urls, pid)
    assert await _value(urls.app, "SELECT current_user") == "derm_app"
    assert await _value(urls.owner, "SELECT current_user") == "derm_owner"
    wanted = {
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "data_checksums": "on",
        "listen_addresses": "127.0.0.1",
        "password_encryption": "scram-sha-256",
        "log_statement": "none",
        "log_parameter_max_length": "0",
        "log_parameter_max_length_on_error": "0",
        "server_encoding": "UTF8",
    }
    names = "SELECT json_object_agg(name, current_setting(name)) FROM unnest($1::text[]) name"
    assert json.loads(await _superuser(server, names, list(wanted))) == wanted
    powerful = await _superuser(
        server,
        "SELECT array_agg(rolname::text) FROM pg_roles WHERE rolcanlogin AND"
        " (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls)",
    )
    assert powerful == ["derm_superuser"]
    owners = "SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = 'derm'"
    assert await _superuser(server, owners) == "derm_owner"
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await _value(urls.app, "SELECT 1", database="postgres")


async def test_only_passwords_open_it_and_only_from_here(server) -> None:
    urls, port = server.ensure(), _state(server).port
    methods = "SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules"
    assert await _superuser(server, methods) == ["scram-sha-256"]
    for host in (None, "127.0.0.1"):
        for user in ("derm_app", "derm_owner", "derm_superuser"):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await _value(
                    urls.app, "SELECT 1", user=user, password="guess", **({"host": host} if host else {})
                )
    listening = psutil.Process(server.pid()).net_connections("tcp")
    assert {tuple(each.laddr) for each in listening} == {("127.0.0.1", port)}
    over_tcp = await _value(urls.app, "SELECT 1", host="127.0.0.1", port=port, ssl=False)
    assert over_tcp == 1


def test_files_are_private(server) -> None:
    secret = server.home / "postgres.json"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.stat().st_uid == os.geteuid()
    for name in ("data", "log", "socket"):
        path = server.directory / name
        assert path.stat().st_mode & 0o777 == 0o700
        assert (path.stat().st_uid != 0) or not AS_ROOT
    passwords = [_state(server).owner_password, _state(server).app_password]
    process = psutil.Process(server.pid())
    seen = [" ".join(process.cmdline()), *process.environ().values(), repr(_state(server))]
    seen.append(repr(server.ensure()))
    assert not any(password in text for password in passwords for text in seen)
    assert not any(name.startswith("DERM_") for name in process.environ())


async def test_the_log_quotes_nobody(server) -> None:
    owner = await asyncpg.connect(server.ensure().owner)
    try:
        await owner.execute("CREATE TABLE spoken (name text PRIMARY KEY, n int CHECK (n > 0))")
        await owner.execute("INSERT INTO spoken VALUES ($1, 1)", "Jane Doe")
        for query, values in (
            ("INSERT INTO spoken VALUES ($1, 1)", ("Jane Doe",)),
            ("INSERT INTO spoken VALUES ($1, -1)", ("John Doe",)),
            ("SELECT 'Mary Doe' FROM nowhere", ()),
        ):
            with pytest.raises(asyncpg.PostgresError):
                await owner.execute(query, *values)
        await owner.execute("DROP TABLE spoken")
    finally:
        await owner.close()
    text = server.log.read_text()
    assert "duplicate key value" in text
    assert "Doe" not in text


async def test_the_supervisor_starts_a_killed_server_again(server) -> None:
    urls = server.ensure()
    connection = await asyncpg.connect(urls.owner)
    await connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    stop = Event()
    supervisor = Thread(target=supervise, args=(server, stop))
    supervisor.start()
    try:
        killed = server.pid()
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(60):
            while server.pid() in {None, killed}:  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(0.05)
        await asyncio.to_thread(server.start)  # waits until it takes connections
        assert server.ensure() == urls
        assert await _value(urls.owner, "SELECT n FROM kept") == 42
    finally:
        stop.set()
        supervisor.join()
    assert server.is_running()
    await _value(urls.owner, "DROP TABLE kept")
    connection.terminate()


def test_a_stale_pid_file_does_not_keep_it_down(server) -> None:
    """It may hold the number of another program of the same user, after a reboot; or none."""
    owner, stale = (server.data / "PG_VERSION").stat().st_uid, server.data / "postmaster.pid"
    with subprocess.Popen(["/bin/sleep", "60"], cwd="/", user=owner if AS_ROOT else None) as bystander:
        for content in (f"{bystander.pid}\n", "no number\n"):
            server.stop()
            stale.write_text(content)
            os.chown(stale, owner, -1)
            assert not server.is_running()
            assert asyncio.run(_value(server.ensure().app, "SELECT 1")) == 1
        assert bystander.poll() is None
        bystander.kill()


async def test_a_taken_port_is_given_up(server) -> None:
    before = server.ensure()
    port = _state(server).port
    server.stop()
    assert not server.is_running()
    with pytest.raises(OSError, match=r"."):
        await _value(before.app, "SELECT 1")
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        urls = server.ensure()
        assert urls != before
        assert _state(server).port != port
        assert await _value(urls.app, "SELECT 1") == 1


async def test_two_at_once_make_one_server_even_in_a_hard_place() -> None:
    """A home deep down, its name full of what shells and URLs choke on."""
    # Not tmp_path: another run of pytest closes that to PostgreSQL's account.
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        Path(folder).chmod(0o711)  # noqa: ASYNC240
        server = EmbeddedPostgres(Path(folder) / ("deep/" * 20) / 'it\'s a "home" & 50% ünder')
        try:
            with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
                # Methods, not functions of this module: a spawned process cannot import a test.
                urls, other = executor.map(EmbeddedPostgres.ensure, [server] * 2)
                (pid,) = set(executor.map(EmbeddedPostgres.pid, [server] * 2))
            assert other == urls
            assert server.pid() == pid is not None
            # The socket's path would be too long for the kernel.
            assert "@127.0.0.1:" in urls.app
            assert await _value(urls.app, "SELECT 1") == 1
            extensions = await _value(urls.owner, "SELECT array_agg(extname::text) FROM pg_extension")
            assert "vector" in extensions
        finally:
            server.stop(mode="immediate")


#: A node that an ordinary user runs, in a process of that user: PostgreSQL, and what a superuser of it reads.
_ORDINARY = """
import asyncio, json, os, shutil, sys, tempfile
from pathlib import Path
import asyncpg
from cluster import postgres, safety
from cluster.node_files import DatabaseUrls
home, uid, python = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    sys.executable = python
key = home / "keys" / "keyring.json"
key.parent.mkdir(mode=0o700)
key.write_text("the key of everything")
objects = Path(tempfile.mkdtemp(prefix="derm-test-", dir="/dev/shm"))  # as Ray's, which hold images
(objects / "image").write_text("an image")
server = postgres.EmbeddedPostgres(home)

async def superuser(*statements):
    state = postgres.PostgresState.read(home / "postgres.json")
    link = await asyncpg.connect(host="127.0.0.1", port=state.port, user="derm_superuser",
                                 password=state.superuser_password, database="derm")
    said = []
    for statement in statements:
        try:
            said.append(str(await link.fetchval(statement)))
        except asyncpg.PostgresError as error:
            said.append(type(error).__name__)
    await link.close()
    return said

urls = server.ensure()
try:
    said = asyncio.run(superuser(
        f"SELECT pg_read_file('{key}')",
        f"SELECT pg_read_file('{objects / 'image'}')",
        f"COPY (SELECT 1) TO '{key}'",
        "CREATE TABLE stolen (line text)",
        f"COPY stolen FROM PROGRAM 'cat {key}'",
        f"COPY stolen FROM PROGRAM 'cat /proc/{os.getpid()}/environ'",
        "SELECT count(*) FROM stolen",
        "SELECT pg_read_file('postgresql.auto.conf') <> ''",
    ))
    status = Path(f"/proc/{server.pid()}/status").read_text()
    found = [f"{each.name}: {each.advice}" for each in safety.account_findings(home)]
finally:
    server.stop(mode="immediate")
    shutil.rmtree(objects)
uids = status.split("Uid:")[1].split()[:4]
print(json.dumps({"said": said, "key": key.read_text(), "uids": uids, "found": found}))
"""


def test_a_superuser_of_an_ordinary_users_database_reads_no_key_of_the_node() -> None:
    """One account owns both: the server has given up every file but its own."""
    account = account_of(POSTGRES)  # any that exists, as initdb asks for: not root's, here
    if (python := python_for(account)) is None or not landlock_version():
        pytest.skip("no Python that another account may run, or a kernel without Landlock")
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        Path(folder).chmod(0o711)
        home = Path(folder) / "home"
        home.mkdir(mode=0o700)
        os.chown(home, account.uid, account.gid)
        command = [sys.executable, "-c", _ORDINARY, str(home), str(account.uid), python]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "HOME": folder},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        got = json.loads(done.stdout.splitlines()[-1])
    assert got["said"] == [
        "InsufficientPrivilegeError",
        "InsufficientPrivilegeError",
        "InsufficientPrivilegeError",
        "None",
        "ExternalRoutineError",
        "ExternalRoutineError",
        "0",
        "True",
    ]
    assert got["key"] == "the key of everything"
    assert set(got["uids"]) == {str(account.uid)}
    assert got["found"] == []


@pytest.mark.skipif(not AS_ROOT, reason="only root may open a folder to others")
def test_nothing_above_the_home_is_opened_to_postgresql() -> None:
    """Not root's own folder, and no other: it says where the home may be instead."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as closed:
        with pytest.raises(AccountFailed, match=rf"cannot pass through {closed} .*DERM_HOME"):
            EmbeddedPostgres(Path(closed) / "home").ensure()
        assert stat.S_IMODE(Path(closed).stat().st_mode) == 0o700
