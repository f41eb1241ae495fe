"""`derm-cds access` against a real database."""

from __future__ import annotations

import asyncio

from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool
from serve_app.security.tokens import Principal

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
        assert events(urls, action)[-1] == (
            "p-access",
            {"subject": "dr-access", "purpose": "HSYSADMIN"},
        )


def test_care_to_come_is_withdrawn(derm_cds, home, urls) -> None:
    derm_cds("migrate", home=home)
    assert derm_cds("access", "assign", *PAIR, "--from", "2099-01-01", home=home).code == 0
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
