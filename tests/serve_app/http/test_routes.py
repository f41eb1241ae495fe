"""The surface: which routes there are, who may ask them, and what the document says of them."""

from __future__ import annotations

import re

from fastapi.routing import APIRoute
import pytest

from serve_app.access.rules import Action
from tests.serve_app.erasure.erasing import path as path_of
from tests.serve_app.http.test_access import ANONYMOUS, OF_EHRS, ROUTES

NOWHERE = "00000000-0000-7000-8000-000000000000"
#: Every route but the anonymous ones and those for EHRs.
GUARDED = [("GET", "/api/openapi.json"), *ROUTES]


def url_of(path: str) -> str:
    return re.sub(r"\{\w+_id\}", NOWHERE, path)


async def test_every_route_but_the_health_ones_wants_a_token(service) -> None:
    found, waiting = set(), list(service.app.routes)
    while waiting:  # those of included routers, too
        route = waiting.pop()
        if isinstance(route, APIRoute):
            found |= {(method, route.path) for method in route.methods}
        else:
            waiting += getattr(route, "routes", None) or route.original_router.routes
    assert found == {*GUARDED, *OF_EHRS, *(("GET", path) for path in ANONYMOUS)}
    assert not {path for _, path in OF_EHRS} & service.document["paths"].keys()
    for method, path in found - OF_EHRS:
        response = await service.client.request(method, url_of(path))
        if path in ANONYMOUS:
            assert response.status_code == 200, path
        else:
            service.hold_to_problem(response, 401, "unauthenticated")
        if path in service.document["paths"]:
            operation = service.document["paths"][path][method.lower()]
            assert ("security" in operation) is (path not in ANONYMOUS), path
            assert operation.get("x-action") == ROUTES.get((method, path)), path
    assert set(ROUTES.values()) <= set(Action)


async def test_what_is_not_there_and_what_is_not_allowed_are_problems_too(service) -> None:
    for path in ("/", "/docs", "/openapi.json", "/api/lesions/"):
        response = await service.get(path)
        service.hold_to_problem(response, 404, "not_found")
    for method, path, allowed in (
        ("PUT", "/api/lesions", "GET, HEAD, POST"),
        ("HEAD", f"/api/lesions/{NOWHERE}/assessments/{NOWHERE}/replay", "POST"),
        ("PATCH", f"/api/lesions/{NOWHERE}/images/{NOWHERE}", "DELETE, GET, HEAD"),
        ("OPTIONS", "/api/openapi.json", "GET, HEAD"),
    ):
        response = await service.client.request(method, path, headers=service.token("dr"))
        assert (response.status_code, response.headers["allow"]) == (405, allowed)
        if method == "HEAD":
            assert response.content == b""
        else:
            service.hold_to_problem(response, 405, "method_not_allowed")


async def test_head_answers_as_get_without_a_body(service, answer) -> None:
    lesion, headers = f"/api/lesions/{answer['lesion_id']}", service.token("dr")
    listed = f"/api/lesions?patient_id={answer['patient_id']}"
    for path in (
        "/readyz",
        "/api/openapi.json",
        "/nothing",
        lesion,
        path_of(answer),
        listed,
        "/api/lesions",
    ):
        get, head = [await service.client.request(way, path, headers=headers) for way in ("GET", "HEAD")]
        assert head.status_code == get.status_code
        assert head.content == b""
        own = ("x-request-id", "content-length") if path == "/readyz" else ("x-request-id",)
        assert [pair for pair in head.headers.multi_items() if pair[0] not in own] == [
            pair for pair in get.headers.multi_items() if pair[0] not in own
        ]
        told, told_again = [
            [(event["action"], event["actor"], event["outcome"], event["detail"]) for event in events]
            for events in (await service.events(get), await service.events(head))
        ]
        assert told == told_again


async def test_an_unknown_query_parameter_is_rejected_on_every_route(service) -> None:
    headers = service.token("dr", ("clinician", "supervisor"))
    asked = [(method, path, "unheard_of=1") for method, path in GUARDED]
    asked += [("GET", "/api/lesions", query) for query in ("Top_K=3", "unheard_of", "=1", "a%20b=1")]
    for method, path, query in asked:
        response = await service.client.request(method, f"{url_of(path)}?{query}", headers=headers)
        body = service.hold_to_problem(response, 422, "invalid_field")
        assert body["detail"].startswith("query: no such parameter"), (method, path)
        action = ROUTES.get((method, path), "describe")
        await service.hold_to_event(response, action, "failed", code="invalid_field")


async def test_a_single_query_parameter_sent_twice_is_rejected(service) -> None:
    similar = f"/api/lesions/{NOWHERE}/images/{NOWHERE}/similar"
    for url in (
        "/api/lesions?patient_id=p&patient_id=q",
        f"{similar}?licence=CC-0&licence=CC-BY&confirmed=true&confirmed=false",
    ):
        response = await service.get(url)
        body = service.hold_to_problem(response, 422, "invalid_field")
        assert body["detail"] in {"patient_id: sent twice", "confirmed: sent twice"}


async def test_headers_too_large_or_too_many_are_a_problem_too(service) -> None:
    for headers in ({"X-A": "a" * 17_000}, {f"X-{number}": "a" for number in range(101)}):
        for path in ("/healthz", "/api/lesions?patient_id=p"):
            response = await service.client.get(path, headers={**headers, **service.token("dr")})
            service.hold_to_problem(response, 431, "headers_too_large")


@pytest.mark.parametrize(
    "sent", ["pms-7.a_b", "x" * 64, "", "a b", "x" * 65, "a:b", "a\tb", "{}", "é".encode()], ids=repr
)
async def test_a_request_id_is_kept_where_it_is_short_and_plain_else_replaced(service, sent) -> None:
    plain = isinstance(sent, str) and re.fullmatch(r"[\w.-]{1,64}", sent) is not None
    for path in ("/healthz", "/nothing"):
        response = await service.client.get(path, headers={"X-Request-ID": sent})
        (given,) = response.headers.get_list("x-request-id")
        assert given == sent if plain else len(given) == 36 != sent
