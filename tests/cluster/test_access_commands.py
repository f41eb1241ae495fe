"""`derm-cds access` against a real database."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.access.tokens import Principal
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool

PAIR = ("--patient", "p-access", "--clinician", "dr-access")


def look(dsn: str, ask):
    async def run():
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def assigned(urls) -> bool:
    return look(urls.app, lambda pool: LesionStore(pool).access("dr-access", "p-access")).assigned


def events(urls, action: str) -> list[tuple[str, dict[str, str]]]:
    rows = look(
        urls.app,
        lambda pool: pool.fetch(
            "SELECT patient_id, detail FROM audit_events WHERE action = $1 ORDER BY event_id", action
        ),
    )
    return [tuple(row) for row in rows]


def test_care_begins_and_ends_and_is_audited(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    assert derm_cds("access", "assign", *PAIR, home=home).code == 0
    assert assigned(urls)
    said = derm_cds("access", "list", "--patient", "p-access", home=home)
    assert "p-access: dr-access, from " in said.out
    assert "until further notice" in said.out
    assert derm_cds("access", "end", *PAIR, home=home).code == 0
    assert not assigned(urls)
    assert "p-access" not in derm_cds("access", "list", home=home).out
    assert "p-access" in derm_cds("access", "list", "--all", home=home).out
    for action in ("assign", "end_assignment"):
        assert events(urls, action)[-1] == ("p-access", {"subject": "dr-access", "purpose": "HSYSADMIN"})


@pytest.mark.parametrize("patient", ["Jane Doe", "p\n", "-p", "p" * 65, ""])
def test_only_a_patient_id_that_the_interface_takes_is_assigned(derm_cds, home, capsys, patient: str) -> None:
    for action in (("assign",), ("access", "assign")):
        with pytest.raises(SystemExit, match="2"):
            derm_cds(*action, f"--patient={patient}", "--clinician", "dr-access", home=home)
        assert "argument --patient: patient: an opaque id" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--from", "--until"])
@pytest.mark.parametrize("moment", ["2099-01-01", "2099-01-01T08:00", "tomorrow"])
def test_a_time_without_a_zone_is_refused(derm_cds, home, capsys, option: str, moment: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        derm_cds("assign", *PAIR, option, moment, home=home)
    assert "time with a zone" in capsys.readouterr().err


def test_times_are_told_in_utc(derm_cds, home) -> None:
    derm_cds("migrate", home=home)
    pair = ("--patient", "p-zone", "--clinician", "dr-zone")
    times = ("--from", "2099-01-01T01:00+02:00", "--until", "2099-02-01T00:00Z")
    said = derm_cds("assign", *pair, *times, home=home)
    assert said.out == (
        "p-zone is in the care of dr-zone from 2098-12-31T23:00:00+00:00 until 2099-02-01T00:00:00+00:00\n"
    )
    listed = derm_cds("access", "list", "--patient", "p-zone", home=home)
    assert "from 2098-12-31T23:00:00+00:00 until 2099-02-01T00:00:00+00:00" in listed.out


def test_care_to_come_is_withdrawn(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    assert derm_cds("access", "assign", *PAIR, "--from", "2099-01-01T00:00Z", home=home).code == 0
    assert not assigned(urls)
    assert derm_cds("access", "end", *PAIR, home=home).code == 0
    again = derm_cds("access", "end", *PAIR, home=home)
    assert again.code == 1
    assert "is not in the care of" in again.err


def test_a_subject_and_a_token_are_revoked_and_restored(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    for given, principal in (
        (("dr-out",), Principal("dr-out", frozenset())),
        (("--token", "jti-out"), Principal("dr-other", frozenset(), "jti-out")),
    ):

        def revoked(principal: Principal = principal) -> bool:
            return look(urls.app, lambda pool: AccessStore(pool).is_revoked(principal))

        before = len(events(urls, "revoke"))
        assert not revoked()
        assert "from now on" in derm_cds("access", "revoke", *given, home=home).out
        assert "already" in derm_cds("access", "revoke", *given, home=home).out
        assert revoked()
        assert len(events(urls, "revoke")) == before + 1
        assert "revoked" in derm_cds("access", "list", home=home).out
        assert derm_cds("access", "restore", *given, home=home).code == 0
        assert not revoked()
        assert derm_cds("access", "restore", *given, home=home).code == 1
    assert not look(urls.app, lambda pool: AccessStore(pool).is_revoked(Principal("dr-other", frozenset())))
