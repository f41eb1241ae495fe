"""The full graph: ingress over preprocess, classifier, embedder, retriever and risk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from deployments.classifier.deployment import ClassifierDeployment
from deployments.embedder.deployment import EmbedderDeployment
from deployments.preprocess.deployment import PreprocessDeployment
from deployments.retriever.deployment import RetrieverDeployment
from deployments.risk.deployment import RiskDeployment
from graphs.profiles import Profile, actor_options
from serve_app.http.deployment import Ingress


class TriageArgs(BaseModel):
    """The arguments in `serve_config.yaml`. Which model answers is not among them: the database says.

    classifier_threads: cores of one forward pass; replicas on one machine share its cores (deployments/cores.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: Profile = "cpu"
    classifier_threads: int = Field(default=1, ge=1, le=64)
    policy_version: str = "2026-11.4"


def build(args: TriageArgs | Mapping[str, Any]) -> Application:
    """Wire the graph. Serve calls this with the `args` of the config file, whose figures it puts on top.

    As plain tables: Ray would make a model of them if it could read the annotation, but in a
    module with postponed annotations it sees a string.
    """
    args = TriageArgs.model_validate(args)

    def on(deployment: Any) -> Any:  # noqa: ANN401 - untyped in Ray
        return deployment.options(ray_actor_options=actor_options(deployment.name, args.profile))

    device = "cuda" if args.profile == "gpu" else "cpu"
    graph: Application = on(Ingress).bind(
        preprocess=on(PreprocessDeployment).bind(),
        classifier=on(ClassifierDeployment).bind(threads=args.classifier_threads, device=device),
        embedder=on(EmbedderDeployment).bind(),
        retriever=on(RetrieverDeployment).bind(),
        risk=on(RiskDeployment).bind(policy_version=args.policy_version),
    )
    return graph
