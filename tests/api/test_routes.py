"""The surface: which routes there are, who may ask them, and what the document says of them."""

from __future__ import annotations

import re
from uuid import uuid4

from fastapi.routing import APIRoute
import pytest

ANONYMOUS = {"/healthz", "/readyz"}


def routes(app) -> list[APIRoute]:
    """Find every route, those of included routers too."""
    found, waiting = [], list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            found.append(route)
        else:
            waiting += getattr(route, "routes", None) or route.original_router.routes
    return found


async def test_every_route_but_the_health_ones_wants_a_token(service) -> None:
    asked = set()
    for route in routes(service.app):
        for method in route.methods:
            path = re.sub(r"\{\w+_id\}", lambda _: str(uuid4()), route.path)
            response = await service.client.request(method, path)
            if route.path in ANONYMOUS:
                assert response.status_code == 200, path
            else:
                service.hold_to_problem(response, 401, "unauthenticated")
            asked.add((method, route.path))
    assert asked == {
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/api/openapi.json"),
        ("POST", "/api/lesions"),
        ("GET", "/api/lesions"),
        ("GET", "/api/lesions/{lesion_id}"),
        ("GET", "/api/lesions/{lesion_id}/images/{image_id}"),
        ("GET", "/api/lesions/{lesion_id}/images/{image_id}/similar"),
        ("POST", "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay"),
        ("POST", "/api/lesions/{lesion_id}/confirm"),
        ("GET", "/api/references/{isic_id}/image"),
        ("DELETE", "/api/lesions/{lesion_id}/images/{image_id}"),
        ("GET", "/api/lesions/{lesion_id}/images/{image_id}/receipt"),
        ("POST", "/api/emergency-access"),
        ("GET", "/api/emergency-access"),
        ("POST", "/api/emergency-access/{emergency_id}/review"),
    }


async def test_the_document_names_the_contract(service) -> None:
    paths = service.document["paths"]
    post = paths["/api/lesions"]["post"]
    assert {"201", "202", "401", "403", "404", "413", "415", "422", "429", "503"} <= set(post["responses"])
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {
        *("image", "patient_id", "encounter_id", "lesion_id", "anatom_site_general"),
        *("age_approx", "sex", "history", "checklist"),
    }
    for path, operations in paths.items():
        for operation in operations.values():
            secured = bool(operation.get("security"))
            assert secured == (path not in ANONYMOUS), path


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/api/nothing", "/api/lesions/"])
async def test_what_is_not_there_is_a_problem_too(service, path: str) -> None:
    response = await service.client.get(path, headers=service.token("dr"))
    service.hold_to_problem(response, 404, "not_found")


async def test_a_method_that_is_not_allowed_is_a_problem_too(service) -> None:
    response = await service.client.put("/api/lesions", headers=service.token("dr"))
    service.hold_to_problem(response, 405, "method_not_allowed")


async def test_the_callers_request_id_is_kept(service) -> None:
    for path in ("/healthz", "/nothing"):
        response = await service.client.get(path, headers={"X-Request-ID": "pms-7.a:b_c"})
        assert response.headers.get_list("x-request-id") == ["pms-7.a:b_c"]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a\tb", "{}", "é".encode()])
async def test_a_request_id_that_could_forge_a_log_line_is_replaced(service, sent) -> None:
    response = await service.client.get("/healthz", headers={"X-Request-ID": sent})
    (given,) = response.headers.get_list("x-request-id")
    assert given != sent
    assert len(given) == 36


async def test_ready_names_the_live_model(service, model_id) -> None:
    response = await service.client.get("/readyz")
    assert response.json()["status"] == "ready"
    assert response.json()["model_id"] == model_id


async def test_ready_reports_which_invariants_do_not_hold(service) -> None:
    services = service.app.state.services
    await services.invariants.check()
    found = (await service.client.get("/readyz")).json()["invariants"]
    assert found["violated"] == []
    assert found["checked_at"].endswith("Z")
    await service.owner.execute(
        "UPDATE space_embedders SET model_id = 'another.model' WHERE embedding_space ="
        " (SELECT embedding_space FROM serving)"
    )
    await services.invariants.check()
    response = await service.client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["invariants"]["violated"] == ["the live model filled the live space"]
    await service.owner.execute("UPDATE space_embedders SET model_id = (SELECT model_id FROM serving)")
