"""JSON as others send it: a key twice is an error, for the last one would silently stand for both."""

from __future__ import annotations

import json
from typing import Any


class KeySentTwice(ValueError):
    """An object, at whatever depth, has a key twice; the message is the key."""


def read_json(text: str | bytes) -> Any:  # noqa: ANN401
    """Read a JSON document. KeySentTwice, or ValueError for what is no JSON or is nested too deep."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise KeySentTwice(key[:64])
        read[key] = value
    return read
