"""Which secrets must not sign tokens where there are patients, and that one issuer signs in one way."""

from __future__ import annotations

import secrets

from pydantic import SecretStr, ValidationError
import pytest

from cluster.node_files import explain, read_service_environment, write_service_environment
from cluster.postgres import DatabaseUrls
from serve_app.settings import Settings, find_weakness, make_development_secret

GOOD = secrets.token_urlsafe(48)


def settings(**values: object) -> Settings:
    return Settings(database_url=SecretStr("postgresql://x"), _env_file=None, **values)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DERM_TOKEN_SECRET", "DERM_TOKEN_JWKS", "DERM_ENV", "DERM_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "secret",
    [
        *("short", "x" * 64, "ab" * 32, make_development_secret(), "changeme" + GOOD),
        *("a development secret of 32 bytes", "My-Secret-" + "0123456789abcdefghij0123"),
    ],
)
def test_production_refuses_it_and_development_does_not_mind(secret: str) -> None:
    assert find_weakness(secret)
    assert settings(token_secret=secret).env == "development"
    with pytest.raises(ValidationError) as raised:
        settings(token_secret=secret, env="production")
    said = explain(raised.value)
    assert said.startswith("DERM_TOKEN_SECRET is refused in production: ")
    assert "DERM_TOKEN_JWKS" in said
    assert secret not in said


def test_production_takes_a_good_one_and_one_issuer_signs_in_one_way() -> None:
    assert find_weakness(GOOD) is None
    assert settings(token_secret=GOOD, env="production").env == "production"
    for values in ({}, {"token_secret": GOOD, "token_jwks": "/etc/keys.json"}):
        with pytest.raises(ValidationError) as raised:
            settings(**values)
        assert explain(raised.value).startswith("set DERM_TOKEN_SECRET, or DERM_TOKEN_JWKS, and never both")


def test_keys_come_by_a_way_that_nobody_can_change() -> None:
    for jwks in ("http://127.0.0.1:8080/jwks", "https://pms.example/jwks", "/etc/derm/jwks.json"):
        assert settings(token_jwks=jwks, env="production").token_jwks == jwks
    with pytest.raises(ValidationError, match="https"):
        settings(token_jwks="http://pms.example/jwks", env="production")


def test_a_node_makes_a_secret_that_production_refuses_without_an_issuer(tmp_path, monkeypatch) -> None:
    urls = DatabaseUrls(owner="postgresql://o", app="postgresql://a")
    write_service_environment(tmp_path, urls)
    assert find_weakness(read_service_environment(tmp_path)["DERM_TOKEN_SECRET"])
    monkeypatch.setenv("DERM_TOKEN_JWKS", "/etc/keys.json")
    write_service_environment(tmp_path, urls)
    assert "DERM_TOKEN_SECRET" not in read_service_environment(tmp_path)
    file = tmp_path / "secrets" / "service.env"
    file.write_text(f"DERM_TOKEN_SECRET={GOOD}\nDERM_ENV=production\n")
    write_service_environment(tmp_path, urls)
    kept = {"DERM_TOKEN_SECRET": GOOD, "DERM_ENV": "production", "DERM_DATABASE_URL": "postgresql://a"}
    assert read_service_environment(tmp_path) == kept
