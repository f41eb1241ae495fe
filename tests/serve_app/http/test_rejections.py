"""What a caller may get wrong: a clear problem each, and nothing stored but the audit event."""

from __future__ import annotations

from collections.abc import AsyncIterator
import io
import struct
import zlib

from PIL import Image
import pytest

from tests.serve_app.http.test_corpora import chunk
from tests.serve_app.http.test_fuzz import FIELDS


def encoded(kind: str, size: tuple[int, int] = (300, 300)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 150, 140)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
async def rejected(service):
    """Send something wrong; the response, once it is shown that only the audit event was stored."""
    patient = await service.care()

    async def send(status: int, code: str, *, known_patient: bool = True, **sent) -> dict:
        async with service.storing_nothing():
            if "content" in sent or "files" in sent:
                headers = {**service.token("dr"), **sent.pop("headers", {})}
                response = await service.client.post("/api/lesions", headers=headers, **sent)
            else:
                response = await service.upload(patient, **sent)
        event = await service.hold_to_event(response, "upload", "failed", code=code)
        assert (event["actor"], event["patient_id"]) == ("dr", patient if known_patient else None)
        return service.hold_to_problem(response, status, code)

    send.patient = patient
    return send


#: A PNG that claims 40 megapixels and has next to none: found before decoding.
MANY_PIXELS = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 6400, 6400, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
)


@pytest.mark.parametrize(
    ("image", "status", "code", "said"),
    [
        *((encoded(kind), 415, "unsupported_image", kind) for kind in ("GIF", "BMP", "WEBP", "TIFF")),
        *((image, 415, "unsupported_image", "") for image in (b"", b"\xff\xd8", b"%PDF-1.7")),
        *((encoded(kind)[:300], 422, "undecodable_image", "") for kind in ("JPEG", "PNG")),
        (encoded("PNG", (600, 223)), 422, "image_too_small", "224"),
        (MANY_PIXELS, 413, "too_large", "pixels"),
    ],
    ids=["gif", "bmp", "webp", "tiff", "empty", "cut magic", "pdf", "cut JPEG", "cut PNG", "small", "large"],
)
async def test_an_image_that_cannot_be_assessed_is_rejected_by_content(
    rejected, image: bytes, status: int, code: str, said: str
) -> None:
    body = await rejected(status, code, image=image, name="lesion.jpg")
    assert said.lower() in body["detail"].lower()


async def test_too_many_bytes_by_content_length_or_of_unknown_length(rejected) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        while True:
            sent += 1 << 20
            yield b"x" * (1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    for body in (b"x" * (21 << 20), endless()):
        await rejected(413, "too_large", content=body, headers=headers, known_patient=False)
    assert sent <= 22 << 20


async def test_an_image_and_a_field_just_over_the_limit_are_rejected(rejected) -> None:
    await rejected(413, "too_large", image=b"\xff\xd8\xff" + b"x" * (20 * 1024 * 1024))
    await rejected(422, "invalid_field", history="x" * 70_000, known_patient=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("anatom_site_general", "Torso"),
        ("sex", "F"),
        *(("age_approx", age) for age in ("-1", "abc", "121", "4.5", "１２", "1e1")),
        *(("encounter_id", encounter) for encounter in ("Jane Doe", "e" * 65)),
        *(("lesion_id", lesion) for lesion in ("7", "x" * 36, "0" * 33)),
        *(("history", text) for text in ("{", "[]", "null", "[" * 60_000)),
        *(("history", f'{{"personal_melanoma": {value}}}') for value in ('"yes"', "1", "NaN")),
        ("history", '{"smoker": true}'),
        ("history", '{"a":' * 10_000 + "1" + "}" * 10_000),
        ("checklist", '{"score": 7}'),
        ("checklist", "\x00"),
        ("checklist", '{"change_in_size": ' + "9" * 5000 + "}"),
        *(("skin_type", kind) for kind in ("0", "iii", "VII", "III ", "3")),
        *(("device", name) for name in ("x" * 65, " DL4", "DL4 ", "D\tL4", "Dermlupe ü", "\x00")),
        *(("impression", text) for text in ("{", "[]", "null", '"MEL"', '{"diagnosis": "naevus"}')),
        *(
            ("impression", f'{{"intended_referral": {value}}}')
            for value in ('"soon"', "1", "true", '["none"]')
        ),
        ("impression", '{"diagnosis": "MEL", "note": "Jane Doe"}'),
        ("impression", '{"diagnosis": "MEL", "diagnosis": "NV"}'),
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


IMAGE = ("a.png", b"an image")


@pytest.mark.parametrize(
    ("files", "data", "detail"),
    [
        ([("image", IMAGE)], {}, "patient_id: "),
        *(
            ([("image", IMAGE)], {"patient_id": patient_id}, "patient_id: ")
            for patient_id in ("", "Jane Doe", "p\x00", "p" * 65, "-p", "é", "1990/01/02")
        ),
        ([("checklist", (None, "{}"))], {"patient_id": "p"}, "image: a file is required."),
        ([("image", (None, "text"))], {"patient_id": "p"}, "image: a file is required."),
        ([("image", IMAGE), ("patient_id", ("name.txt", b"p-1"))], {}, "patient_id: a file was sent"),
        ([("image", IMAGE), ("image", IMAGE)], {"patient_id": "p"}, "image: sent twice."),
        ([("image", IMAGE)], {"patient_id": ["p", "p"]}, "patient_id: sent twice."),
        ([("image", IMAGE)], {f"field-{i}": "x" for i in range(50)}, "The multipart body is malformed."),
    ],
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
    response = await service.upload(await service.care(), **dict.fromkeys(FIELDS, ""))
    assert response.status_code == 201, response.text


async def test_the_problem_tells_nothing_of_the_patient(rejected) -> None:
    said = await rejected(422, "invalid_field", history='{"personal_melanoma": "told-in-confidence"}')
    assert "told-in-confidence" not in str(said)
    assert rejected.patient not in str(said)
