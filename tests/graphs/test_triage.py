"""The wiring of the graph, and what becomes of a stage's refusal or failure on its way to the caller."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from graphs.profiles import DEPLOYMENT_OPTIONS, deployment_options
from graphs.triage import TriageArgs, build
from serve_app.domain.errors import ModelContractError, Overloaded, StageFailed
from serve_app.http.deployment import Gauges, ServeStages, _answer
from serve_app.records.lesion_rows import AssessmentCounts
from serve_app.records.outbox import OutboxCounts

STAGES = {"preprocess", "classifier", "embedder", "retriever", "risk"}


@pytest.mark.parametrize(
    "wrong", [{"profil": "gpu"}, {"profile": "tpu"}, {"classifier_threads": 0}, {"model_id": "a.b"}], ids=str
)
def test_an_argument_that_is_not_known_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TriageArgs.model_validate(wrong)


def test_plain_tables_are_arguments_too() -> None:
    """`serve deploy` hands the file's `args` over as a dictionary."""
    assert build({"profile": "gpu"})._bound_deployment.name == "ingress"
    with pytest.raises(ValidationError):
        build({"profil": "gpu"})


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_ingress_holds_a_handle_to_every_stage(profile) -> None:
    graph = build(TriageArgs(profile=profile))
    assert isinstance(graph, Application)
    ingress = graph._bound_deployment
    assert ingress.name == "ingress"
    stages = {name: bound._bound_deployment for name, bound in ingress.init_kwargs.items()}
    assert set(stages) == STAGES
    for name, stage in stages.items():
        assert stage.name == name
        assert stage.max_ongoing_requests == DEPLOYMENT_OPTIONS[name]["max_ongoing_requests"]
        assert stage.max_queued_requests > 0
    device = {"cpu": "cpu", "gpu": "cuda"}[profile]
    assert stages["classifier"].init_kwargs["device"] == device


def test_one_node_of_two_cores_holds_one_replica_of_each() -> None:
    needed = sum(
        deployment_options(name, "cpu")["ray_actor_options"]["num_cpus"] for name in DEPLOYMENT_OPTIONS
    )
    assert needed <= 2
    assert "num_gpus" not in deployment_options("classifier", "cpu")["ray_actor_options"]
    assert 0 < deployment_options("classifier", "gpu")["ray_actor_options"]["num_gpus"] < 1


async def _raise(error: BaseException) -> Any:
    raise error


async def test_what_serve_sheds_is_overload() -> None:
    with pytest.raises(Overloaded):
        await _answer(_raise(BackPressureError(num_queued_requests=9, max_queued_requests=8)))


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        RayTaskError("prepare", "Traceback", ValueError("a defect")),
        RayServeException("gone"),
        DeploymentUnavailableError.__new__(DeploymentUnavailableError),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_ray_raises_is_a_failed_stage(error: BaseException) -> None:
    with pytest.raises(StageFailed):
        await _answer(_raise(error))


class _Broadcast:
    """What a handle gives when every replica is asked: an answer of each, or what it raised."""

    def __init__(self, answers: list[object]) -> None:
        self._answers = answers

    def options(self, **_: object) -> _Broadcast:
        return self

    def __getattr__(self, _: str) -> None:
        return None

    def broadcast(self, method: str, models: object) -> _Broadcast:
        assert (method, models) == ("warm", ("model",))
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert return_exceptions
        if timeout_s <= 0:
            raise TimeoutError
        return self._answers


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ModelContractError("a.b does not exist."), r"classifier .*: a\.b does not exist\."),
        (RayTaskError("warm", "Traceback", ModelContractError("a.b is altered.")), r": a\.b is altered\."),
        (RayActorError(), "RayActorError"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_every_replica_of_every_stage_is_asked_and_one_that_fails_is_named(
    failure: BaseException, said: str
) -> None:
    whole = {name: _Broadcast([{"a.b": "digest"}] * 2) for name in STAGES}
    assert len(await ServeStages(**whole).warm(["model"])) == 2 * len(STAGES)
    broken = {**whole, "classifier": _Broadcast([{"a.b": "digest"}, failure])}
    with pytest.raises(StageFailed, match=said):
        await ServeStages(**broken).warm(["model"])


def test_a_gauge_is_set_for_every_count(monkeypatch) -> None:
    values: dict[str, float] = {}

    class Recorder:
        def __init__(self, name: str, description: str) -> None:
            assert description
            self.set = lambda value: values.update({name: value})

    monkeypatch.setattr("serve_app.http.deployment.Gauge", Recorder)
    gauges = Gauges()
    gauges.set(
        {
            "assessments": asdict(AssessmentCounts(pending=3, failed=1, oldest_pending_s=60.5)),
            "outbox": asdict(OutboxCounts(waiting=2, dead=1, oldest_waiting_s=None)),
        }
    )
    pms = {"derm_outbox_waiting": 2, "derm_outbox_dead": 1, "derm_outbox_oldest_waiting_s": 0}
    assert values == pms | {
        "derm_assessments_pending": 3,
        "derm_assessments_failed": 1,
        "derm_assessments_oldest_pending_s": 60.5,
    }
    gauges.set({"assessments": asdict(AssessmentCounts(0, 0, None)), "outbox": None})
    assert set(values.values()) == {0}
