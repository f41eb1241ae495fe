"""A process's log: JSON lines, every record clean whoever logs and whoever writes.

What may not be in a log is not, wherever in a line it stood; what an operator needs is still there.
"""

from __future__ import annotations

from collections.abc import Iterator
import io
import json
import logging
from logging.handlers import MemoryHandler
import re
import threading
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from serve_app.domain.errors import IntegrityError, InvalidField
from serve_app.logs import LONGEST, ProcessLog, Redactor, begin_request, conceal, end_request, node_key

MARK = "Zyxwvut-Marker"


@pytest.fixture
def stream(logging_put_back) -> Iterator[io.StringIO]:
    """What an installed log writes."""
    stream = io.StringIO()
    ProcessLog(b"k" * 32, stream=stream).install()
    yield stream
    end_request()


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_logger_message_and_request(stream) -> None:
    begin_request("r-1")
    logging.getLogger("derm.test").warning("Completed %d pending", 3)
    (line,) = lines(stream)
    assert line.pop("time").endswith("+00:00")
    said = {"logger": "derm.test", "message": "Completed 3 pending", "request_id": "r-1"}
    assert line == {"level": "WARNING", **said}


@pytest.mark.parametrize("sent", [f"{MARK}.1950-01-31", "pms-7", "01939d2c-7c1e-7000-8000-0123456789ab"])
def test_a_record_of_serves_own_keeps_the_callers_id_only_where_it_names_nobody(stream, sent: str) -> None:
    """Serve's filter puts the header's value on its records, in every replica that a request comes to."""
    logging.getLogger("derm.test").warning("said", extra={"request_id": sent})
    (line,) = lines(stream)
    opaque = len(sent) == 36
    assert (line["request_id"] == sent) is opaque
    assert opaque or re.fullmatch("#[0-9a-f]{12}", line["request_id"])
    assert opaque or sent not in stream.getvalue()


def test_allowed_values_are_fields_and_readable_and_no_others(stream) -> None:
    extra = {"model_id": "tf_efficientnet_lite0.derm7", "count": 2, "patient_id": MARK}
    extra |= {"assessment_id": uuid4(), "bytes": np.nan, "code": np.zeros(3, np.uint8)}
    logging.getLogger("derm.test").error("for patient_id=%s, %d times", MARK, 2, extra=extra)
    begin_request("r-1")
    conceal(MARK)
    logging.getLogger("derm.test").error("%s of %s", b"\xff\xd8", bytearray(50), extra={"stage": f"x-{MARK}"})
    first, second = lines(stream)
    assert re.fullmatch("for patient_id=#[0-9a-f]{12}, 2 times", first["message"])
    assert (first["model_id"], first["count"]) == ("tf_efficientnet_lite0.derm7", 2)
    assert (first["bytes"], first["code"], first["dropped"]) == ("nan", "[bytes]", ["patient_id"])
    assert first["assessment_id"] == str(extra["assessment_id"])
    assert second["message"] == "[bytes] of [bytes]"
    assert MARK not in stream.getvalue()


def test_an_exception_is_types_and_places(stream) -> None:
    secret = MARK  # a local variable, and a literal below

    def fail() -> None:
        raise KeyError(f"Zyxwvut-Marker {secret}")

    try:
        try:
            fail()
        except KeyError as error:
            raise InvalidField(f"image: {secret} is unknown") from error
    except InvalidField:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    (line,) = lines(stream)
    outer, inner = line["exception"]
    assert (outer["type"], inner["type"]) == ("serve_app.domain.errors.InvalidField", "KeyError")
    assert re.fullmatch(r"tests/serve_app/test_logs\.py:.* fail", inner["at"][-1])
    assert MARK not in stream.getvalue()


def test_an_error_of_the_service_itself_says_what_it_is(stream) -> None:
    error = IntegrityError("The key store is open to other users")
    logging.getLogger("derm.test").error("not served: %s", error, exc_info=error)
    (line,) = lines(stream)
    assert line["exception"][0]["text"] == "The key store is open to other users"
    assert "open to other users" in line["message"]


def test_every_other_handler_gets_clean_records_too(stream, caplog) -> None:
    """Ray's, uvicorn's, pytest's: whatever they write of a record, it is not in there."""
    logger = logging.getLogger("somebody.else")
    logger.error("for patient_id=%s", MARK, exc_info=ValueError(MARK))
    logger.error(f"Request failed: ValueError: {MARK}")  # noqa: G004
    logger.error(ValueError(MARK))
    for record in caplog.records:
        assert MARK not in logging.Formatter("%(message)s").format(record)
        assert MARK not in repr(vars(record))
    assert "ValueError" in logging.Formatter().format(caplog.records[0])
    assert caplog.records[1].getMessage() == "Request failed: ValueError"


def test_a_call_with_wrong_arguments_still_logs(stream) -> None:
    calls = [("%s %s", "one"), ("%d", "x"), ("%(a)s", {"b": 1}), ("100 %", 1)]
    for arguments in calls:
        logging.getLogger("derm.test").error(*arguments)
    assert len(lines(stream)) == len(calls)


def test_a_dead_thread_is_on_record(stream) -> None:
    def die() -> None:
        raise ValueError(MARK)

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    (line,) = lines(stream)
    assert line["exception"][0]["type"] == "ValueError"
    assert MARK not in stream.getvalue()


def test_in_a_replica_our_lines_are_in_serves_file_and_serves_lines_in_our_form(stream, tmp_path) -> None:
    """Serve makes new handlers whenever its configuration changes: each is taken over."""
    serve = logging.getLogger("ray.serve")
    before, propagate = serve.handlers[:], serve.propagate
    serve.propagate = False
    try:
        for number in range(2):
            file = logging.FileHandler(tmp_path / f"{number}.log")
            serve.handlers[:] = [MemoryHandler(1, target=file)]
            logging.getLogger("derm.test").warning("said by us")
            serve.warning("said by Serve of '%s'", MARK, extra={"deployment": "risk", "replica": "x7y"})
            ours, theirs = map(json.loads, (tmp_path / f"{number}.log").read_text().splitlines())
            assert (ours["logger"], ours["message"]) == ("derm.test", "said by us")
            assert (theirs["logger"], theirs["deployment"], theirs["replica"]) == ("ray.serve", "risk", "x7y")
            assert MARK not in json.dumps(theirs)
            file.close()
    finally:
        serve.handlers[:], serve.propagate = before, propagate
    assert stream.getvalue() == ""


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
