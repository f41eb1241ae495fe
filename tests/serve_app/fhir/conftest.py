"""The validators, for all that is emitted as FHIR."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.serve_app.fhir.validators import Validators


@pytest.fixture(scope="session")
def validators() -> Iterator[Validators]:
    """All three."""
    with closing(Validators()) as validators:
        yield validators
