"""The whole way from another machine: the documented TLS terminator, and the node behind it."""

from __future__ import annotations

import ssl

import httpx
import pytest

from tests.cluster.tls_terminator import terminator

pytestmark = pytest.mark.ray


async def test_an_image_is_sent_and_read_through_tls(
    pms, node, lesion_image, large_original, tmp_path
) -> None:
    patient = await pms.care()
    with terminator(tmp_path, api=node.port) as tls:
        trusting = ssl.create_default_context(cafile=str(tls.authority))
        base = f"https://127.0.0.1:{tls.port}"
        async with httpx.AsyncClient(
            verify=trusting, base_url=base, headers=pms.token(), timeout=60
        ) as client:
            for image in (lesion_image(5), large_original(1500)):
                sent = await client.post(
                    "/api/lesions", data={"patient_id": patient}, files={"image": ("lesion.jpg", image)}
                )
                assert sent.status_code == 201, sent.text
                answer = sent.json()
                path = f"/api/lesions/{answer['lesion_id']}/images/{answer['image_id']}"
                assert (await client.get(path)).content == image
            listed = await client.get("/api/lesions", params={"patient_id": patient})
        assert listed.status_code == 200
        said = tls.said(" GET 200 ", 3)
    assert said.count(" POST 201 ") == 2
    assert patient not in said
    assert "patient_id" not in said
