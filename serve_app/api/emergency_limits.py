"""How long an emergency access lasts."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.domain.errors import InvalidField


@dataclass(frozen=True, slots=True)
class EmergencyLimits:
    """`minutes` where the caller names none, `max_minutes` at the most."""

    minutes: int
    max_minutes: int

    def choose(self, wanted: int | None) -> int:
        """Take what the caller wants; InvalidField for more than there is."""
        if wanted is None:
            return self.minutes
        if wanted > self.max_minutes:
            raise InvalidField(f"minutes: at most {self.max_minutes}.")
        return wanted
