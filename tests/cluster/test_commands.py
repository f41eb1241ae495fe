"""The command line against a real database."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from PIL import Image
import pytest

from cluster.cli import COMMANDS, main
from cluster.node_files import read_service_environment, write_service_environment
from cluster.prepare import choose_model
from serve_app.access.tokens import TokenVerifier
from serve_app.domain.errors import ModelContractError, Unauthenticated
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool


async def _assigned(dsn: str, clinician: str, patient: str) -> bool:
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        return (await LesionStore(pool).access(clinician, patient)).assigned
    finally:
        await pool.close()


def test_migrate_applies_once(derm_cds, home) -> None:
    first = derm_cds("migrate", home=home)
    again = derm_cds("migrate", home=home)
    assert first.code == again.code == 0
    assert first.out.startswith(("applied 0001_", "up to date"))
    assert again.out == "up to date\n"


def test_assign_puts_a_patient_into_care(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    said = derm_cds("assign", "--patient", "p-cli", "--clinician", "dr-cli", home=home)
    assert said.code == 0
    assert "p-cli is in the care of dr-cli until further notice" in said.out
    assert asyncio.run(_assigned(urls.app, "dr-cli", "p-cli"))
    assert not asyncio.run(_assigned(urls.app, "dr-cli", "p-other"))


def test_care_may_end(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    options = ("--patient", "p-end", "--clinician", "dr-cli", "--until", "2099-01-01T00:00:00Z")
    assert derm_cds("assign", *options, home=home).code == 0
    assert asyncio.run(_assigned(urls.app, "dr-cli", "p-end"))


def test_care_cannot_end_before_it_begins(derm_cds, home) -> None:
    derm_cds("migrate", home=home)
    options = ("--patient", "p-past", "--clinician", "dr-cli", "--until", "2001-01-01T00:00Z")
    said = derm_cds("assign", *options, home=home)
    assert said.code == 1
    assert said.err.startswith("derm-cds: ")
    assert said.err.count("\n") == 1


def test_token_is_signed_for_this_node(derm_cds, home, urls) -> None:
    write_service_environment(home, urls)
    token = derm_cds("token", "--subject", "dr-cli", "--role", "clinician", home=home).out.strip()
    secret = read_service_environment(home)["DERM_TOKEN_SECRET"]
    principal = TokenVerifier(secret, "derm-cds", "derm-cds").verify(token)
    assert principal.subject == "dr-cli"
    assert principal.roles == {"clinician"}
    with pytest.raises(Unauthenticated):
        TokenVerifier("x" * 32, "derm-cds", "derm-cds").verify(token)


def test_token_is_refused_in_production(derm_cds, home, urls, monkeypatch) -> None:
    write_service_environment(home, urls)
    monkeypatch.setenv("DERM_ENV", "production")
    said = derm_cds("token", home=home)
    assert said.code == 1
    assert said.out == ""
    assert "production" in said.err


def test_token_before_the_first_start_says_what_is_missing(derm_cds, tmp_path) -> None:
    said = derm_cds("token", home=tmp_path / "nothing")
    assert said.code == 1
    assert "derm-cds serve" in said.err
    assert said.err.count("\n") == 1


def test_status_of_a_home_that_never_ran(derm_cds, tmp_path) -> None:
    said = derm_cds("status", home=tmp_path / "nothing")
    assert said.code == 3
    assert "not running" in said.out
    assert not (tmp_path / "nothing").exists()


def test_status_for_programs(derm_cds, home) -> None:
    derm_cds("migrate", home=home)
    said = derm_cds("status", "--json", home=home)
    status = json.loads(said.out)
    assert said.code == 3
    assert status["service"] == "not running"
    assert status["schema"] == "up to date"
    assert status["references"] == "0"


def test_stop_of_what_does_not_run(derm_cds, tmp_path) -> None:
    said = derm_cds("stop", home=tmp_path)
    assert said.code == 0
    assert "not running" in said.out


def test_sample_is_a_jpeg_of_a_useful_size(derm_cds, tmp_path) -> None:
    first, again = tmp_path / "first.jpg", tmp_path / "again.jpg"
    for path in (first, again):
        assert derm_cds("sample", str(path), home=tmp_path).code == 0
    with Image.open(first) as image:
        assert image.format == "JPEG"
        assert image.width >= 600
        assert image.height >= 450
    assert first.read_bytes() == again.read_bytes()


def test_models_of_an_empty_store(derm_cds, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DERM_MODELS", str(tmp_path))
    assert derm_cds("models", "list", home=tmp_path).out == ""
    said = derm_cds("models", "verify", "no.model", home=tmp_path)
    assert said.code == 1
    assert "no.model" in said.err


def test_references_of_an_empty_store(derm_cds, home, tmp_path, monkeypatch) -> None:
    derm_cds("migrate", home=home)
    monkeypatch.setenv("DERM_MODELS", str(tmp_path))
    said = derm_cds("references", "load", home=home)
    assert said.code == 1
    assert "holds no model" in said.err


@pytest.mark.parametrize(
    ("wanted", "live", "there", "chosen"),
    [
        (None, None, ["a.one"], "a.one"),
        (None, "a.two", ["a.one", "a.two"], "a.two"),
        ("a.one", "a.two", ["a.one", "a.two"], "a.one"),
    ],
)
def test_the_model_that_answers(tmp_path, wanted, live, there, chosen) -> None:
    """A start never takes the place of a model that somebody chose."""
    _store(tmp_path, there)
    assert choose_model(tmp_path, wanted=wanted, live=live) == chosen


@pytest.mark.parametrize(
    ("wanted", "live", "there"),
    [
        (None, None, []),
        (None, None, ["a.one", "a.two"]),
        ("a.three", None, ["a.one"]),
        (None, "a.three", ["a.one"]),
    ],
)
def test_no_model_is_guessed(tmp_path, wanted, live, there) -> None:
    _store(tmp_path, there)
    with pytest.raises(ModelContractError):
        choose_model(tmp_path, wanted=wanted, live=live)


def _store(folder: Path, models: list[str]) -> None:
    for model in models:
        (folder / model).mkdir()
        (folder / model / "manifest.toml").touch()


def test_models_that_are_shipped_verify(derm_cds, tmp_path) -> None:
    there = derm_cds("models", "list", home=tmp_path).out.split()
    assert there
    said = derm_cds("models", "verify", home=tmp_path)
    assert said.code == 0
    assert said.out == "".join(f"{model}: verified\n" for model in there)
    shown = derm_cds("models", "show", there[0], home=tmp_path)
    assert f"model_id  {there[0]}" in shown.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--home" in capsys.readouterr().out
