"""The documents name what there is: settings, files, modules, scripts, and what shows each clause of the law."""

from __future__ import annotations

import ast
from importlib.util import find_spec
import json
import re

import pytest

from deployments.risk import doubts, risk
from serve_app.records import answers
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


def _codes(module) -> set[str]:
    """The first argument of every Reason that a module writes down, as it stands or under a name of the module."""
    calls = [
        node
        for node in ast.walk(ast.parse(module.__loader__.get_source(module.__name__)))
        if isinstance(node, ast.Call)
    ]
    first = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Reason"]
    named = {getattr(module, node.id, "") for node in first if isinstance(node, ast.Name)}
    written = {node.value for node in first if isinstance(node, ast.Constant)}
    return written | {code for code in named if isinstance(code, str) and code}


def test_every_reason_of_the_product_is_explained_to_clinicians_and_no_other() -> None:
    faults = {
        code for fault in doubts._FAULTS for code in (fault.code, fault.concern or f"limited_{fault.code}")
    }
    product = set.union(*map(_codes, (doubts, risk, answers)), faults, answers._FAILURES)
    assert len(product) > 35
    _, table = (REPOSITORY / "docs" / "training.md").read_text().split("## Reasons")
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    explained = [code for row in rows for code in re.findall(r"`([a-z_]+)`", row)]
    assert sorted(explained) == sorted(product)


def test_clinicians_are_told_the_figures_of_the_model_that_ships() -> None:
    """Another model needs other words: what is told there was measured for this one."""
    models = REPOSITORY / "model_store" / "models"
    shipped = (models / "default").read_text().strip()
    measured = json.loads((models / shipped / "evaluation.json").read_text())
    text = (REPOSITORY / "docs" / "training.md").read_text()
    lesions, images = (measured["outcomes"]["archive"][by] for by in ("by_lesion", "by_image"))
    melanoma, naevi = lesions["MEL"], lesions["NV"]
    first = measured["confusion"]["MEL"][0]
    caught = measured["outcomes"]["clinical"]["for_unknown"]
    for told in (
        shipped,
        f"{measured['outcomes']['archive']['policy_version']}",
        f"Of {melanoma['cases']} melanomas {melanoma['high']} were `high`, **{melanoma['low']} were `low`**",
        f"Of {naevi['cases']:,} naevi {naevi['high']} were `high`",
        f"first in {first} of {images['MEL']['cases']} melanoma images",
        f"`high` demanded referral in {images['MEL']['high']}",
        f"{100 - round(100 * caught)} of 100 are taken for dermoscopy",
    ):
        assert told in text, told
