"""What the replicas read their settings from."""

from __future__ import annotations

from pathlib import Path
import stat

import pytest

from cluster.node_files import (
    is_embedded,
    own_database,
    read_service_environment,
    write_owner_environment,
    write_service_environment,
)
from cluster.postgres import DatabaseUrls, PostgresState
from serve_app.domain.errors import IntegrityError
from serve_app.settings import OWNER_URL, find_owner_url, load_settings, model_folder


def _embedded(home: Path, port: int) -> DatabaseUrls:
    """The URLs of a server that this home set up, wherever it listens now."""
    path = home / "postgres.json"
    state = PostgresState.read(path) or PostgresState.fresh()
    state.port = port
    state.write(path)
    return state.urls(None)


def test_the_secret_is_made_once_and_the_url_follows(tmp_path) -> None:
    assert read_service_environment(tmp_path) == {}
    write_service_environment(tmp_path, _embedded(tmp_path, 1))
    first = read_service_environment(tmp_path)
    urls = _embedded(tmp_path, 2)
    write_service_environment(tmp_path, urls)
    second = read_service_environment(tmp_path)
    assert first["DERM_TOKEN_SECRET"] == second["DERM_TOKEN_SECRET"]
    assert len(first["DERM_TOKEN_SECRET"]) >= 32
    assert first["DERM_DATABASE_URL"] != second["DERM_DATABASE_URL"] == urls.app
    assert "derm_owner" not in str(second)
    assert own_database(tmp_path) is None
    # By its socket, too, as after its passwords were made anew.
    by_socket = PostgresState.fresh().urls(tmp_path / "postgres" / "socket").app
    assert is_embedded(tmp_path, by_socket)
    assert not is_embedded(tmp_path / "other", by_socket)


def test_an_operators_own_database_is_never_overwritten(tmp_path) -> None:
    file = tmp_path / "secrets" / "service.env"
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    own = "# ours, since May\nexport DERM_DATABASE_URL='postgresql://app:pw@db/derm?sslmode=verify-full'\n"
    file.write_text(own)
    write_service_environment(tmp_path, _embedded(tmp_path, 1))
    write_service_environment(tmp_path, None)
    assert file.read_text().startswith(own)
    database = own_database(tmp_path)
    assert database.app == database.owner == "postgresql://app:pw@db/derm?sslmode=verify-full"


def test_both_roles_may_be_in_the_file_and_the_environment_wins(tmp_path, monkeypatch) -> None:
    write_service_environment(tmp_path, None)
    file = tmp_path / "secrets" / "service.env"
    assert [stat.S_IMODE(each.stat().st_mode) for each in (file, file.parent)] == [0o600, 0o700]
    assert "DERM_DATABASE_URL" not in file.read_text()  # the environment's stays out of it
    here = {
        "DERM_DATABASE_URL": "postgresql://app@/derm?host=/a%20b&port=1",
        "DERM_OWNER_DATABASE_URL": "postgresql://owner@/derm",
    }
    file.write_text("".join(f"{name}={value}\n" for name, value in here.items()))
    app, owner = here.values()
    assert own_database(tmp_path) == DatabaseUrls(app=app, owner=owner)
    monkeypatch.setenv("DERM_HOME", str(tmp_path))
    monkeypatch.setenv("DERM_TOKEN_SECRET", "s" * 40)
    settings = load_settings()
    assert settings.database_url.get_secret_value() == app
    assert settings.token_secret.get_secret_value() == "s" * 40
    assert settings.models == model_folder()
    for name, value in here.items():
        monkeypatch.setenv(name, value.replace("derm", "other"))
    assert own_database(tmp_path) == DatabaseUrls(
        app=app.replace("derm", "other"), owner=owner.replace("derm", "other")
    )


def test_a_job_finds_the_owners_url_where_nobody_else_can_read_it(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(OWNER_URL, raising=False)
    assert find_owner_url(tmp_path) is None
    for url in ("postgresql://o:old@/derm", "postgresql://o:a%3Db=c@/derm?host=/a%20b&port=1"):
        write_owner_environment(tmp_path, DatabaseUrls(owner=url, app="y"))
        assert find_owner_url(tmp_path) == url
    path = tmp_path / "secrets" / "owner.env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv(OWNER_URL, "postgresql://given@/derm")
    assert find_owner_url(tmp_path) == "postgresql://given@/derm"
    monkeypatch.delenv(OWNER_URL)
    path.chmod(0o640)
    with pytest.raises(IntegrityError, match="open to other users"):
        find_owner_url(tmp_path)
