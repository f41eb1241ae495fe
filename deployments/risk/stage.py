"""The risk stage without Ray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deployments.risk.findings import Findings
from deployments.risk.policy_file import read_policy, with_overrides
from deployments.risk.risk import conclude
from model_store.registry import ModelStore
from serve_app.domain.assessment import Conclusion
from serve_app.records.serving import LiveModel


class RiskStage:
    """A policy and the operating points of the models it is asked about; without Ray."""

    def __init__(self, store: ModelStore, policy_version: str) -> None:
        self._store = store
        self._shipped = read_policy(policy_version)
        self._policy = self._shipped

    def warm(self, models: Iterable[LiveModel]) -> dict[str, str]:
        """Read these models' operating points; returns the models' digests by id."""
        return self._store.warm(models)

    def override(self, overrides: dict[str, Any]) -> None:
        """Change thresholds of the shipped policy. Raises PolicyError for an unknown key."""
        self._policy = with_overrides(self._shipped, overrides)

    async def conclude(self, model_id: str, findings: Findings) -> Conclusion:
        """Conclude outcome, risk and urgency at the model's own operating points."""
        points = (await self._store.opened(model_id)).manifest.operating_points
        return conclude(
            quality=findings.quality,
            width=findings.width,
            height=findings.height,
            classification=findings.classification,
            neighbours=findings.neighbours,
            context=findings.context,
            change=findings.change,
            compared_level=findings.compared_level,
            operating_points={name: point.threshold for name, point in points.items()},
            policy=self._policy,
        )
