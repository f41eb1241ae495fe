"""A service whose stages a test alters for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
import io
from typing import Any

from PIL import Image
import pytest


class AlteredStages:
    """The real stages; while a test asks for it, one of them passes through a change, which awaits its answer or not."""

    def __init__(self, stages: Any) -> None:
        self.real, self._changes = stages, {}

    def __getattr__(self, name: str) -> Any:
        call, change = getattr(self.real, name), self._changes.get(name)
        return call if change is None else lambda *arguments: change(call(*arguments))

    @contextmanager
    def altered(self, stage: str, change: Callable[[Awaitable[Any]], Awaitable[Any]]) -> Iterator[None]:
        self._changes = {stage: change}
        yield
        self._changes = {}


def failing(error: Exception) -> Callable[[Any], Awaitable[Any]]:
    async def fail(answer: Any) -> Any:
        answer.close()
        raise error

    return fail


@pytest.fixture(scope="session")
def black() -> bytes:
    """A picture that is refused."""
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG")
    return buffer.getvalue()


async def hang(answer: Any) -> Any:
    answer.close()
    await asyncio.Event().wait()


@pytest.fixture(scope="module")
async def alterable(start_service, local_stages):
    """The service, and its stages."""
    stages = AlteredStages(local_stages())
    async with start_service(stages) as service:
        yield service, stages
