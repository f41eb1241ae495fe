"""What a caller may get wrong: a clear problem each, and nothing stored but the audit event."""

from __future__ import annotations

from collections.abc import AsyncIterator
import io
import json
import struct
import zlib

import httpx
from PIL import Image
import pytest


def encoded(kind: str, size: tuple[int, int] = (300, 300)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 150, 140)).save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
async def rejected(service):
    """Send something wrong; the response, once it is shown that only the audit event was stored."""
    patient = await service.care()

    async def send(
        status: int, code: str, *, image: bytes | None = None, known_patient: bool = True, **sent
    ) -> dict:
        before = await service.counts()
        if "content" in sent:
            headers = {**service.token("dr"), **sent.pop("headers", {})}
            response = await service.client.post("/api/lesions", headers=headers, **sent)
        elif "files" in sent or "data" in sent:
            sent.setdefault("data", {"patient_id": patient})
            response = await service.client.post("/api/lesions", headers=service.token("dr"), **sent)
        else:
            response = await service.upload(patient, image=image, **sent)
        body = service.hold_to_problem(response, status, code)
        after = await service.counts()
        assert after == {**before, "audit_events": before["audit_events"] + 1}
        (event,) = await service.events(response)
        assert (event["action"], event["actor"], event["outcome"]) == ("upload", "dr", "failed")
        assert event["detail"] == {"code": code}
        assert event["patient_id"] == (patient if known_patient else None)
        return body

    send.patient = patient
    return send


