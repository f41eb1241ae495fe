"""The operator's documents name what there is."""

from __future__ import annotations

import re

from serve_app.settings import REPOSITORY, Settings

_OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()
_DOCUMENTS = sorted(
    [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").glob("*.md")]
)


def test_settings_and_their_documentation_are_the_same() -> None:
    documented = set(re.findall(r"`(DERM_\w+)`", _OPERATIONS))
    settings = {f"DERM_{name.upper()}" for name in Settings.model_fields}
    assert documented - {"DERM_OWNER_DATABASE_URL", "DERM_BUILD_COMMIT"} == settings


def test_links_lead_somewhere_and_no_document_holds_a_path_of_one_machine() -> None:
    assert len(_DOCUMENTS) > 5
    for document in _DOCUMENTS:
        text = document.read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert [link for link in links if not (document.parent / link).exists()] == [], document
        assert not re.search(r"/(home|root|work|Users)/\w", text), document
