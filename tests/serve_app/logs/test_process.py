"""A process's log: JSON lines, every record clean whoever logs and whoever writes."""

from __future__ import annotations

from collections.abc import Iterator
import io
import json
import logging
from logging.handlers import MemoryHandler
import re
import threading
from uuid import uuid4

import numpy as np
import pytest

from serve_app.domain.errors import IntegrityError, InvalidField
from serve_app.logs import ProcessLog, begin_request, conceal, end_request

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
    assert line == {
        "level": "WARNING",
        "logger": "derm.test",
        "message": "Completed 3 pending",
        "request_id": "r-1",
    }


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
    values = {"model_id": "tf_efficientnet_lite0.derm7", "patient_id": MARK, "count": 2}
    extra = {
        "patient_id": MARK,
        "assessment_id": uuid4(),
        "bytes": float("nan"),
        "code": np.zeros(3, np.uint8),
    }
    text = "%(model_id)s for %(patient_id)s, %(count)d times"
    logging.getLogger("derm.test").error(text, values, extra=extra)
    begin_request("r-1")
    conceal(MARK)
    logging.getLogger("derm.test").error("%s of %s", b"\xff\xd8", bytearray(50), extra={"stage": f"x-{MARK}"})
    first, second = lines(stream)
    assert re.fullmatch("tf_efficientnet_lite0.derm7 for #[0-9a-f]{12}, 2 times", first["message"])
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
    assert [told["type"] for told in line["exception"]] == [
        "serve_app.domain.errors.InvalidField",
        "KeyError",
    ]
    assert line["exception"][1]["at"][-1].startswith("tests/serve_app/logs/test_process.py:")
    assert line["exception"][1]["at"][-1].endswith(" fail")
    assert MARK not in stream.getvalue()


def test_an_error_of_the_service_itself_says_what_it_is(stream) -> None:
    error = IntegrityError("The key store is open to other users")
    logging.getLogger("derm.test").error("not served: %s", error, exc_info=error)
    (line,) = lines(stream)
    assert line["exception"][0]["text"] == "The key store is open to other users"
    assert "open to other users" in line["message"]


def test_every_other_handler_gets_clean_records_too(stream) -> None:
    """Ray's, uvicorn's, pytest's: whatever they write of a record, it is not in there."""
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append
    logger = logging.getLogger("somebody.else")
    logger.addHandler(handler)
    try:
        logger.error("for patient_id=%s", MARK, exc_info=ValueError(MARK))
        logger.error(f"Request failed: ValueError: {MARK}")  # noqa: G004
        logger.error(ValueError(MARK))
    finally:
        logger.removeHandler(handler)
    for record in kept:
        text = logging.Formatter("%(message)s").format(record)
        assert MARK not in text
        assert MARK not in repr(vars(record))
    assert "ValueError" in logging.Formatter().format(kept[0])
    assert kept[1].getMessage() == "Request failed: ValueError"


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
