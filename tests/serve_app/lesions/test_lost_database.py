"""The database goes away in the middle of a request, and comes back: nothing is lost, nothing is twice."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tests.serve_app.lesions.test_pending import recover


class Severed:
    """The real stages; before `stage`, every connection of the service's own pool is cut by the server."""

    def __init__(self, stages: Any, stage: str, superuser: str) -> None:
        self._stages, self._stage, self._superuser = stages, stage, superuser

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._stages, name)
        if name != self._stage:
            return real

        async def call(*args: Any) -> Any:
            connection = await asyncpg.connect(self._superuser)
            try:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE usename = 'derm_app' AND datname = current_database()"
                )
            finally:
                await connection.close()
            return await real(*args)

        return call


@pytest.mark.parametrize("stage", ["prepare", "conclude"])
async def test_connections_cut_on_the_way_lose_nothing(
    service, start_service, local_stages, service_urls, as_superuser, stage: str
) -> None:
    stages = Severed(local_stages(), stage, as_superuser(service_urls))
    patient, headers = await service.care(), {"Idempotency-Key": f"cut-{stage}"}
    async with start_service(stages) as severed:
        response = await severed.upload(patient, headers=headers)
        assert response.status_code in {201, 202, 503}, response.text
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) > 0
    await recover(service)
    response = await service.upload(patient, headers=headers)
    assert response.status_code == 201
    page = await service.client.get(
        "/api/lesions", params={"patient_id": patient}, headers=service.token("dr")
    )
    assert len(page.json()["lesions"]) == 1
