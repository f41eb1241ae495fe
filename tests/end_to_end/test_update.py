"""Updates of the running graph, as `serve deploy` makes them: under load, without a lost request."""

from __future__ import annotations

import asyncio
from collections import Counter
import json
from pathlib import Path

import pytest
import yaml

from serve_app.settings import REPOSITORY
from tests.end_to_end.conftest import DEPLOYMENTS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

#: What `serve deploy` sends to the dashboard, and what that then does with it; our node runs without a dashboard.
_APPLY = """
import json, logging, sys, time
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
_get_global_client().deploy_apps(ServeDeploySchema.model_validate(json.loads(sys.argv[2])))
time.sleep(2)  # until the controller has begun
for _ in range(400):
    application = serve.status().applications["triage"]
    if application.status in ("RUNNING", "DEPLOY_FAILED"):
        break
    time.sleep(0.25)
if application.status != "RUNNING":
    stages = {name: (d.status, d.message) for name, d in application.deployments.items()}
    sys.exit(f"{application.status}: {application.message} {stages}")
"""


@pytest.fixture(scope="module")
def config(node) -> dict:
    """serve_config.yaml, on this node's port."""
    read = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    read["http_options"]["port"] = node.port
    return read


def with_risk(config: dict, overrides: dict) -> dict:
    """The same configuration with another user_config of the risk stage."""
    changed = json.loads(json.dumps(config))
    (risk,) = [d for d in changed["applications"][0]["deployments"] if d["name"] == "risk"]
    risk["user_config"] = overrides
    return changed


async def apply(node, config: dict) -> None:
    await asyncio.to_thread(node.run, "-c", _APPLY, node.ray.address, json.dumps(config))


def pids(node) -> dict[str, set[int]]:
    return {name: {replica.pid for replica in node.replicas(name)} for name in DEPLOYMENTS}


async def test_other_arguments_replace_every_replica_under_load_and_the_policy_changes_without_a_restart(
    pms, node, config, lesion_image, isic_dir: Path, capsys
) -> None:
    """With another argument every replica is replaced, and nobody notices. Then a margin nothing can reach, and back."""
    statuses: Counter[int] = Counter()
    patient, images, done = await pms.care(), [lesion_image(seed) for seed in range(3)], asyncio.Event()

    async def work() -> None:
        while not done.is_set():
            response = await pms.upload(patient, images[statuses.total() % 3])
            statuses[response.status_code] += 1
            await asyncio.sleep(0.5)

    before = pids(node)
    workers = [asyncio.create_task(work()) for _ in range(2)]
    config["applications"][0]["args"]["classifier_threads"] = 2
    try:
        await apply(node, config)
    finally:
        done.set()
        await asyncio.gather(*workers)
    assert set(statuses) <= {201, 202}, statuses
    assert statuses[201]
    after = pids(node)
    assert all(after.values())
    with capsys.disabled():
        replaced = [name for name in DEPLOYMENTS if before[name].isdisjoint(after[name])]
        print(f"\nserve_config.yaml applied under load: {dict(statuses)}, replaced {replaced}")
    await pms.until_none_pending()

    image = next(iter(sorted((isic_dir / "uploads").iterdir()))).read_bytes()
    before = (await pms.upload(patient, image)).json()
    assert before["outcome"] in {"decided", "review"}
    running = pids(node)
    try:
        await apply(node, with_risk(config, {"review": {"min_margin": 0.999}}))
        changed = (await pms.upload(patient, image)).json()
        assert changed["outcome"] == "review"
        assert "low_margin" in {reason["code"] for reason in changed["reasons"]}, changed["reasons"]
        assert changed["provenance"]["policy_version"] != before["provenance"]["policy_version"]
        found, expected = (value["classification"]["probabilities"] for value in (changed, before))
        assert found == pytest.approx(expected, abs=1e-6)
    finally:
        await apply(node, config)
    after = (await pms.upload(patient, image)).json()
    assert after["provenance"]["policy_version"] == before["provenance"]["policy_version"]
    assert after["outcome"] == before["outcome"]
    assert pids(node) == running
