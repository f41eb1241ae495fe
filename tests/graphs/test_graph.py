"""The graph: what serve_config.yaml says of it, how it is wired, and what becomes of a stage's failure."""

from __future__ import annotations

from collections.abc import Iterator
import copy
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application, schema
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
import yaml

from cluster.deploy import CONFIG, choose_config
from cluster.deployed import deployed_file, keep_deployed
from deployments.risk.policy import CURRENT_VERSION, read_policy, with_overrides
from graphs.profiles import NUM_CPUS
from graphs.triage import TriageArgs, build
from serve_app.domain.errors import ModelContractError, Overloaded, StageFailed
from serve_app.http.deployment import Gauges, ServeStages, _answer
from serve_app.records.lesion_rows import AssessmentCounts
from serve_app.records.outbox import OutboxCounts

STAGES = {"preprocess", "classifier", "embedder", "retriever", "risk"}


def unknown_keys(found: Any, read: Any, at: str = "") -> Iterator[str]:
    """The paths of all keys that Ray, which ignores what it does not know, has not read: a misspelt limit is none."""
    if isinstance(found, list):
        for number, (inner, read_inner) in enumerate(zip(found, read, strict=True)):
            yield from unknown_keys(inner, read_inner, f"{at}[{number}]")
    elif isinstance(found, dict):
        known = AutoscalingConfig.model_fields if at.endswith("autoscaling_config") else read
        for key, inner in found.items():
            if key not in known:
                yield f"{at}.{key}"
            elif not at.endswith("user_config"):
                yield from unknown_keys(inner, read[key], f"{at}.{key}")


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(CONFIG.read_text())


def _deployments(profile: str) -> dict:
    """The graph's deployments by name, as built."""
    graph = build({"profile": profile})  # as `serve deploy` hands `args` over
    assert isinstance(graph, Application)
    ingress = graph._bound_deployment
    return {"ingress": ingress} | {
        name: bound._bound_deployment for name, bound in ingress.init_kwargs.items()
    }


def test_every_key_is_known_to_ray_and_a_misspelt_one_is_found(config) -> None:
    def unread() -> list[str]:
        read = schema.ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True)
        return list(unknown_keys(config, read))

    assert unread() == []
    deployment = copy.deepcopy(config["applications"][0]["deployments"][2])
    deployment["autoscaling_config"]["max_replicasx"] = deployment["autoscaling_config"].pop("max_replicas")
    deployment["max_surge_percentx"] = deployment.pop("max_surge_percent")
    config["applications"][0]["deployments"][2] = deployment
    at = ".applications[0].deployments[2]"
    assert sorted(unread()) == [f"{at}.autoscaling_config.max_replicasx", f"{at}.max_surge_percentx"]


def test_the_configuration_is_private_whole_and_the_graphs(config) -> None:
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert config["logging_config"]["enable_access_log"] is False
    (application,) = config["applications"]
    configured = {deployment["name"]: deployment for deployment in application["deployments"]}
    assert list(configured) == list(NUM_CPUS)
    for deployment in configured.values():
        # Resources are the profile's.
        assert not {"ray_actor_options", "num_replicas"} & set(deployment)
        assert deployment["max_queued_requests"] > 0
        assert deployment["max_surge_percent"] == 100
    classifier = configured["classifier"]
    assert classifier["user_config"]["max_batch_size"] <= classifier["max_ongoing_requests"]
    assert TriageArgs.model_validate(application["args"]) == TriageArgs()
    assert set(application["args"]) == set(TriageArgs.model_fields)
    policy = read_policy(application["args"]["policy_version"])
    assert with_overrides(policy, configured["risk"]["user_config"]).version == CURRENT_VERSION


@pytest.mark.parametrize(
    "wrong", [{"profil": "gpu"}, {"profile": "tpu"}, {"classifier_threads": 0}, {"model_id": "a.b"}], ids=str
)
def test_an_argument_that_is_not_known_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        build(wrong)


