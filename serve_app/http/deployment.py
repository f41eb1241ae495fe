"""The ingress on Ray Serve, and the stages behind its handles. The one file here that knows Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.classifier.classifier import ClassifierOutput
from deployments.preprocess.preprocess import PreparedImage
from deployments.risk.rules import Findings
from serve_app.domain.assessment import Conclusion, Neighbours, ReferenceFilter
from serve_app.domain.errors import DermError, Overloaded, RejectedUpload, StageFailed
from serve_app.http.app import create_app
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings

Answer = TypeVar("Answer")

#: Above this size an argument is cheaper by reference than over gRPC, whose messages also
#: have a cap of 4 MiB. Measured crossover: between 1 and 5 MB (docs/performance.md).
BY_REFERENCE_FROM_BYTES = 1_500_000

#: How long every replica of a stage may take to load a model, seconds.
WARM_WITHIN_S = 60.0


class ServeStages:
    """The five stages as deployments of this application.

    Small arguments travel by gRPC, an original above the crossover by reference: the
    transport is chosen here, per handle, and nowhere by default.
    """

    def __init__(
        self,
        *,
        preprocess: DeploymentHandle[Any],
        classifier: DeploymentHandle[Any],
        embedder: DeploymentHandle[Any],
        retriever: DeploymentHandle[Any],
        risk: DeploymentHandle[Any],
    ) -> None:
        self._handles = {
            "preprocess": by_message(preprocess),
            "classifier": by_message(classifier),
            "embedder": by_message(embedder),
            "retriever": by_message(retriever),
            "risk": by_message(risk),
        }
        self._prepare_small = by_message(preprocess).prepare
        self._prepare_large = preprocess.options(_by_reference=True).prepare
        self._classify = by_message(classifier).classify
        self._embed = by_message(embedder).embed
        self._nearest = by_message(retriever).nearest
        self._conclude = by_message(risk).conclude

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
        prepared: PreparedImage | RejectedUpload = await _answer(handle.remote(model_id, data))
        return prepared

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Classify prepared pixels."""
        output: ClassifierOutput = await _answer(self._classify.remote(model_id, pixels))
        return output

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed a bottleneck."""
        embedding: NDArray[np.float32] = await _answer(
            self._embed.remote(model_id, embedding_space, bottleneck)
        )
        return embedding

    async def nearest(
        self,
        embedding: NDArray[np.float32],
        embedding_space: str,
        k: int,
        reference_filter: ReferenceFilter,
    ) -> Neighbours:
        """Search the references."""
        neighbours: Neighbours = await _answer(
            self._nearest.remote(embedding, embedding_space, k, reference_filter)
        )
        return neighbours

    async def conclude(self, model_id: str, findings: Findings) -> Conclusion:
        """Conclude from everything found."""
        conclusion: Conclusion = await _answer(self._conclude.remote(model_id, findings))
        return conclusion


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


@serve.deployment(name="ingress")
@serve.ingress()
class Ingress:
    """Serves the application; each replica has its own pool, key store and recovery loop."""

    def __init__(self, **stages: DeploymentHandle[Any]) -> None:
        self._stages = ServeStages(**stages)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application in the replica, where its handles are.

        Serve itself answers with X-Request-ID.
        """
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        return create_app(settings, self._stages, answer_request_id=False)
