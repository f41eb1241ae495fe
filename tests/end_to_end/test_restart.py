"""Stop everything, start it again: records, references and keys are still there."""

from __future__ import annotations

import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]


async def test_everything_is_there_after_a_restart(pms, node, lesion_image, capsys) -> None:
    patient, image = await pms.care(), lesion_image(11)
    headers = {"Idempotency-Key": "before-the-restart"}
    before = await pms.upload(patient, image, headers=headers)
    assert before.status_code == 201
    token = pms.token()
    answer = before.json()
    node.stop()
    since = time.monotonic()
    await node.start()
    took = time.monotonic() - since
    timeline = await pms.client.get(before.headers["location"], headers=token)
    assert timeline.status_code == 200, timeline.text
    assert {**timeline.json()["assessments"][0], "open_demand": timeline.json()["open_demand"]} == answer
    assert await pms.original(answer) == image
    again = await pms.upload(patient, image, headers=headers)
    assert (again.status_code, again.json()) == (201, answer)
    fresh = await pms.upload(patient, image)
    assert fresh.status_code == 201
    found, expected = (
        value["classification"] and value["classification"]["probabilities"]
        for value in (fresh.json(), answer)
    )
    assert found == (expected and pytest.approx(expected, abs=1e-6))
    assert len(fresh.json()["similar"]) == len(answer["similar"])
    with capsys.disabled():
        print(f"\nrestart of everything: ready after {took:.1f} s")
