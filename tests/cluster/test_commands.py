"""The command line: what needs no database, care assignments and revocations, tokens, status, the audit log's export, drift,
whom an EHR means, and reports."""

from __future__ import annotations

from datetime import timedelta
import json
import re
import stat

import pytest

from cluster.cli import COMMANDS, main
from cluster.node_files import read_service_environment, write_service_environment
from cluster.prepare import choose_model
from serve_app.access.rules import Principal
from serve_app.access.tokens import TokenVerifier, token_verifier
from serve_app.audit.events import AuditEvent, os_account
from serve_app.domain.errors import ModelContractError, Unauthenticated
from serve_app.domain.identifiers import new_id
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.settings import load_settings
from tests.cluster.conftest import Said

PAIR = ("--patient", "p-access", "--clinician", "dr-access")
SPAN = ("--from", "2020-01-01", "--to", "2099-01-01")


def assigned(clinic) -> bool:
    return clinic.ask(lambda pool: LesionStore(pool).access("dr-access", "p-access")).assigned


def events(clinic, action: str) -> list[tuple[str, dict[str, str]]]:
    query = "SELECT patient_id, detail - 'rows' FROM audit_events WHERE action = $1 ORDER BY event_id"
    return [tuple(row) for row in clinic.ask(lambda pool: pool.fetch(query, action))]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "--home" in capsys.readouterr().out


def test_care_begins_and_ends_and_is_audited(derm_cds, home, clinic) -> None:
    said = derm_cds("access", "assign", *PAIR, home=home)
    assert (said.code, said.out) == (0, "p-access is in the care of dr-access until further notice\n")
    assert assigned(clinic)
    said = derm_cds("access", "list", "--patient", "p-access", home=home)
    assert "p-access: dr-access, from " in said.out
    assert "until further notice" in said.out
    assert derm_cds("access", "end", *PAIR, home=home).code == 0
    assert not assigned(clinic)
    assert "p-access" not in derm_cds("access", "list", home=home).out
    assert "p-access" in derm_cds("access", "list", "--all", home=home).out
    for action in ("assign", "end_assignment"):
        expected = ("p-access", {"subject": "dr-access", "purpose": "HSYSADMIN"})
        assert events(clinic, action)[-1] == expected
    # Care to come is told in UTC and withdrawn; none ends before it begins.
    times = ("--from", "2099-01-01T01:00+02:00", "--until", "2099-02-01T00:00Z")
    span = "from 2098-12-31T23:00:00+00:00 until 2099-02-01T00:00:00+00:00"
    said = derm_cds("assign", *PAIR, *times, home=home)
    assert said.out == f"p-access is in the care of dr-access {span}\n"
    assert not assigned(clinic)
    assert derm_cds("access", "end", *PAIR, home=home).code == 0
    again = derm_cds("access", "end", *PAIR, home=home)
    assert (again.code, "is not in the care of" in again.err) == (1, True)
    past = derm_cds("assign", *PAIR, "--until", "2001-01-01T00:00Z", home=home)
    assert (past.code, past.err.count("\n")) == (1, 1)
    assert past.err.startswith("derm-cds: --until 2001-01-01T00:00:00+00:00 is not after --from now, 20")
    turned = derm_cds(
        "assign", *PAIR, "--from", "2027-01-01T00:00Z", "--until", "2026-01-01T00:00Z", home=home
    )
    both = "--until 2026-01-01T00:00:00+00:00 is not after --from 2027-01-01T00:00:00+00:00"
    assert (turned.code, turned.err) == (1, f"derm-cds: {both}.\n")


@pytest.mark.parametrize("patient", ["Jane Doe", "p\n", "p" * 65, ""])
def test_only_a_patient_id_that_the_interface_takes_is_assigned(derm_cds, tmp_path, capsys, patient) -> None:
    for action in (("assign",), ("access", "assign")):
        with pytest.raises(SystemExit, match="2"):
            derm_cds(*action, f"--patient={patient}", "--clinician", "dr-access", home=tmp_path)
        assert "argument --patient: patient: an opaque id" in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["2099-01-01", "2099-01-01T08:00", "tomorrow"])
