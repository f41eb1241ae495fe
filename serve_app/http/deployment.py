"""The ingress on Ray Serve, and the stages behind its handles. The one file here that knows Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Gauge

from deployments.preprocess.preprocess import PreparedImage
from serve_app.domain.errors import DermError, Overloaded, RejectedUpload, StageFailed
from serve_app.http.app import create_app
from serve_app.http.services import Counts
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings

Answer = TypeVar("Answer")

#: Above this size an argument is cheaper by reference than over gRPC, whose messages also
#: have a cap of 4 MiB. Measured crossover: between 1 and 5 MB (docs/performance.md).
BY_REFERENCE_FROM_BYTES = 1_500_000

#: How long every replica of a stage may take to load a model, seconds.
WARM_WITHIN_S = 60.0
STAGES = ("preprocess", "classifier", "embedder", "retriever", "risk")


class ServeStages:
    """The five stages as deployments of this application, each handle by its name in STAGES."""

    def __init__(self, **stages: DeploymentHandle[Any]) -> None:
        self._handles = {stage: by_message(stages[stage]) for stage in STAGES}
        self._prepare_small = self._handles["preprocess"].prepare
        self._prepare_large = stages["preprocess"].options(_by_reference=True).prepare
        self.classify = _asked(self._handles["classifier"].classify)
        self.embed = _asked(self._handles["embedder"].embed)
        self.nearest = _asked(self._handles["retriever"].nearest)
        self.conclude = _asked(self._handles["risk"].conclude)

    async def warm(self, models: Sequence[LiveModel]) -> list[Mapping[str, str]]:
        """Have every replica of every stage load these models: a broadcast, where a call reaches one replica."""
        answers = await asyncio.gather(
            *(self._warm(stage, models) for stage in self._handles), return_exceptions=True
        )
        held: list[Mapping[str, str]] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            held += answer
        return held

    async def _warm(self, stage: str, models: Sequence[LiveModel]) -> list[Mapping[str, str]]:
        response = self._handles[stage].broadcast("warm", tuple(models))
        try:
            answers = await response.results_async(timeout_s=WARM_WITHIN_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            answers = [error]
        for answer in answers:
            if isinstance(answer, BaseException):
                cause = getattr(answer, "cause", answer)  # by message it comes as it was raised, else wrapped
                said = str(cause) if isinstance(cause, DermError) else type(answer).__name__
                raise StageFailed(f"Not every replica of {stage} has the models ready: {said}") from answer
        return answers

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Prepare one upload."""
        large = len(data) >= BY_REFERENCE_FROM_BYTES
        handle = self._prepare_large if large else self._prepare_small
        return await _answer(handle.remote(model_id, data))


def by_message(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    """Send what is asked and answered in the message itself: small values need no object store."""
    return handle.options(
        _by_reference=False, request_serialization="pickle", response_serialization="pickle"
    )


async def _answer(response: Awaitable[Answer]) -> Answer:
    """Await a stage; its refusals and failures become ours."""
    try:
        return await response
    except BackPressureError as error:
        raise Overloaded from error
    except (RayError, RayServeException) as error:
        raise StageFailed(f"A stage failed: {type(error).__name__}.") from error


def _asked(method: DeploymentHandle[Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """A method of a stage as Stages has it."""

    async def ask(*arguments: object) -> object:
        return await _answer(method.remote(*arguments))

    return ask


#: The counts of /readyz that are metrics, and what each says.
GAUGES = {
    ("assessments", "pending"): "Assessments without an answer yet",
    ("assessments", "failed"): "Assessments that were given up",
    ("assessments", "oldest_pending_s"): "Age of the oldest pending assessment, seconds; 0: none",
    ("outbox", "waiting"): "Messages that the PMS is still to be told",
    ("outbox", "unconfirmed"): "Messages held until the PMS confirms that their encounter is the patient's",
    ("outbox", "dead"): "Messages that were given up",
    ("outbox", "wrong_encounter"): "Messages given up because their encounter is another patient's",
    ("outbox", "oldest_waiting_s"): "Age of the oldest waiting message, seconds; 0: none",
    ("drift", "alarms"): "Measures of the newest images that differ from the site's first, not acknowledged",
}


class Gauges:
    """The counts of /readyz as metrics, for an alarm: each gauge is set by every replica, to the same value."""

    def __init__(self) -> None:
        self._gauges = {names: Gauge("derm_" + "_".join(names), said) for names, said in GAUGES.items()}

    def set(self, counts: Counts) -> None:
        """Set every gauge; to 0 where nothing waits, or nothing is delivered."""
        for (kind, name), gauge in self._gauges.items():
            gauge.set((counts[kind] or {}).get(name) or 0.0)


@serve.deployment(name="ingress")
@serve.ingress()
class Ingress:
    """Serves the application; each replica has its own pool, key store and background loops."""

    def __init__(self, **stages: DeploymentHandle[Any]) -> None:
        self._stages = ServeStages(**stages)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application in the replica, where its handles are.

        Serve itself answers with X-Request-ID.
        """
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        return create_app(settings, self._stages, answer_request_id=False, observe=Gauges().set)
