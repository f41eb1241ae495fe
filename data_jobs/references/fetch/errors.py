"""What can go wrong in a fetch.

FetchError              the fetch cannot go on
├── ImageFailure        an image was not fetched, and why
│   ├── Transient       not now; another attempt may do
│   └── Refused         another attempt would not change it
└── Stopped             asked to stop
"""

from __future__ import annotations

from serve_app.domain.errors import DermError


class FetchError(DermError):
    """The fetch cannot go on."""

    code = "fetch_failed"


class ImageFailure(FetchError):
    """An image was not fetched. `cause`: a few words by which failures are counted."""

    def __init__(self, message: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause or message


class Transient(ImageFailure):
    """Not now; another attempt may do. `wait_s`: what the server asked for (Retry-After), seconds."""

    def __init__(self, message: str = "", cause: str = "", wait_s: float | None = None) -> None:
        super().__init__(message, cause)
        self.wait_s = wait_s


class Refused(ImageFailure):
    """This image can not be had."""


class Stopped(FetchError):
    """Asked to stop."""
