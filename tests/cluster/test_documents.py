"""The operator's documents name what there is."""

from __future__ import annotations

from pathlib import Path
import re

import pytest

from cluster.cli import COMMANDS
from serve_app.settings import REPOSITORY, Settings

_OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()
_DOCUMENTS = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").glob("*.md")]
)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`DERM_{name.upper()}`" in _OPERATIONS


@pytest.mark.parametrize("name", re.findall(r"`(DERM_\w+)`", _OPERATIONS))
def test_every_documented_setting_is_there(name: str) -> None:
    assert name.removeprefix("DERM_").lower() in Settings.model_fields or name in {
        "DERM_OWNER_DATABASE_URL",
        "DERM_BUILD_COMMIT",
    }


def test_every_command_is_in_the_changelog() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert [command for command in COMMANDS if f"`{command}`" not in changes] == []


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_no_document_holds_a_path_of_one_machine(document: Path) -> None:
    assert not re.search(r"/(home|root|work|Users)/\w", document.read_text())