def test_a_time_without_a_zone_is_refused(derm_cds, tmp_path, capsys, moment: str) -> None:
    for option in ("--from", "--until"):
        with pytest.raises(SystemExit, match="2"):
            derm_cds("assign", *PAIR, option, moment, home=tmp_path)
        assert "time with a zone" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--from", "--to"])
def test_an_export_of_no_time_is_refused_by_its_name(derm_cds, tmp_path, capsys, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        derm_cds("audit", "export", option, "foo", "--out", "x", home=tmp_path)
    assert f"argument {option}: 'foo' is no RFC 3339 time" in capsys.readouterr().err


def test_a_subject_and_a_token_are_revoked_and_restored(derm_cds, home, clinic) -> None:
    for given, principal in (
        (("dr-out",), Principal("dr-out", frozenset())),
        (("--token", "jti-out"), Principal("dr-other", frozenset(), "jti-out")),
    ):

        def revoked(principal: Principal = principal) -> bool:
            return clinic.ask(lambda pool: AccessStore(pool).is_revoked(principal))

        before = len(events(clinic, "revoke"))
        assert not revoked()
        assert "from now on" in derm_cds("access", "revoke", *given, home=home).out
        assert "already" in derm_cds("access", "revoke", *given, home=home).out
        assert revoked()
        assert len(events(clinic, "revoke")) == before + 1
        assert "revoked" in derm_cds("access", "list", home=home).out
        assert derm_cds("access", "restore", *given, home=home).code == 0
        assert not revoked()
        assert derm_cds("access", "restore", *given, home=home).code == 1
    other = Principal("dr-other", frozenset())
    assert not clinic.ask(lambda pool: AccessStore(pool).is_revoked(other))


def test_an_emergency_access_is_ended_shown_and_audited(derm_cds, home, clinic) -> None:
    emergency_id, reason = new_id(), "unconscious in casualty"
    opening = AuditEvent(
        action="break_glass", actor="dr-glass", outcome="success", request_id=str(emergency_id)
    )

    def in_force() -> bool:
        return clinic.ask(lambda pool: LesionStore(pool).access("dr-glass", "p-glass")).emergency is not None

    clinic.ask(
        lambda pool: AccessStore(pool).break_glass(
            emergency_id, "p-glass", "dr-glass", reason, lasts=timedelta(hours=4), event=opening
        )
    )
    assert in_force()
    shown = derm_cds("access", "list", "--clinician", "dr-glass", home=home).out
    assert shown.startswith(f"emergency {emergency_id}: p-glass: dr-glass, from ")
    ended = derm_cds("access", "end-emergency", str(emergency_id), home=home)
    assert (ended.code, "has no emergency access" in ended.out) == (0, True)
    assert not in_force()
    detail = {"emergency_id": str(emergency_id), "subject": "dr-glass", "purpose": "HSYSADMIN"}
    assert events(clinic, "end_emergency") == [("p-glass", detail)]
    assert str(emergency_id) not in derm_cds("access", "list", home=home).out
    shown = derm_cds("access", "list", "--patient", "p-glass", "--all", home=home).out
    assert f"ended by {os_account()} at " in shown
    again = derm_cds("access", "end-emergency", str(emergency_id), home=home)
    assert (again.code, "over already" in again.err) == (1, True)
    unknown = derm_cds("access", "end-emergency", str(new_id()), home=home)
    assert (unknown.code, "no emergency access" in unknown.err) == (1, True)
    assert len(events(clinic, "end_emergency")) == 1


@pytest.mark.parametrize("subject", ["os:root", " dr-demo", "derm-cds:outbox", ""])
def test_neither_care_nor_a_token_is_given_to_what_is_no_callers_name(
    derm_cds, own_home, sql, capsys, subject: str
) -> None:
    care = ("--patient", "p-access", f"--clinician={subject}")
    for action in (("assign", *care), ("access", "assign", *care), ("access", "revoke", subject)):
        with pytest.raises(SystemExit, match="2"):
            derm_cds(*action, home=own_home)
        assert "no name of the service's own" in capsys.readouterr().err
    refused = derm_cds("token", f"--subject={subject}", home=own_home)
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert sql("SELECT patient_id FROM care_assignments UNION ALL SELECT value FROM revocations") == []


def test_no_token_is_signed_that_the_node_would_refuse(derm_cds, own_home, monkeypatch) -> None:
    for minutes in ("0", "-5", "1441"):
        refused = derm_cds("token", f"--minutes={minutes}", home=own_home)
        assert (refused.code, refused.out, refused.err) == (
            1,
            "",
            "derm-cds: --minutes: 1 to 1440 (DERM_TOKEN_MAX_LIFETIME_S).\n",
        )
    assert derm_cds("token", "--minutes", "1440", home=own_home).code == 0
    monkeypatch.setenv("DERM_TOKEN_MAX_LIFETIME_S", "600")
    assert derm_cds("token", "--minutes", "11", home=own_home).code == 1
    token = derm_cds("token", home=own_home).out.strip()
    load_settings.cache_clear()
    assert token_verifier(load_settings()).verify(token).subject == "dr-demo"


def test_token_is_signed_for_this_node_and_refused_in_production(derm_cds, home, urls, monkeypatch) -> None:
    write_service_environment(home, urls)
    token = derm_cds("token", "--subject", "dr-cli", "--role", "clinician", home=home).out.strip()
    secret = read_service_environment(home)["DERM_TOKEN_SECRET"]
    principal = TokenVerifier(secret, "derm-cds", "derm-cds").verify(token)
    assert (principal.subject, principal.roles) == ("dr-cli", {"clinician"})
    with pytest.raises(Unauthenticated):
        TokenVerifier("x" * 32, "derm-cds", "derm-cds").verify(token)
    monkeypatch.setenv("DERM_ENV", "production")
    refused = derm_cds("token", home=home)
    assert (refused.code, refused.out, "production" in refused.err) == (1, "", True)


def test_before_the_first_start(derm_cds, tmp_path) -> None:
    nothing = tmp_path / "nothing"
    token = derm_cds("token", home=nothing)
    assert (token.code, "derm-cds serve" in token.err, token.err.count("\n")) == (1, True, 1)
    status = derm_cds("status", home=nothing)
    assert (status.code, "not running" in status.out) == (3, True)
    stop = derm_cds("stop", home=nothing)
    assert (stop.code, stop.out) == (0, "derm-cds is not running here.\n")
    assert not nothing.exists()


@pytest.mark.parametrize(
    "command",
    [
        "audit verify",
        "audit checkpoint",
        "audit checkpoint --restored",
        "audit public-key",
        "audit export --sealed --out {home}/log",
        "access list",
        "assign --patient p --clinician dr",
        "hold list",
        "retention close p",
        "models history",
        "models rollback --approved-by dr",
        "outbox status",
        "references spaces",
        "references load",
        "keys status",
        "backup {home}/../backup",
        "backup --keys {home}/../backup",
        "backup --keyring {home}/../backup",
        "backup --prune {home}/..",
        "restore --accept-unsigned --keys {home}/../backup",
    ],
)
def test_a_home_that_was_mistyped_is_named_and_left_as_it_is(derm_cds, tmp_path, command: str) -> None:
    for home in (tmp_path / "typo", tmp_path / "there"):
        name, *rest = command.format(home=home).split()
        refused = derm_cds(name, *rest, home=home)
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert str(home) in refused.err
        assert not [path for path in tmp_path.rglob("*") if path.name != "there"]
        (tmp_path / "there").mkdir(exist_ok=True)


def test_status_shows_every_finding_of_a_name_in_a_line_of_its_own(derm_cds, tmp_path) -> None:
    open_files = [tmp_path / "keys" / "keystore.sqlite", tmp_path / "secrets" / "service.env"]
    for path in open_files:
        path.parent.mkdir(mode=0o700)
        path.touch()
        path.chmod(0o644)
    told = [f"{path} is open to other users: chmod go-rwx it" for path in open_files]
    listed = json.loads(derm_cds("status", "--json", home=tmp_path).out)["safety"]["files"]
    assert set(told) <= set(listed)
    lines = derm_cds("status", home=tmp_path).out.splitlines()
    assert sum(line.endswith(tuple(f"files {each}" for each in told)) for line in lines) == 2


@pytest.mark.parametrize(
    ("wanted", "live", "there", "chosen"),
    [
        (None, None, ["a.one"], "a.one"),
        (None, "a.two", ["a.one", "a.two"], "a.two"),
        ("a.one", "a.two", ["a.one", "a.two"], "a.one"),
        (None, None, [], None),
        (None, None, ["a.one", "a.two"], None),
        (None, None, ["a.one", "a.two", "default"], "a.two"),
        (None, "a.one", ["a.one", "a.two", "default"], "a.one"),
        (None, None, ["a.one", "default"], "a.one"),
        ("a.three", None, ["a.one"], None),
        (None, "a.three", ["a.one"], None),
    ],
)
def test_a_start_takes_the_model_that_somebody_chose_and_guesses_none(
    tmp_path, wanted, live, there, chosen
) -> None:
    if "default" in there:
        (tmp_path / there.pop()).write_text("a.two\n")
    for model in there:
        (tmp_path / model).mkdir()
        (tmp_path / model / "manifest.toml").touch()
    if chosen is None:
        with pytest.raises(ModelContractError):
            choose_model(tmp_path, wanted=wanted, live=live)
    else:
        assert choose_model(tmp_path, wanted=wanted, live=live) == chosen


def test_the_export_has_every_event_of_the_time_and_is_one_itself(derm_cds, own_home, tmp_path) -> None:
    first, again = tmp_path / "first.ndjson", tmp_path / "again.ndjson"
    for path in (first, again):
        said = derm_cds("audit", "export", *SPAN, "--out", str(path), home=own_home)
        assert said.code == 0, said.err
    before, after = (path.read_text().splitlines() for path in (first, again))
    assert len(after) == len(before) + 1
    assert after[: len(before)] == before
    own = json.loads(after[-1])
    assert (own["resourceType"], own["type"]["code"]) == ("AuditEvent", "110106")
    assert own["subtype"][-1]["code"] == "export"
    assert own["purposeOfEvent"][0]["coding"][0]["code"] == "HCOMPL"
    assert f"{len(after)} events" in said.out
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    third = derm_cds("audit", "export", *SPAN, "--out", str(first), home=own_home)
    assert third.code == 1
    assert first.read_text().splitlines() == before  # never written over
    empty = ("--from", "2026-01-02", "--to", "2026-01-01", "--out", str(tmp_path / "x"))
    assert (
        "01-01T00:00:00+00:00 is not after --from" in derm_cds("audit", "export", *empty, home=own_home).err
    )


def test_a_drift_is_shown_with_what_to_do_and_is_acknowledged_on_record(derm_cds, own_home, sql) -> None:
    assert derm_cds("drift", "show", home=own_home).out == "no image has been answered yet\n"
    found = '{"exposure": {"mean": [0.6], "distance": 41.2, "shown": {"exposure": 0.6}}}'
    sql(
        "INSERT INTO drift_streams (stream, subject, since, collected, baseline, baseline_until, newest) VALUES"
        """ ('pictures', '{"preprocess_version": "2"}', 'epoch', 800, $1::text::jsonb, now(), $1::text::jsonb)""",
        found,
    )
    sql(
        "INSERT INTO drift_alarms (drift_id, measure, distance) SELECT drift_id, 'exposure', 41 FROM drift_streams"
    )
    assert (
        "drift: the newest images differ from this site's first in exposure"
        in derm_cds("status", home=own_home).out
    )
    shown = derm_cds("drift", "show", home=own_home).out
    assert re.search(r"exposure +alarm +41\.2 of ", shown)
    assert "Ask who takes the images" in shown
    (stream,) = json.loads(derm_cds("drift", "show", "--json", home=own_home).out)["streams"]
    assert {each["measure"]: each["state"] for each in stream["measures"]}["exposure"] == "alarm"

    refused = derm_cds("drift", "acknowledge", "contrast", "--reason", "other", home=own_home)
    assert (refused.code, refused.err) == (1, "derm-cds: No alarm of contrast stands.\n")
    known = derm_cds(
        "drift", "acknowledge", "exposure", "--reason", "new_light", "--begin-again", home=own_home
    )
    assert known.out == "exposure is acknowledged, and a new baseline begins\n"
    assert "no alarm" in derm_cds("status", home=own_home).out
    assert sql("SELECT begun_by FROM drift_streams ORDER BY drift_id DESC")[0]["begun_by"] == os_account()
    assert (
        sql("SELECT actor FROM audit_events WHERE action = 'drift_acknowledge'")[0]["actor"] == os_account()
    )


def test_whom_an_ehr_means_is_mapped_listed_and_ended_each_an_event(
    derm_cds, own_home, sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hooks(*arguments: str) -> Said:
        return derm_cds("hooks", *arguments, home=own_home)

    user = ("map", "--client", "west", "--user", "Practitioner/17", "--subject", "dr-jones")
    assert "DERM_HOOKS_CLIENTS is not set here" in hooks(*user).err
    clients, file = own_home / "hooks.toml", own_home / "identities.jsonl"
    clients.write_text(
        'base_url = "https://derm.example"\n[clients.west]\nissuer = "https://west.example"\njwks = "keys.json"\n'
    )
    monkeypatch.setenv("DERM_HOOKS_CLIENTS", str(clients))
    for _ in range(2):
        assert hooks(*user).out == "west means dr-jones by Practitioner/17\n"
    assert "unmap it first" in hooks(*user[:-1], "dr-other").err
    assert "A user is a --subject" in hooks(*user[:-2], "--patient-id", "p-1").err
    file.write_text('{"patient": "77", "patient_id": "p-1"}\n{"patient": "7 8", "patient_id": "Erika"}\n')
    failed = hooks("load", "--client", "west", str(file))
    assert ("line 2" in failed.err, "Erika" in failed.err) == (True, False)
    file.write_text(
        '{"patient": "77", "patient_id": "p-1"}\n{"user": "Practitioner/17", "subject": "dr-jones"}\n'
    )
    assert hooks("load", "--client", "west", str(file)).out == "1 mapped, 1 were before\n"
    listed = hooks("list", "--client", "west").out.splitlines()
    assert [line.partition(", by ")[0] for line in listed] == [
        "west: user Practitioner/17 is dr-jones",
        "west: patient 77 is p-1",
    ]
    assert "it was p-1" in hooks("unmap", "--client", "west", "--patient", "77").out
    assert hooks("unmap", "--client", "west", "--patient", "77").code == 1
    events = sql("SELECT * FROM audit_events WHERE action LIKE 'hook%' ORDER BY event_id")
    assert [(row["action"], row["patient_id"], row["detail"].get("subject")) for row in events] == [
        ("hook_map", None, "dr-jones"),
        ("hook_map", "p-1", None),
        ("hook_unmap", "p-1", None),
    ]
    assert {row["actor"] for row in events} == {os_account()}


def test_reports_are_shown_as_published_and_pushed_only_where_a_pms_is_told(
    derm_cds, own_home, sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERM_TOKEN_SECRET", "a secret of the tests, long enough for HS256")
    first = json.loads(derm_cds("reports", "show", "summary", home=own_home).out)
    assert first["tables"]["assessments"]["total"] == 0
    assert json.loads(derm_cds("reports", "show", "summary", home=own_home).out) == first
    sql(
        "INSERT INTO report_cells SELECT t, date_trunc('month', now()) - interval '2 months', k || g, n"
        " FROM (VALUES ('site', 'torso'), ('age_band', '60-69'), ('skin_type', 'II')) AS of (t, g), (VALUES"
        " (ARRAY['m.a', 'refer', 'melanoma'], 98), (ARRAY['m.a', 'not', 'melanoma'], 2),"
        " (ARRAY['m.a', 'not', 'unknown'], 900)) AS counted (k, n)"
    )
    shown = derm_cds("reports", "show", "performance", "--markdown", home=own_home).out
    assert "| torso | 1000 | 100 (10.0%) | at least 96.0% of 100 |" in shown
    assert "Verification bias" in shown
    late = derm_cds("reports", "show", "summary", "--period", "2199-01", home=own_home)
    assert late.code == 1
    refused = derm_cds("reports", "push", home=own_home)
    assert refused.code == 1
    assert "DERM_PMS_REPORTS" in refused.err
    for name, value in {"URL": "http://127.0.0.1:9", "DELIVER": "true", "REPORTS": "true"}.items():
        monkeypatch.setenv(f"DERM_PMS_{name}", value)
    for _ in range(2):
        assert derm_cds("reports", "push", home=own_home).code == 0
    (count,) = sql("SELECT count(*) AS n FROM outbox WHERE kind = 'report'")
    assert count["n"] == 2
    events = sql("SELECT action FROM audit_events WHERE action IN ('view_statistics', 'reports_push')")
    assert [row["action"] for row in events].count("reports_push") == 2