@pytest.mark.parametrize(("profile", "device", "gpus"), [("cpu", "cpu", 0), ("gpu", "cuda", 0.5)])
def test_the_ingress_holds_a_handle_to_every_stage(profile: str, device: str, gpus: float) -> None:
    built = _deployments(profile)
    assert {name: deployment.name for name, deployment in built.items()} == {name: name for name in NUM_CPUS}
    assert built["classifier"].init_kwargs["device"] == device
    found = {name: deployment.ray_actor_options.get("num_gpus", 0) for name, deployment in built.items()}
    assert found == dict.fromkeys(built, 0) | {"classifier": gpus}
    # The smallest machine, of two cores, has room for two of each.
    assert 2 * sum(deployment.ray_actor_options["num_cpus"] for deployment in built.values()) <= 2


def test_what_was_deployed_last_is_deployed_again_over_the_same_file_and_profile(tmp_path, capsys) -> None:
    at = {"host": "127.0.0.1", "port": 8123}
    shipped, over = choose_config(tmp_path, profile="cpu", **at)
    assert (shipped["http_options"]["port"], shipped["applications"][0]["args"]["profile"]) == (8123, "cpu")
    changed = copy.deepcopy(shipped["applications"])
    changed[0]["deployments"][5]["user_config"] = {"review": {"min_margin": 0.15}}
    keep_deployed(tmp_path, over=over, applications=changed)
    assert deployed_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert choose_config(tmp_path, profile="cpu", **at) == (shipped | {"applications": changed}, over)
    assert "as it was deployed last" in capsys.readouterr().out
    chosen, _ = choose_config(tmp_path, profile="gpu", **at)
    assert chosen["applications"][0]["args"]["profile"] == "gpu"
    assert chosen["applications"][0]["deployments"] == shipped["applications"][0]["deployments"]
    assert "not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"over": "$", "applications": [null]}', '{"over": "$", "applications": 3}']
)
def test_what_cannot_be_deployed_again_is_named_and_replaced_by_nothing(tmp_path, content: str) -> None:
    """A risk policy that an operator deployed must not be another's after a start, without a word."""
    at = {"host": "127.0.0.1", "port": 8123, "profile": "cpu"}
    _, over = choose_config(tmp_path, **at)
    keep_deployed(tmp_path, over=over, applications=[])
    deployed_file(tmp_path).write_text(content.replace("$", over))
    with pytest.raises(SystemExit, match=r"deployed\.json is damaged.*remove it"):
        choose_config(tmp_path, **at)


async def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (BackPressureError(num_queued_requests=9, max_queued_requests=8), Overloaded),
        (RayActorError(), StageFailed),
        (RayTaskError("prepare", "Traceback", ValueError("a defect")), StageFailed),
        (RayServeException("gone"), StageFailed),
        (DeploymentUnavailableError.__new__(DeploymentUnavailableError), StageFailed),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_serve_sheds_is_overload_and_what_ray_raises_a_failed_stage(error, ours) -> None:
    with pytest.raises(ours):
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
            "outbox": asdict(
                OutboxCounts(2, unconfirmed=1, dead=1, wrong_encounter=1, oldest_waiting_s=None)
            ),
            "drift": {"alarms": 2},
        }
    )
    pms = {"derm_outbox_waiting": 2, "derm_outbox_dead": 1, "derm_outbox_oldest_waiting_s": 0}
    pms |= {"derm_outbox_unconfirmed": 1, "derm_outbox_wrong_encounter": 1}
    assert values == pms | {
        "derm_assessments_pending": 3,
        "derm_assessments_failed": 1,
        "derm_assessments_oldest_pending_s": 60.5,
        "derm_drift_alarms": 2,
    }
    gauges.set({"assessments": asdict(AssessmentCounts(0, 0, None)), "outbox": None, "drift": {"alarms": 0}})
    assert set(values.values()) == {0}
