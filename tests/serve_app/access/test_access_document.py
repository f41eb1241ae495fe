"""docs/access.md shows the table that decides."""

from __future__ import annotations

from serve_app.access.rules import GRANTS, Action, Role
from serve_app.settings import REPOSITORY


def test_the_table_is_the_one_that_decides() -> None:
    rows = [
        [f"`{action}`", *(GRANTS[role][action].value if action in GRANTS[role] else "" for role in Role)]
        for action in Action
    ]
    document = (REPOSITORY / "docs" / "access.md").read_text().splitlines()
    first = next(number for number, line in enumerate(document) if line.startswith("| `"))
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in document[first : first + len(rows)]
    ]
    assert shown == rows
    assert [cell.strip() for cell in document[first - 2].strip("|").split("|")] == ["action", *Role]
