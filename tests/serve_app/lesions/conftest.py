"""A service whose stages a test alters for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
import io
from typing import Any

from PIL import Image
import pytest

Change = Callable[[Any], Awaitable[Any]]
ALL = range(1_000_000)


class AlteredStages:
    """The real stages, but that one of them passes through a change, which awaits its answer or not."""

    def __init__(self, stages: Any, stage: str = "", change: Change | None = None, **when: Any) -> None:
        self.real = stages
        self.alter(stage, change, **when)

    def alter(self, stage: str = "", change: Change | None = None, *, calls: Collection[int] = ALL) -> None:
        """From now on, this stage is the one, at these of its calls, from 1."""
        self._stage, self._change, self._calls, self.seen = stage, change, calls, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.real, name)

        def call(*arguments: Any) -> Awaitable[Any]:
            self.seen += 1
            answer = real(*arguments)
            return self._change(answer) if self.seen in self._calls else answer

        return call if name == self._stage else real

    @contextmanager
    def altered(self, stage: str, change: Change) -> Iterator[None]:
        self.alter(stage, change)
        yield
        self.alter()


class Held:
    """A change that says when it is reached, and waits until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, answer: Any) -> Any:
        try:
            self.reached.set()
            await self.go_on.wait()
            return await answer
        finally:
            answer.close()


def failing(error: Exception) -> Change:
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
    async with start_service(stages, raise_app_exceptions=False) as service:
        yield service, stages


@pytest.fixture
def stages(alterable) -> AlteredStages:
    """The stages of `faulty`, whole until a test alters one."""
    alterable[1].alter()
    return alterable[1]


@pytest.fixture
def faulty(alterable, stages) -> Any:
    """A service over stages that a test can alter."""
    return alterable[0]
