"""The risk stage on Ray Serve."""

from __future__ import annotations

from typing import Any

from ray import serve

from deployments.risk.findings import Findings
from deployments.risk.stage import RiskStage
from model_store.registry import ModelStore
from serve_app.domain.assessment import Conclusion
from serve_app.logs.process import ProcessLog
from serve_app.settings import load_settings


@serve.deployment(name="risk")
class RiskDeployment:
    """Rules over what was found; they take microseconds, so they run on the loop."""

    def __init__(self, *, policy_version: str) -> None:
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._stage = RiskStage(ModelStore(settings.models), policy_version)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Override policy thresholds without a restart; an unknown key fails the update."""
        self._stage.override(user_config)

    async def conclude(self, model_id: str, findings: Findings) -> Conclusion:
        """Conclude one assessment."""
        return self._stage.conclude(model_id, findings)
