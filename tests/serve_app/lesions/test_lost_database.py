"""The database goes away in the middle of a request, and comes back: nothing is lost, nothing is twice."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from tests.serve_app.erasure.erasing import recover
from tests.serve_app.lesions.conftest import AlteredStages


@pytest.mark.parametrize("stage", ["prepare", "conclude"])
async def test_connections_cut_on_the_way_lose_nothing(
    service, start_service, local_stages, service_urls, as_superuser, stage: str
) -> None:
    async def cut(answer: Any) -> Any:
        """Have the server end every connection of the service's own pool."""
        connection = await asyncpg.connect(as_superuser(service_urls))
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = 'derm_app' AND datname = current_database()"
        )
        await connection.close()
        return await answer

    patient, headers = await service.care(), {"Idempotency-Key": f"cut-{stage}"}
    async with start_service(AlteredStages(local_stages(), stage, cut, calls={1})) as severed:
        response = await severed.upload(patient, headers=headers)
        assert response.status_code in {201, 202, 503}, response.text
        if response.status_code == 503:
            assert int(response.headers["retry-after"]) > 0
    await recover(service)
    assert (await service.upload(patient, headers=headers)).status_code == 201
    page = await service.get("/api/lesions", params={"patient_id": patient})
    assert len(page.json()["lesions"]) == 1
