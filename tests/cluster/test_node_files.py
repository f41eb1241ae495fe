"""What the replicas read their settings from."""

from __future__ import annotations

import stat

import pytest

from cluster.node_files import (
    OWNER_URL,
    find_owner_url,
    model_folder,
    read_service_environment,
    write_owner_environment,
    write_service_environment,
)
from cluster.postgres_state import DatabaseUrls
from serve_app.domain.errors import IntegrityError
from serve_app.settings import load_settings


def test_the_secret_is_made_once_and_the_url_follows(tmp_path) -> None:
    assert read_service_environment(tmp_path) == {}
    write_service_environment(tmp_path, DatabaseUrls(owner="postgresql://o@/1", app="postgresql://a@/1"))
    first = read_service_environment(tmp_path)
    write_service_environment(tmp_path, DatabaseUrls(owner="postgresql://o@/2", app="postgresql://a@/2"))
    second = read_service_environment(tmp_path)
    assert first["DERM_TOKEN_SECRET"] == second["DERM_TOKEN_SECRET"]
    assert len(first["DERM_TOKEN_SECRET"]) >= 32
    assert second["DERM_DATABASE_URL"] == "postgresql://a@/2"
    assert "postgresql://o@" not in str(second)


def test_nobody_else_reads_it(tmp_path) -> None:
    write_service_environment(tmp_path, DatabaseUrls(owner="x", app="y"))
    path = tmp_path / "secrets" / "service.env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_settings_come_from_it_and_the_environment_wins(tmp_path, monkeypatch) -> None:
    write_service_environment(tmp_path, DatabaseUrls(owner="x", app="postgresql://a@/?host=/a%20b&port=1"))
    monkeypatch.setenv("DERM_HOME", str(tmp_path))
    monkeypatch.setenv("DERM_TOKEN_SECRET", "s" * 40)
    settings = load_settings()
    assert settings.database_url.get_secret_value() == "postgresql://a@/?host=/a%20b&port=1"
    assert settings.token_secret.get_secret_value() == "s" * 40
    assert settings.models == model_folder()


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
