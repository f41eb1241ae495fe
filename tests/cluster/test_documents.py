"""The documents name what there is: settings, files, modules, scripts, and what shows each clause of the law."""

from __future__ import annotations

from importlib.util import find_spec
import re

import pytest

from serve_app.settings import REPOSITORY, Settings

_DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
_SECURITY = (REPOSITORY / "docs" / "security.md").read_text()

#: 45 CFR 164.312: every standard and every implementation specification.
_CLAUSES = [
    *("(a)(1)", "(a)(2)(i)", "(a)(2)(ii)", "(a)(2)(iii)", "(a)(2)(iv)", "(b)", "(c)(1)", "(c)(2)", "(d)"),
    *("(e)(1)", "(e)(2)(i)", "(e)(2)(ii)"),
]


def test_settings_and_their_documentation_are_the_same() -> None:
    documented = set(re.findall(r"`(DERM_\w+)`", (REPOSITORY / "docs" / "operations.md").read_text()))
    settings = {f"DERM_{name.upper()}" for name in Settings.model_fields}
    assert documented - {"DERM_OWNER_DATABASE_URL", "DERM_BUILD_COMMIT"} == settings


def test_links_lead_somewhere_and_no_document_holds_a_path_of_one_machine() -> None:
    assert len(_DOCUMENTS) > 5
    for document in _DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [link for link in links if not (document.parent / link).exists()] == [], document
        assert not re.search(r"/(home|root|work|Users)/\w", text), document


def test_what_the_security_documents_name_exists() -> None:
    for text in (_SECURITY, (REPOSITORY / "SECURITY.md").read_text()):
        named = set(re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|sql|toml|md))`", text))
        assert sorted(path for path in named if not (REPOSITORY / path).is_file()) == []
    for module in re.findall(r"python -m ([\w.]+)", _SECURITY):
        assert find_spec(module), module
    for script in re.findall(r"^(scripts/[\w-]+)", _SECURITY, re.MULTILINE):
        assert (REPOSITORY / script).stat().st_mode & 0o111, script


@pytest.mark.parametrize("clause", _CLAUSES)
def test_every_clause_has_its_row_with_code_and_test_or_says_that_it_has_none(clause: str) -> None:
    (row,) = [line for line in _SECURITY.splitlines() if line.startswith(f"| {clause} ")]
    kind, how, code, shown_by, operator = (cell.strip() for cell in row.strip("|").split("|")[1:])
    assert kind in {"R", "A"}
    assert operator
    assert "not by this package" in how or (".py`" in code and "`tests/" in shown_by)
