"""Whatever the OpenAPI document allows, and what it does not: no route answers it with a failure of its own.

The routes are read from the document, so that a new one is tried without a line here.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
import pytest

from serve_app.http.app import create_app
from serve_app.settings import Settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis (test extra) is not installed")

ROLES = ("clinician", "supervisor", "auditor", "operator", "pms_service")


#: Nothing is opened for the document.
_UNUSED = Settings(database_url=SecretStr("postgresql://unused"), token_secret=SecretStr("unused" * 8))
DOCUMENT = create_app(_UNUSED, stages=None).openapi()  # type: ignore[arg-type]
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
assert OPERATIONS
#: What takes nothing has nothing to be sent wrongly.
TRIES = [
    pytest.param(operation, mode, id=f"{operation.method} {operation.path} {mode.value}")
    for operation in OPERATIONS
    for mode in schemathesis.GenerationMode
    if mode.is_positive
    or operation.definition.raw.get("parameters")
    or operation.definition.raw.get("requestBody")
]


@pytest.fixture(scope="module")
async def known(service) -> dict[str, str]:
    """Ids that exist: with them, what is made up gets past the first refusal."""
    patient = await service.care("fuzz", "fuzzed-document")
    answer = (await service.upload(patient, subject="fuzz")).json()
    return {name: answer[name] for name in ("lesion_id", "image_id", "assessment_id", "patient_id")}


@pytest.mark.parametrize(("operation", "mode"), TRIES)
@settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(data=st.data())
async def test_no_request_is_a_failure_of_the_service(service, known, operation, mode, data) -> None:
    case = data.draw(operation.as_strategy(generation_mode=mode))
    if data.draw(st.booleans()):
        for place in (case.path_parameters, case.query, case.body):
            if isinstance(place, dict):
                place.update({name: value for name, value in known.items() if name in place})
    await _ask(service, case)


async def _ask(service, case) -> None:
    """Send one case; an error is a problem document, and none is 5xx but a 503 that says when to come again."""
    arguments = case.as_transport_kwargs()
    headers = {
        name: value
        for name, value in (arguments.get("headers") or {}).items()
        if name.lower() not in {"authorization", "x-schemathesis-testcaseid"} and _is_sendable(value)
    } | service.token("fuzz", ROLES)
    names = ("params", "json", "files", "data")
    sent = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if isinstance(sent.get("data"), (bytes, str)):
        sent["content"] = sent.pop("data")
    if "files" in sent:
        sent["files"] = [(name, _as_file(part)) for name, part in sent["files"]]
    try:
        response = await service.client.request(
            arguments["method"], arguments["url"], headers=headers, **sent
        )
    except UnicodeEncodeError:  # a lone surrogate never leaves the client
        return
    if response.is_error:
        code = response.json()["code"] if response.content else None
        service.hold_to_problem(response, response.status_code, code)
        assert response.status_code < 500 or (response.status_code == 503 and response.headers["retry-after"])
    elif response.headers.get("content-type") == "application/json":
        _hold_to_document(service, case, response)


def _as_file(part: Any) -> Any:
    name, content = part[0], part[1]
    return (name, content if isinstance(content, bytes) else str(content).encode(errors="replace"), *part[2:])


def _is_sendable(value: str) -> bool:
    return re.fullmatch(r"[\x20-\x7e]*", value) is not None


def _hold_to_document(service, case, response) -> None:
    documented = DOCUMENT["paths"][case.path][case.method.lower()]["responses"]
    assert str(response.status_code) in documented, (case.path, response.status_code)
    content = documented[str(response.status_code)].get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    if "$ref" in schema:
        service.hold_to(schema["$ref"].rsplit("/", 1)[1], response.json())
