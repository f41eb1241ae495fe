"""docs/security.md says who shows what: every path and command it names is there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
import re

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "docs" / "security.md", REPOSITORY / "SECURITY.md"]
TEXT = {path.name: path.read_text() for path in DOCUMENTS}

#: 45 CFR 164.312: every standard and every implementation specification.
CLAUSES = [
    *("(a)(1)", "(a)(2)(i)", "(a)(2)(ii)", "(a)(2)(iii)", "(a)(2)(iv)", "(b)", "(c)(1)", "(c)(2)", "(d)"),
    *("(e)(1)", "(e)(2)(i)", "(e)(2)(ii)"),
]


def rows(document: str) -> list[list[str]]:
    lines = [line for line in TEXT[document].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("document", TEXT)
def test_every_path_that_is_named_exists(document: str) -> None:
    named = set(re.findall(r"`([\w./-]+/[\w./-]+\.(?:py|sql|toml|md))`", TEXT[document]))
    missing = sorted(path for path in named if not (REPOSITORY / path).is_file())
    assert missing == []


@pytest.mark.parametrize("document", TEXT)
def test_every_link_leads_to_a_file(document: str) -> None:
    folder = next(path for path in DOCUMENTS if path.name == document).parent
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", TEXT[document]):
        assert (folder / link).is_file(), link


def test_every_module_and_script_that_is_run_exists() -> None:
    text = TEXT["security.md"]
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module), module
    for script in re.findall(r"^(scripts/[\w-]+)", text, re.MULTILINE):
        assert (REPOSITORY / script).stat().st_mode & 0o111, script


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_has_its_row_with_code_and_test_or_says_that_it_has_none(clause: str) -> None:
    (row,) = [row for row in rows("security.md") if row[0].startswith(f"{clause} ")]
    _, kind, how, code, shown_by, operator = row
    assert kind in {"R", "A"}
    assert operator
    if "not by this package" not in how:
        assert ".py`" in code
        assert "`tests/" in shown_by


def test_no_figure_was_left_to_be_filled_in() -> None:
    for text in TEXT.values():
        assert not re.search(r"@\w+@|TODO|TBD", text)
