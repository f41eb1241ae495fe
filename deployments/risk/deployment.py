"""The risk stage on Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.metrics import Gauge

from deployments.canary import Canaries
from deployments.live_model import warm_at_start
from deployments.risk.risk import RiskStage
from deployments.risk.rules import Findings
from model_store.registry import ModelStore
from serve_app.domain.assessment import Conclusion
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings


@serve.deployment(name="risk")
class RiskDeployment:
    """Rules over what was found; they take microseconds, so they run on the loop."""

    async def __init__(self, *, policy_version: str) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._stage = RiskStage(ModelStore(settings.models), policy_version)
        self._canaries = Canaries(self._stage.prove, Gauge)
        await warm_at_start(settings, self._stage.warm)
        await self._stage.prove()

    async def check_health(self) -> None:
        """Raises StageFailed when the canary has failed, for Serve to replace this replica."""
        self._canaries.check()

    async def warm(self, models: Sequence[LiveModel]) -> dict[str, str]:
        """Have these models ready, and no others for longer than they are used; their digests by id."""
        return await asyncio.to_thread(self._stage.warm, models)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Override policy thresholds without a restart; an unknown key fails the update."""
        self._stage.override(user_config)

    async def conclude(self, model: LiveModel, findings: Findings) -> Conclusion:
        """Conclude one assessment. Raises StageFailed when the canary has failed."""
        self._canaries.require_sound()
        return await self._stage.conclude(model, findings)
