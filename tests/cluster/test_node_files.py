"""What the replicas read their settings from."""

from __future__ import annotations

import stat

from cluster.node_files import model_folder, read_service_environment, write_service_environment
from cluster.postgres_state import DatabaseUrls
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
