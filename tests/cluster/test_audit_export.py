"""`derm-cds audit export`: the log as FHIR, on record itself."""

from __future__ import annotations

import json
import stat


def test_the_export_has_every_event_of_the_time_and_is_one_itself(derm_cds, home, tmp_path) -> None:
    derm_cds("migrate", home=home)
    span = ("--from", "2020-01-01T00:00:00Z", "--to", "2099-01-01T00:00:00Z")
    first, again = tmp_path / "first.ndjson", tmp_path / "again.ndjson"
    for path in (first, again):
        said = derm_cds("audit", "export", *span, "--out", str(path), home=home)
        assert said.code == 0, said.err
    before, after = (path.read_text().splitlines() for path in (first, again))
    assert len(after) == len(before) + 1
    assert after[: len(before)] == before
    own = json.loads(after[-1])
    assert (own["resourceType"], own["type"]["code"]) == ("AuditEvent", "110106")
    assert own["subtype"][-1]["code"] == "export"
    assert f"{len(after)} events" in said.out
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


def test_a_file_is_never_written_over(derm_cds, home, tmp_path) -> None:
    derm_cds("migrate", home=home)
    path = tmp_path / "there"
    path.write_text("kept")
    span = ("--from", "2026-01-01", "--to", "2026-01-02")
    said = derm_cds("audit", "export", *span, "--out", str(path), home=home)
    assert said.code == 1
    assert path.read_text() == "kept"


def test_an_empty_span_is_refused(derm_cds, home, tmp_path) -> None:
    said = derm_cds(
        "audit",
        "export",
        "--from",
        "2026-01-02",
        "--to",
        "2026-01-01",
        "--out",
        str(tmp_path / "x"),
        home=home,
    )
    assert said.code == 1
    assert "--from must be before --to" in said.err
