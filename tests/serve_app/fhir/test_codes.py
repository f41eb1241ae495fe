"""Every code that a report may hold: its check digit, what others say of it, and that no other is emitted."""

from __future__ import annotations

from dataclasses import replace
import json
from pathlib import Path
from typing import Any

from pydicom.sr._concepts_dict import concepts

from serve_app.domain.diagnosis import TRAINED, Diagnosis
from serve_app.domain.patient import AnatomSite
from serve_app.fhir.codes import CODES, DIAGNOSES, LOINC, SITES, SNOMED
from serve_app.fhir.report import lesion_report
from serve_app.settings import REPOSITORY
from tests.serve_app.fhir.histories import History, within
from tests.serve_app.fhir.validators import DEFINITIONS


def verhoeff(number: str) -> bool:
    """Whether an identifier of SNOMED CT ends in its check digit: J. Verhoeff's dihedral scheme, 1969."""

    def times(i: int, j: int) -> int:
        turned = (i + j) % 5 if i < 5 else (i - j) % 5
        return turned + 5 * ((i < 5) is not (j < 5))

    check = 0
    for place, digit in enumerate(map(int, reversed(number))):
        for _ in range(place % 8):
            digit = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[digit]  # noqa: PLW2901
        check = times(check, digit)
    return check == 0


def luhn(number: str) -> int:
    """The check digit of a LOINC."""
    digits = [int(digit) for digit in reversed(number)]
    return -(sum(digits[1::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[::2])) % 10


def test_every_code_ends_in_its_check_digit() -> None:
    """Codes that published projects have wrong show that it is looked at."""
    assert not any(map(verhoeff, ("65126008", "254788002", "400083001", "109264001")))
    for code in CODES:
        if code.system == SNOMED:
            assert verhoeff(code.code), code
        else:
            number, check = code.code.split("-")
            assert luhn(number) == int(check), code
        assert code.source


def test_every_code_that_pydicom_has_is_as_it_has_it() -> None:
    known = {code: meaning for words in concepts["SCT"].values() for code, (meaning, _) in words.items()}
    held = 0
    for code in CODES:
        if code.system == SNOMED and code.code in known:
            assert known[code.code].partition(" (")[0] == code.display
            held += 1
        else:
            assert not code.source.startswith("pydicom"), code
    assert held >= 8


def test_only_verified_codes_are_emitted_and_hl7s_own_exist() -> None:
    verified = {(code.system, code.code) for code in CODES}
    hl7s: set[tuple[str, str]] = set()
    for part in ("valuesets", "v3-codesystems", "v2-tables"):
        whole = json.loads((DEFINITIONS / f"{part}.json").read_text(encoding="utf-8"))
        systems = [each["resource"] for each in whole["entry"] if "concept" in each["resource"]]
        hl7s |= {
            (system["url"], each["code"])
            for system in systems
            for each in within(system["concept"])
            if "code" in each
        }
    emitted: set[tuple[str, str]] = set()
    for seed in range(100):
        timeline = History(seed).anything()
        for part in within(lesion_report(replace(timeline, outcomes=()))):
            emitted |= {(each["system"], each["code"]) for each in part.get("coding", ())}
    ours = {each for each in emitted if each[0].startswith("urn:derm-cds:")}
    assert {each for each in emitted if each[0] in {SNOMED, LOINC}} <= verified
    assert emitted - ours - verified <= hl7s
    assert len(emitted - ours - verified) >= 10


def test_a_union_of_sites_and_a_wider_class_have_words_and_no_code() -> None:
    assert {AnatomSite.HEAD_NECK, AnatomSite.PALMS_SOLES, AnatomSite.ORAL_GENITAL}.isdisjoint(SITES)
    assert set(DIAGNOSES) == set(TRAINED) - {Diagnosis.BKL, Diagnosis.DF, Diagnosis.VASC}
    history = History()
    image = history.image(0, history.assessment(), anatom_site_general=AnatomSite.HEAD_NECK)
    (lesion,) = _lesions(lesion_report(history.timeline(image)))
    assert lesion["location"] == {"text": "head/neck"}
    image = replace(image, anatom_site_general=None)
    (lesion,) = _lesions(lesion_report(history.timeline(image)))
    assert "location" not in lesion


def _lesions(bundle: dict[str, Any]) -> list[dict[str, Any]]:
    resources = [entry["resource"] for entry in bundle["entry"]]
    return [each for each in resources if each["resourceType"] == "BodyStructure"]


def is_part_of(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            is_part_of(each, whole.get(name)) for name, each in part.items()
        )
    return bool(part == whole)


def test_the_document_shows_what_is_sent_and_every_code_with_its_source() -> None:
    text = (REPOSITORY / "docs" / "fhir.md").read_text(encoding="utf-8")
    example = json.loads(text.partition("```json\n")[2].partition("```")[0])
    whole = json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))
    sent = [entry["resource"] for entry in whole["entry"]]
    for shown in example:
        assert any(is_part_of(shown, each) for each in sent), shown
    rows = [line for line in text.splitlines() if line.startswith(("| SNOMED CT ", "| LOINC "))]
    assert len(rows) == len(set(CODES))
    for code in CODES:
        assert any(
            f" {code.code} | {code.display or '(none sent)'} |" in row and row.endswith(f"{code.source} |")
            for row in rows
        ), code
