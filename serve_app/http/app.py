"""The FastAPI application, without Ray: the ingress and the benchmark's baseline serve the same one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from serve_app.http import (
    emergency_access,
    erasure,
    fhir_report,
    health,
    hooks,
    lesions,
    reports,
    reviews,
    similar,
    worklist,
)
from serve_app.http.documents import name_documents
from serve_app.http.problems import RequestIdMiddleware, install_problem_handlers
from serve_app.http.services import Counts, open_services
from serve_app.lesions.assess import Stages
from serve_app.settings import Settings
from serve_app.version import package_version


class _App(FastAPI):
    """Answers HEAD as GET without the body: the same checks, headers and audit events."""

    def openapi(self) -> dict[str, Any]:
        """Describe the interface."""
        if self.openapi_schema is None:
            self.openapi_schema = name_documents(super().openapi())
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await super().__call__(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: the server looks at its own to know whether a body may follow.
        await super().__call__({**scope, "method": "GET"}, receive, send_without_body)


def create_app(
    settings: Settings,
    stages: Stages,
    *,
    answer_request_id: bool = True,
    observe: Callable[[Counts], None] | None = None,
) -> FastAPI:
    """Make the application; its services open and close with its lifespan.

    `answer_request_id`: put X-Request-ID on responses; not where the server in front does it. `observe` as in
    `open_services`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, stages, observe=observe) as app.state.services:
            yield

    app = _App(
        title="pms-derm-cds",
        version=package_version(),
        summary="Dermatology decision support for clinicians; never a diagnosis.",
        lifespan=lifespan,
        # Nothing but the health routes is anonymous, so the document has a route of its own.
        openapi_url=None,
        # A redirect would have the caller send a patient's image twice.
        redirect_slashes=False,
    )
    install_problem_handlers(app)
    app.add_middleware(RequestIdMiddleware, answer=answer_request_id)
    for routes in (
        health,
        lesions,
        fhir_report,
        reviews,
        erasure,
        similar,
        emergency_access,
        worklist,
        hooks,
        reports,
    ):
        app.include_router(routes.router)
    return app
