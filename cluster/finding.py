"""What makes a node unsafe, once found."""

from __future__ import annotations

from dataclasses import dataclass

#: What a node for development may be and still be ready.
_OF_DEVELOPMENT = frozenset({"env", "token_secret", "object_memory"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something unsafe: a stable name, and one line of what it is and what to do."""

    name: str
    advice: str


def prevents_ready(finding: Finding, *, env: str) -> bool:
    """Whether a node with this finding is not ready; a node for development may be one.

    What a restore kept is there to be gone back to: it is in the way once it has expired.
    """
    if finding.name == "kept_copy":
        return False
    return env == "production" or finding.name not in _OF_DEVELOPMENT
