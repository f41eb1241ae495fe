"""A neighbour can be looked at: its picture with licence and attribution, or where else to find it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import pytest

JPEG = b"\xff\xd8\xff a picture"


@pytest.fixture
async def picture(service):
    """Give a reference a picture, for this test."""

    async def put(isic_id: str) -> None:
        await service.owner.execute(
            "INSERT INTO reference_pictures (isic_id, width, height, sha256, jpeg) VALUES ($1, 4, 3, $2, $3)",
            isic_id,
            sha256(JPEG).hexdigest(),
            JPEG,
        )

    yield put
    await service.owner.execute("DELETE FROM reference_pictures")


@pytest.fixture
async def shown(service, picture):
    """A reference with a picture, and one without."""
    query = "SELECT isic_id FROM reference_images ORDER BY isic_id LIMIT 2"
    with_picture, without = [isic_id for (isic_id,) in await service.owner.fetch(query)]
    await picture(with_picture)
    return with_picture, without


async def test_a_picture_comes_with_its_licence_and_whom_to_name(service, shown) -> None:
    response = await service.client.get(f"/api/references/{shown[0]}/image", headers=service.token("dr"))
    assert response.status_code == 200
    assert response.content == JPEG
    assert response.headers["Content-Type"] == "image/jpeg"
    assert 'rel="license"' in response.headers["Link"]
    attribution = await service.owner.fetchval(
        "SELECT attribution FROM reference_images WHERE isic_id = $1", shown[0]
    )
    assert unquote(response.headers["X-Attribution"]) == attribution
    again = await service.client.get(
        f"/api/references/{shown[0]}/image",
        headers=service.token("dr") | {"If-None-Match": response.headers["ETag"]},
    )
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("isic_id", [None, "ISIC_9999999", "x" * 40, "..%2f..%2fetc"])
async def test_without_a_picture_or_reference_it_is_not_found(service, shown, isic_id: str | None) -> None:
    url = f"/api/references/{isic_id or shown[1]}/image"
    response = await service.client.get(url, headers=service.token("dr"))
    problem = service.hold_to_problem(response, 404, "not_found")
    page = f"https://api.isic-archive.com/images/{shown[1]}/"
    assert (page in problem["detail"]) == (isic_id is None)


async def test_what_an_answer_links_to_is_there(service, picture) -> None:
    """No link where no picture is, then one for each that is: in the answer, its timeline and a search."""
    uploaded = (await service.upload(await service.care())).json()
    lesion = f"/api/lesions/{uploaded['lesion_id']}"
    search = f"{lesion}/images/{uploaded['image_id']}/similar"
    assert {case["image_url"] for case in _cases(uploaded)} == {None}
    pictured = uploaded["similar"][0]["isic_id"]
    await picture(pictured)
    timeline = (await service.client.get(lesion, headers=service.token("dr"))).json()
    found = (await service.client.get(search, headers=service.token("dr"))).json()
    linked = {case["image_url"] for answer in (found, *timeline["assessments"]) for case in _cases(answer)}
    assert linked == {None, f"/api/references/{pictured}/image"}
    response = await service.client.get(f"/api/references/{pictured}/image", headers=service.token("dr"))
    assert (response.status_code, response.content) == (200, JPEG)
    for case in _cases(uploaded):
        assert case["archive_url"] == f"https://api.isic-archive.com/images/{case['isic_id']}/"


def _cases(answer: dict[str, Any]) -> list[dict[str, Any]]:
    nearest = (answer["neighbours"][kind] for kind in ("nearest_benign", "nearest_malignant"))
    return [*answer["similar"], *(case for case in nearest if case)]
