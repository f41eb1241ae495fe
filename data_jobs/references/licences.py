"""The licences under which the archive publishes, however they are spelt."""

from __future__ import annotations

from enum import StrEnum
import re

from serve_app.domain.errors import InvalidField


class Licence(StrEnum):
    """The archive's `copyright_license`. CC-BY and CC-BY-NC demand the attribution; NC forbids commercial use."""

    CC_0 = "CC-0"
    CC_BY = "CC-BY"
    CC_BY_NC = "CC-BY-NC"


_SPELLINGS = {"CC0": Licence.CC_0, "CCBY": Licence.CC_BY, "CCBYNC": Licence.CC_BY_NC}
# "CC BY-NC 4.0", "cc-by", "CC0 1.0 Universal": what is left is letters and the zero of CC-0.
_VERSION = re.compile(r"\b[1-4]\.0\b.*$")


def licence_of(text: str | None) -> Licence | None:
    """The licence that a spelling means; None for any other. CC-BY-SA or -ND are others, not CC-BY."""
    bare = re.sub(r"[^A-Z0-9]", "", _VERSION.sub("", (text or "").upper()))
    return _SPELLINGS.get(bare)


def parse_licences(text: str) -> frozenset[Licence]:
    """Read a list such as `cc-0,cc-by`. Raises InvalidField for a licence that the archive does not use."""
    licences = set()
    for part in filter(None, map(str.strip, text.split(","))):
        licence = licence_of(part)
        if licence is None:
            raise InvalidField(f"{part!r} is none of {', '.join(Licence)}.")
        licences.add(licence)
    if not licences:
        raise InvalidField(f"Name at least one of {', '.join(Licence)}.")
    return frozenset(licences)
