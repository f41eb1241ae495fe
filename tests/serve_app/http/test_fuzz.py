"""Whatever is sent, the answer is never a 500."""

from __future__ import annotations

import json
import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

FIELDS = (
    *("encounter_id", "lesion_id", "anatom_site_general", "age_approx", "sex", "history", "checklist"),
    *("skin_type", "device", "impression"),
)
fuzzed = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
async def patient(service) -> str:
    return await service.care("fuzz", "fuzzed-patient")


def check(service, response) -> None:
    if response.status_code != 201:
        assert response.status_code in {400, 403, 404, 413, 415, 422}, response.text
        service.hold_to_problem(response, response.status_code, response.json()["code"])


def part(name: bytes, value: bytes, *, file: bool) -> bytes:
    filename = b'; filename="x"' if file else b""
    head = b'--b\r\nContent-Disposition: form-data; name="' + name + b'"' + filename
    return head + b"\r\n\r\n" + value + b"\r\n"


parts = st.builds(
    part,
    st.sampled_from([name.encode() for name in ("image", "patient_id", *FIELDS)]) | st.binary(max_size=20),
    st.sampled_from([b"fuzzed-patient", b"torso", b"male", b"40", b"{}"]) | st.binary(max_size=60),
    file=st.booleans(),
)
multipart = st.builds(
    lambda made, end, extra: b"".join(made) + end + extra,
    st.lists(parts, max_size=12),
    st.sampled_from([b"--b--\r\n", b"--b--", b"--b", b""]),
    st.binary(max_size=8),
)


@fuzzed
@given(multipart | st.binary(max_size=400), st.just("b") | st.text(max_size=40))
async def test_a_random_body(service, patient, body: bytes, boundary: str) -> None:
    content_type = f"multipart/form-data; boundary={boundary}".encode()
    if any(byte in content_type for byte in b"\r\n\0"):
        return
    headers = [(name.encode(), value.encode()) for name, value in service.token("fuzz").items()]
    headers.append((b"Content-Type", content_type))
    check(service, await service.client.post("/api/lesions", content=body, headers=headers))


@fuzzed
@given(
    st.dictionaries(st.sampled_from(FIELDS), st.text(max_size=60) | json_values.map(json.dumps), max_size=7)
)
async def test_random_fields(service, patient, fields: dict[str, str]) -> None:
    image = b"\xff\xd8\xff not an image"
    check(service, await service.upload(patient, subject="fuzz", image=image, **fields))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
async def test_a_damaged_image(service, patient, drawn_lesion, kind: str) -> None:
    whole, dice = drawn_lesion(width=230, height=230, kind=kind), random.Random(kind)  # noqa: S311 - repeatable
    for damage in range(1, 31):
        image = bytearray(whole)
        for _ in range(damage):
            image[dice.randrange(3, len(image))] = dice.randrange(256)
        check(service, await service.upload(patient, subject="fuzz", image=bytes(image)))


@fuzzed
@given(st.binary(min_size=1, max_size=40), st.binary(max_size=40))
async def test_random_headers(service, patient, token: bytes, key: bytes) -> None:
    headers = [(b"Authorization", b"Bearer " + token), (b"X-Request-ID", key), (b"Idempotency-Key", key)]
    response = await service.client.get("/api/lesions", params={"patient_id": patient}, headers=headers)
    service.hold_to_problem(response, 401, "unauthenticated")
