"""The full graph: ingress over preprocess, classifier, embedder, retriever and risk."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from deployments.classifier.deployment import ClassifierDeployment
from deployments.embedder.deployment import EmbedderDeployment
from deployments.preprocess.deployment import PreprocessDeployment
from deployments.retriever.deployment import RetrieverDeployment
from deployments.risk.deployment import RiskDeployment
from graphs.profiles import Profile, deployment_options
from serve_app.api.deployment import Ingress


class TriageArgs(BaseModel):
    """The arguments in `serve_config.yaml`. Which model answers is not among them: the database says.

    classifier_threads: cores of one forward pass; replicas × threads should be the cores.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Profile = "cpu"
    classifier_threads: int = Field(default=2, ge=1, le=64)
    policy_version: str = "2026-11.1"


def build(args: TriageArgs) -> Application:
    """Wire the graph. Serve calls this with the `args` of the config file."""

    def options(name: str) -> dict[str, Any]:
        return deployment_options(name, args.profile)

    return Ingress.options(**options("ingress")).bind(
        preprocess=PreprocessDeployment.options(**options("preprocess")).bind(),
        classifier=ClassifierDeployment.options(
            **options("classifier"), user_config={"max_batch_size": 4, "batch_wait_timeout_s": 0.0}
        ).bind(threads=args.classifier_threads, device="cuda" if args.profile == "gpu" else "cpu"),
        embedder=EmbedderDeployment.options(**options("embedder")).bind(),
        retriever=RetrieverDeployment.options(**options("retriever")).bind(),
        risk=RiskDeployment.options(**options("risk"), user_config={}).bind(
            policy_version=args.policy_version
        ),
    )
