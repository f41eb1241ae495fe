"""What may not be in a log is not, wherever in a line it stood; what an operator needs is still there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import pytest

from serve_app.logs import LONGEST, Redactor, node_key

_REDACTOR = Redactor(b"k" * 32)
_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJkciJ9.c2lnbmF0dXJlLW9mLWEtdG9rZW4"


@pytest.mark.parametrize(
    ("frame", "secret"),
    [
        ("Invalid header: Authorization: Bearer {}", _TOKEN),
        ("token {} is malformed", _TOKEN),
        ("GET /api/lesions?patient_id={}&limit=5 HTTP/1.1", "Muster"),
        ("cannot decode b'{}'", "\\xff\\xd8\\xff\\xe0JFIF"),
        ("cannot decode b'{}", "\\xff\\xd8\\xff\\xe0JFIF and cut off"),
        ('duplicate key value "{}" violates a constraint', "Muster"),
        ("file name '{}' is too long", "Hans Muster naevus left.jpg"),
        ("patient_id={} not found", "Muster"),
        ("for patient {}", "PAT-00123"),
        ("for patient {}", "1234567"),
        ("for patient {}", "f47ac10b-58cc-4372-a567-0e02b2c3d479"),
        ("mail to {} failed", "h.muster@example.org"),
        ("connecting to postgresql://{}@host/derm", "derm_app:Muster"),
        ("Request failed: ValueError: no such patient {}", "Muster"),
        ("Task died\nKeyError {}", "Muster"),
        ("from {}", "192.168.17.23:50412"),
    ],
)
def test_what_identifies_somebody_goes(frame: str, secret: str) -> None:
    cleaned = _REDACTOR.clean(frame.format(secret))
    assert secret not in cleaned
    for word in secret.replace(".", " ").split():
        assert len(word) < 6 or word not in cleaned
    assert cleaned[:5] == frame[:5]


def test_what_an_operator_reads_stays() -> None:
    for text in (
        "Sealing waits: records unavailable",
        "violated: every reference is public and licensed, and found under that licence alone (3 rows)",
        "took 31.5s at 127.0.0.1:8000",
        "HTTP/1.1 400",
        "deployment='classifier' is healthy",
        "in serve_app/records/pool.py:93 connection",
        "GET /api/lesions 200 12.3ms",
    ):
        assert _REDACTOR.clean(text) == text


def test_equal_values_look_equal_and_only_under_one_key() -> None:
    first, again = (_REDACTOR.clean(f"{verb} patient PAT-1234") for verb in ("found", "lost"))
    assert first.split()[-1] == again.split()[-1]
    assert Redactor(b"l" * 32).clean("found patient PAT-1234") != first
    assert node_key("a secret") != node_key("another")
    assert len(node_key("a secret")) == 32


def test_what_is_concealed_goes_even_from_within_a_word_and_the_request_id_stays() -> None:
    assert "muster" not in _REDACTOR.clean("/tmp/upload-muster-x.jpg and muster", concealed=["muster"])
    request_id = "01939d2c-7c1e-7000-8000-0123456789ab"
    assert _REDACTOR.clean(f"failed in request {request_id}", public=request_id).endswith(request_id)


@given(st.from_regex(r"[A-Za-z][A-Za-z._:-]{0,20}[0-9]{2,12}[A-Za-z0-9._:-]{0,12}", fullmatch=True))
def test_no_opaque_id_survives(identifier: str) -> None:
    for frame in ("for {}", "'{}'", "({})", "x={}", "/api/{}/images", "{}: gone", "[{}, {}]"):
        assert identifier not in _REDACTOR.clean(frame.format(identifier, identifier))


@given(st.text(max_size=2000))
def test_any_text_is_one_short_line(text: str) -> None:
    cleaned = _REDACTOR.clean(text)
    assert "\n" not in cleaned
    assert len(cleaned) <= LONGEST