@pytest.mark.parametrize(
    "image",
    [encoded("GIF"), encoded("BMP"), encoded("WEBP"), encoded("TIFF"), b"", b"\xff\xd8", b"%PDF-1.7", b"x"],
    ids=["gif", "bmp", "webp", "tiff", "empty", "cut magic", "pdf", "text"],
)
async def test_what_is_not_jpeg_or_png_by_content_is_415(rejected, image: bytes) -> None:
    await rejected(415, "unsupported_image", image=image, name="lesion.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
async def test_a_truncated_or_broken_image_is_undecodable(rejected, kind: str, drawn_lesion) -> None:
    image, png = drawn_lesion(kind=kind), drawn_lesion()
    for broken in (image[: len(image) // 2], image[:12], png[:200] + bytes(60) + png[260:]):
        await rejected(422, "undecodable_image", image=broken)


@pytest.mark.parametrize("size", [(600, 223), (1, 1)])
async def test_a_small_image_is_rejected(rejected, size) -> None:
    body = await rejected(422, "image_too_small", image=encoded("PNG", size))
    assert "224" in body["detail"]


@pytest.mark.parametrize("size", [(6400, 6400), (2**31 - 1, 2**31 - 1)])
async def test_too_many_pixels_are_found_before_decoding(rejected, size) -> None:
    body = await rejected(413, "too_large", image=png_header(*size))
    assert "pixels" in body["detail"]


async def test_too_many_bytes_by_content_length(rejected) -> None:
    body = b"x" * (21 * 1024 * 1024)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    await rejected(413, "too_large", content=body, headers=headers, known_patient=False)


async def test_too_many_bytes_in_a_body_of_unknown_length(rejected) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while True:
            sent += 1 << 20
            yield b"x" * (1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    await rejected(413, "too_large", content=endless(), headers=headers, known_patient=False)
    assert sent <= 22 << 20


async def test_an_image_just_over_the_limit_is_too_large(rejected) -> None:
    await rejected(413, "too_large", image=b"\xff\xd8\xff" + b"x" * (20 * 1024 * 1024))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("anatom_site_general", "Torso"),
        ("sex", "F"),
        *(("age_approx", age) for age in ("-1", "abc", "999", "121", "4.5", "１２", "1e1")),
        *(("encounter_id", encounter) for encounter in ("Jane Doe", "e" * 65)),
        *(("lesion_id", lesion) for lesion in ("7", "x" * 36, "0" * 33)),
        *(("history", text) for text in ("{", "[]", '"yes"', "null", "[" * 60_000)),
        *(("history", f'{{"personal_melanoma": {value}}}') for value in ('"yes"', "1", "{}", "NaN")),
        ("history", '{"smoker": true}'),
        ("history", '{"a":' * 10_000 + "1" + "}" * 10_000),
        ("checklist", '{"score": 7}'),
        ("checklist", "\x00"),
        ("checklist", '{"change_in_size": ' + "9" * 5000 + "}"),
        ("diagnosis", "MEL"),
        ("patient_name", "Jane Doe"),
        ("", "nameless"),
    ],
    ids=lambda value: value[:24],
)
async def test_a_value_that_is_not_known_is_rejected(rejected, field: str, value: str) -> None:
    known = field not in {"diagnosis", "patient_name", ""}
    body = await rejected(422, "invalid_field", **{field: value}, known_patient=known)
    assert field in body["detail"]


async def test_a_field_that_is_too_long_is_rejected(rejected) -> None:
    await rejected(422, "invalid_field", history="x" * 70_000, known_patient=False)


@pytest.mark.parametrize(
    "patient_id",
    ["", "Jane Doe", "p\x00", "p" * 65, "-p", "p\n", "é", "1990/01/02"],
)
async def test_a_patient_id_is_opaque(service, rejected, patient_id: str) -> None:
    files = {"image": service.image}
    body = await rejected(
        422, "invalid_field", files=files, data={"patient_id": patient_id}, known_patient=False
    )
    assert body["detail"].startswith("patient_id: ")


IMAGE = ("a.png", b"an image")


@pytest.mark.parametrize(
    ("files", "data", "detail"),
    [
        ([("image", IMAGE)], {}, "patient_id: "),
        ([("checklist", (None, "{}"))], {"patient_id": "p"}, "image: a file is required."),
        ([("image", (None, "text"))], {"patient_id": "p"}, "image: a file is required."),
        ([("image", IMAGE), ("patient_id", ("name.txt", b"p-1"))], {}, "patient_id: a file was sent"),
        ([("image", IMAGE), ("image", IMAGE)], {"patient_id": "p"}, "image: sent twice."),
        ([("image", IMAGE)], {"patient_id": ["p", "p"]}, "patient_id: sent twice."),
        ([("image", IMAGE)], {f"field-{i}": "x" for i in range(50)}, "The multipart body is malformed."),
    ],
    ids=["no patient", "no image", "image as text", "text as file", "two images", "twice", "many"],
)
async def test_a_form_of_other_parts_is_rejected_by_name(rejected, files, data, detail: str) -> None:
    body = await rejected(422, "invalid_field", files=files, data=data, known_patient=False)
    assert body["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("history", '{"personal_melanoma": true, "personal_melanoma": false}', "personal_melanoma"),
        ("checklist", '{"oozing": true, "oozing": true}', "oozing"),
        ("checklist", '{"oozing": {"since": 1, "until": 2, "since": 3}}', "since"),
        ("history", '[{"a": 1, "\\u0061": 2}]', "a"),
    ],
)
async def test_a_key_sent_twice_is_rejected_by_name(rejected, field: str, value: str, key: str) -> None:
    body = await rejected(422, "invalid_field", **{field: value})
    assert body["detail"] == f"{field}: {key}: sent twice."


GOOD = "multipart/form-data; boundary=b"
FORM = b'--b\r\nContent-Disposition: form-data; name="patient_id"\r\n\r\n\xff\xfe\r\n--b--\r\n'


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        *(
            (kind, FORM)
            for kind in ("", "application/json", "multipart/form-data", "multipart/mixed; boundary=b")
        ),
        *((f"multipart/form-data; boundary={boundary}", FORM) for boundary in ("", "b" * 300, "Ã©")),
        *((f"{GOOD}; charset={charset}", FORM) for charset in ("undefined", "zip", "idna", "a%00b")),
        *((GOOD, content) for content in (FORM, b"", b"{}", b"--b", b"--b\r\n\r\n\r\n--b--\r\n")),
        (GOOD, b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n\xff\xd8'),
    ],
)
async def test_a_body_that_is_no_such_form_is_rejected(rejected, content_type: str, content: bytes) -> None:
    headers = {"Content-Type": content_type.encode("latin-1")}
    await rejected(422, "invalid_field", content=content, headers=headers, known_patient=False)


async def test_empty_fields_count_as_not_stated(service) -> None:
    empty = dict.fromkeys(
        ("encounter_id", "lesion_id", "anatom_site_general", "age_approx", "sex", "history", "checklist"), ""
    )
    response = await service.upload(await service.care(), **empty)
    assert response.status_code == 201, response.text


async def test_the_problem_tells_nothing_of_the_patient(service) -> None:
    patient = await service.care()
    response: httpx.Response = await service.upload(
        patient, history=json.dumps({"personal_melanoma": "told-in-confidence"})
    )
    assert "told-in-confidence" not in response.text
    assert patient not in response.text
