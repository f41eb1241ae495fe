"""serve_config.yaml says what the graph says, in words that Ray knows."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
import sys

from pydantic import ValidationError
import pytest
from ray import serve
from ray.serve.schema import ServeDeploySchema
import yaml

from deployments.risk.policy import CURRENT_VERSION, read_policy, with_overrides
from graphs.profiles import DEPLOYMENT_OPTIONS, deployment_options
from graphs.triage import TriageArgs, build

_FILE = Path(__file__).resolve().parents[2] / "serve_config.yaml"


def _checker():
    path = Path(__file__).with_name("config_keys.py")
    spec = importlib.util.spec_from_file_location("config_keys", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.unknown_keys


unknown_keys = _checker()


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(_FILE.read_text())


@pytest.fixture
def application(config) -> dict:
    (application,) = config["applications"]
    return application


def _deployments(profile: str) -> dict:
    """The graph's deployments by name, as built."""
    found = {}

    def walk(node: serve.Application) -> None:
        bound = node._bound_deployment
        found[bound.name] = bound
        for argument in (*bound.init_args, *bound.init_kwargs.values()):
            if isinstance(argument, serve.Application):
                walk(argument)

    walk(build(TriageArgs(profile=profile)))
    return found


def test_every_key_is_known_to_ray(config) -> None:
    assert list(unknown_keys(config)) == []


def test_ray_accepts_it(config) -> None:
    ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize(
    ("place", "right", "wrong"),
    [
        ((), "proxy_location", "proxy_locaton"),
        (("http_options",), "host", "hots"),
        (("logging_config",), "enable_access_log", "access_log"),
        (("applications", 0), "import_path", "import_paht"),
        (("applications", 0, "deployments", 0), "max_surge_percent", "max_surge_percnt"),
        (("applications", 0, "deployments", 2, "autoscaling_config"), "max_replicas", "max_replica"),
        (("applications", 0, "deployments", 5, "backpressure_config"), "retry_after_s", "retry_after"),
    ],
)
def test_a_misspelt_key_is_found(config, place, right, wrong) -> None:
    spelt = copy.deepcopy(config)
    inner = spelt
    for step in place:
        inner = inner[step]
    inner[wrong] = inner.pop(right)
    found = list(unknown_keys(spelt))  # several where an anchor is shared
    assert found
    assert all(path.endswith(f".{wrong}") or path == wrong for path in found)


def test_ray_itself_would_drop_a_misspelt_key(config) -> None:
    """The reason for all this; once Ray refuses them, the checker can go."""
    deployment = config["applications"][0]["deployments"][0]
    deployment["max_surge_percnt"] = deployment.pop("max_surge_percent")
    read = ServeDeploySchema.model_validate(config).applications[0].deployments[0]
    assert "max_surge_percent" not in read.model_dump(exclude_unset=True)


def test_the_api_listens_on_loopback(config) -> None:
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
    assert config["proxy_location"] == "HeadOnly"


def test_no_log_holds_a_request(config) -> None:
    assert config["logging_config"]["enable_access_log"] is False


def test_names_are_the_graphs(application) -> None:
    names = [deployment["name"] for deployment in application["deployments"]]
    assert sorted(names) == sorted(_deployments("cpu"))
    assert names == list(DEPLOYMENT_OPTIONS)
    assert importlib.util.find_spec(application["import_path"].partition(":")[0])


def test_figures_are_the_profiles(application) -> None:
    for deployment in application["deployments"]:
        stated = {key: value for key, value in deployment.items() if key not in {"name", "user_config"}}
        wanted = deployment_options(deployment["name"], "cpu")
        del wanted["ray_actor_options"]
        assert stated == wanted


def test_resources_are_left_to_the_profile(application) -> None:
    assert not any("ray_actor_options" in deployment for deployment in application["deployments"])
    assert not any("num_replicas" in deployment for deployment in application["deployments"])


def test_user_config_is_the_graphs(application) -> None:
    built = _deployments("cpu")
    for deployment in application["deployments"]:
        assert deployment.get("user_config", {}) == (built[deployment["name"]].user_config or {})


def test_the_policy_takes_the_overrides(application) -> None:
    (risk,) = (deployment for deployment in application["deployments"] if deployment["name"] == "risk")
    version = application["args"]["policy_version"]
    assert with_overrides(read_policy(version), risk["user_config"]).version == CURRENT_VERSION


def test_arguments_are_the_graphs(application) -> None:
    args = TriageArgs.model_validate(application["args"])
    assert args.profile == "cpu"
    assert set(application["args"]) == set(TriageArgs.model_fields)


@pytest.mark.parametrize("wrong", [{"profil": "gpu"}, {"profile": "tpu"}, {"classifier_threads": 0}])
def test_wrong_arguments_are_refused(application, wrong) -> None:
    with pytest.raises(ValidationError):
        TriageArgs.model_validate(application["args"] | wrong)


def test_gpu_profile_gives_the_classifier_a_gpu() -> None:
    built = _deployments("gpu")
    assert built["classifier"].ray_actor_options["num_gpus"] == 0.5
    assert built["classifier"].init_kwargs["device"] == "cuda"
    others = [name for name in built if name != "classifier"]
    assert not any(built[name].ray_actor_options.get("num_gpus") for name in others)


def test_cpu_profile_gives_nobody_a_gpu() -> None:
    built = _deployments("cpu")
    assert built["classifier"].init_kwargs["device"] == "cpu"
    assert not any(deployment.ray_actor_options.get("num_gpus") for deployment in built.values())


def test_the_smallest_machine_has_room_for_one_of_each() -> None:
    assert sum(d.ray_actor_options["num_cpus"] for d in _deployments("cpu").values()) <= 2


def test_a_batch_can_fill(application) -> None:
    (classifier,) = (d for d in application["deployments"] if d["name"] == "classifier")
    assert classifier["user_config"]["max_batch_size"] <= classifier["max_ongoing_requests"]
