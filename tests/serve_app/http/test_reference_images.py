"""A neighbour can be looked at: its picture with licence and attribution, or where else to find it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any
from urllib.parse import unquote

import pytest

from tests.serve_app.erasure.erasing import path, uploaded

JPEG = b"\xff\xd8\xff a picture"


@pytest.fixture
async def answered(service):
    """An answer; the first of its similar cases has a picture by now, the others have none."""
    answer = await uploaded(service)
    await service.owner.execute(
        "INSERT INTO reference_pictures (isic_id, width, height, sha256, jpeg) VALUES ($1, 4, 3, $2, $3)",
        answer["similar"][0]["isic_id"],
        sha256(JPEG).hexdigest(),
        JPEG,
    )
    yield answer
    await service.owner.execute("DELETE FROM reference_pictures")


async def test_a_picture_comes_with_its_licence_and_whom_to_name(service, answered) -> None:
    case = answered["similar"][0]
    url = f"/api/references/{case['isic_id']}/image"
    response = await service.get(url)
    assert (response.status_code, response.content) == (200, JPEG)
    assert response.headers["Content-Type"] == "image/jpeg"
    assert 'rel="license"' in response.headers["Link"]
    assert unquote(response.headers["X-Attribution"]) == case["attribution"]
    known = {"If-None-Match": response.headers["ETag"]}
    again = await service.client.get(url, headers=service.token("dr") | known)
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("isic_id", [None, "ISIC_9999999", "x" * 40, "..%2f..%2fetc"])
async def test_without_a_picture_or_reference_it_is_not_found(service, answered, isic_id: str | None) -> None:
    without = answered["similar"][1]
    url = f"/api/references/{isic_id or without['isic_id']}/image"
    response = await service.get(url)
    problem = service.hold_to_problem(response, 404, "not_found")
    assert (without["archive_url"] in problem["detail"]) == (isic_id is None)


async def test_what_an_answer_links_to_is_there(service, answered) -> None:
    """No link where no picture is, then one for each that is: in the answer, its timeline and a search."""
    assert {case["image_url"] for case in _cases(answered)} == {None}
    pictured = answered["similar"][0]["isic_id"]
    for url in (f"/api/lesions/{answered['lesion_id']}", f"{path(answered)}/similar"):
        body = (await service.get(url)).json()
        for answer in body.get("assessments", [body]):
            links = {case["isic_id"]: case["image_url"] for case in _cases(answer)}
            assert links.pop(pictured) == f"/api/references/{pictured}/image"
            assert set(links.values()) == {None}
    for case in _cases(answered):
        assert case["archive_url"] == f"https://api.isic-archive.com/images/{case['isic_id']}/"


def _cases(answer: dict[str, Any]) -> list[dict[str, Any]]:
    nearest = (answer["neighbours"][kind] for kind in ("nearest_benign", "nearest_malignant"))
    return [*answer["similar"], *(case for case in nearest if case)]
