"""A patient's list, timeline and the original."""

from __future__ import annotations

import base64
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import pytest

from tests.serve_app.erasure.erasing import followed, path, uploaded


def written(moment: str) -> str:
    return base64.urlsafe_b64encode(f"{moment}|{uuid4()}".encode()).decode()


async def test_the_original_comes_back_byte_for_byte(service, drawn_lesion) -> None:
    for kind, media in (("PNG", "image/png"), ("JPEG", "image/jpeg")):
        image = drawn_lesion(seed=8, kind=kind)
        answer = await uploaded(service, image=image, name="whatever.gif")
        response = await service.get(path(answer))
        assert response.status_code == 200
        assert response.content == image
        assert response.headers["content-type"] == media
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        await service.hold_to_event(response, "download", "success", about=answer)


async def test_what_is_not_there_is_not_found(service) -> None:
    first, second = [await uploaded(service) for _ in range(2)]
    for image in (str(uuid4()), second["image_id"]):
        response = await service.get(path({**first, "image_id": image}))
        service.hold_to_problem(response, 404, "not_found")


async def test_the_timeline_tells_everything_newest_first(service, drawn_lesion, answer) -> None:
    lesion, patient = answer["lesion_id"], answer["patient_id"]
    later = [await followed(service, answer, image=drawn_lesion(seed=seed)) for seed in (1, 2)]
    answers = [answer, *later]
    response = await service.get(f"/api/lesions/{lesion}")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    timeline = response.json()
    service.hold_to("TimelineDocument", timeline)
    assert (timeline["lesion_id"], timeline["patient_id"]) == (lesion, patient)
    assert [answer.pop("open_demand") for answer in answers][-1] == timeline["open_demand"]
    assert timeline["assessments"] == answers[::-1]
    await service.hold_to_event(response, "read", "success", about=answer, names=("lesion_id",))


async def test_the_list_pages_newest_first_without_gap_or_repeat(service) -> None:
    patient = await service.care()
    made = [(await service.upload(patient)).json() for _ in range(3)]
    follow_up = (await service.upload(patient, lesion_id=made[1]["lesion_id"])).json()
    seen, cursor, pages = [], None, 0
    while True:
        params = {"patient_id": patient, "limit": "2"} | ({"cursor": cursor} if cursor else {})
        response = await service.get("/api/lesions", params=params)
        assert response.status_code == 200
        assert response.headers["cache-control"] == "no-store"
        page = response.json()
        service.hold_to("LesionListDocument", page)
        await service.hold_to_event(
            response, "list", "success", about={"patient_id": patient}, names=("patient_id",)
        )
        seen += page["lesions"]
        cursor, pages = page["next"], pages + 1
        if cursor is None:
            break
    assert pages == 2
    assert [entry["lesion_id"] for entry in seen] == [answer["lesion_id"] for answer in made[::-1]]
    newest = {answer["lesion_id"]: answer["image_id"] for answer in [*made, follow_up]}
    assert {entry["lesion_id"]: entry["latest"]["image_id"] for entry in seen} == newest
    assert all(entry["latest"]["outcome"] in {"decided", "review"} for entry in seen)


LIST = "/api/lesions?patient_id=p&cursor="
BAD_PARAMETERS = (
    ("GET", "/api/lesions", "list"),
    ("GET", "/api/lesions?patient_id=p&limit=0", "list"),
    *(("GET", f"/api/lesions?patient_id={patient}", "list") for patient in ("Jane%20Doe", "a%00b")),
    *(
        ("GET", LIST + cursor, "list")
        for cursor in ("!", "%C3%A9", "MjAyNi0wMS0wMXxub3QtYW4taWQ=", "x" * 201)
    ),
    ("GET", LIST + written("0001-01-01T00:00:00+14:00"), "list"),
    ("GET", LIST + written("9999-12-31T23:59:59-14:00"), "list"),
    *(("GET", f"/api/lesions/{lesion}", "read") for lesion in ("7", "%00")),
    ("GET", "/api/lesions/7/images/8", "download"),
    *(
        ("POST", f"/api/lesions?{query}", "upload")
        for query in ("top_k=51", "licence=GPL", "confirmed=histo")
    ),
    ("POST", "/api/lesions/7/assessments/8/replay", "replay"),
)


@pytest.mark.parametrize(("method", "url", "action"), BAD_PARAMETERS)
async def test_a_bad_parameter_is_a_problem_and_one_event(service, method, url, action) -> None:
    response = await service.client.request(method, url, headers=service.token("dr"))
    body = await service.hold_to_failure(response, 422, "invalid_field", action)
    sent = [value for _, value in parse_qsl(urlsplit(url).query) if len(value) > 5]
    assert not any(value in body["detail"] for value in sent)
