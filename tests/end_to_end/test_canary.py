"""A replica whose model went wrong in memory, on a real node: it answers nobody, another takes its place."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

#: The classifier as an application of its own, beside the one that serves, with a way to spoil it.
_SPOIL = """
import asyncio, logging, sys, time
from types import SimpleNamespace
import numpy as np
import ray
from ray import serve
from deployments.classifier.deployment import ClassifierDeployment
from model_store.canary import read_canary
from model_store.registry import ModelStore
from serve_app.domain.errors import StageFailed
from serve_app.settings import model_folder

ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level=logging.WARNING)

class Spoilt(ClassifierDeployment.func_or_class):
    async def spoil(self, model_id: str, times: int) -> None:
        session, left = self._classifier._loaded.get(model_id).session._session, [times]
        def run(*arguments):
            answers = session.run(*arguments)
            left[0] -= 1
            return [a * np.float32(1.01) for a in answers] if left[0] >= 0 else answers
        self._classifier._loaded.get(model_id).session._session = SimpleNamespace(run=run)
        self._canaries._due = 0.0  # an hour has gone by

    async def state(self) -> tuple[str, int, float]:
        return serve.get_replica_context().replica_id.unique_id, self._canaries._failed, self._canaries._due

options = {"health_check_period_s": 0.5, "graceful_shutdown_timeout_s": 1}
options["ray_actor_options"] = {"num_cpus": 0.1}
spoilt = serve.deployment(Spoilt, name="classifier").options(**options)
serve.run(spoilt.bind(threads=1, device="cpu"), name="canary", route_prefix=None)

async def main(model_id: str) -> None:
    stage = serve.get_app_handle("canary")
    known = read_canary(ModelStore(model_folder()).open(model_id))

    async def until(reached):
        since, now = time.monotonic(), None
        while True:
            try:
                if await reached(*(now := await stage.state.remote())):
                    return now
            except Exception as error:
                now = error
            assert time.monotonic() - since < 60, now
            await asyncio.sleep(0.05)

    async def right(_replica, failed, due):
        return due > 0 and failed == 0

    first, *_ = await until(right)  # asked at its start
    await stage.spoil.remote(model_id, 2)
    assert (await until(right))[0] == first, "two wrong answers replaced it"
    await stage.spoil.remote(model_id, 10**6)
    answers = set()

    async def replaced(replica, *_):
        try:
            found = await stage.classify.remote(model_id, known.pixels)
            answers.add("right" if known.answer_off(found.classification, found.bottleneck) <= 1 else "wrong")
        except StageFailed:
            answers.add("refused")
        return replica != first

    await until(replaced)
    found = await stage.classify.remote(model_id, known.pixels)
    assert known.answer_off(found.classification, found.bottleneck) <= 1
    assert "refused" in answers, answers
    print("replaced", sorted(answers))

try:
    asyncio.run(main(sys.argv[2]))
finally:
    serve.delete("canary")
"""


async def test_a_replica_that_went_wrong_is_replaced_and_two_wrong_answers_are_not_enough(
    node, model_id, capsys
) -> None:
    said = await asyncio.to_thread(node.run, "-c", _SPOIL, node.ray.address, model_id)
    (line,) = [line for line in said.splitlines() if line.startswith("replaced")]
    with capsys.disabled():
        print(f"\na replica that went wrong: {line}")
