"""The classifier stage on Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.metrics import Gauge

from deployments.canary import Canaries, Off
from deployments.classifier.classifier import Classifier, ClassifierOutput
from deployments.cores import SharedCores
from deployments.live_model import warm_at_start
from model_store.registry import ModelStore
from model_store.session import Device
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings

_MOST_PASSES = 4


@serve.deployment(name="classifier")
class ClassifierDeployment:
    """On a CPU an image a forward pass, in a thread, as many as are its share of the cores; on a GPU what has queued up.

    A batch saves nothing on a CPU, and gathering one costs turns of the event loop (docs/performance.md).
    """

    async def __init__(self, *, threads: int, device: Device) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        # One thread a pass is the default: two share a pass of this size so badly that it gains
        # no time and costs a quarter more of the processor.
        self._passes = SharedCores("classifier", threads=threads, most=_MOST_PASSES)
        self._batched = device == "cuda"
        self._classifier = Classifier(ModelStore(settings.models), threads=threads, device=device)
        self._canaries = Canaries(self._prove, Gauge)
        await warm_at_start(settings, self._classifier.warm)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Set the batching of a GPU: `max_batch_size` images, `batch_wait_timeout_s` seconds."""
        batching: Any = self._run_batch
        batching.set_max_batch_size(int(user_config["max_batch_size"]))
        batching.set_batch_wait_timeout_s(float(user_config["batch_wait_timeout_s"]))

    async def check_health(self) -> None:
        """Serve asks every few seconds: the moment to see who else wants this machine's cores.

        Raises StageFailed when the canary has failed, for Serve to replace this replica.
        """
        self._passes.share()
        self._canaries.check()

    async def warm(self, models: Sequence[LiveModel]) -> dict[str, str]:
        """Have these models ready, and no others for longer than they are used; their digests by id."""
        return await asyncio.to_thread(self._classifier.warm, models)

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Classify one prepared image, uint8 H×W×3. Raises StageFailed when the canary has failed."""
        self._canaries.require_sound()
        if model_id not in self._classifier:  # a replay of an old model: no pass waits for it
            await asyncio.to_thread(self._classifier.load, model_id)
        if self._batched:
            output: ClassifierOutput = await self._run_batch((model_id, pixels))
            return output
        return (await self._passes.run(self._run, [(model_id, pixels)]))[0]

    async def _prove(self) -> Off:
        # As a pass of its own: it waits for its turn, and no image waits for it in a batch.
        return await self._passes.run(self._classifier.prove)

    # No wait: a lone image must not be held back. While every pass is taken, arrivals gather
    # and form the next batch.
    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.0, max_concurrent_batches=_MOST_PASSES)
    async def _run_batch(self, requests: list[tuple[str, NDArray[np.uint8]]]) -> list[ClassifierOutput]:
        return await self._passes.run(self._run, requests)

    def _run(self, requests: list[tuple[str, NDArray[np.uint8]]]) -> list[ClassifierOutput]:
        outputs: list[ClassifierOutput | None] = [None] * len(requests)
        # A batch that spans a change of the live model is split: one pass runs one model.
        for model_id in dict.fromkeys(model_id for model_id, _ in requests):
            places = [i for i, (wanted, _) in enumerate(requests) if wanted == model_id]
            answers = self._classifier.classify(model_id, [requests[i][1] for i in places])
            for place, answer in zip(places, answers, strict=True):
                outputs[place] = answer
        return [output for output in outputs if output is not None]
