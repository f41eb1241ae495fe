"""Log records that are clean before any handler sees them, and their form as JSON lines.

The cleaning is in the record factory, not in a filter or formatter: Ray Serve, uvicorn and asyncio bring
handlers of their own, and put new ones in place whenever they are reconfigured.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
import json
import logging
import math
from numbers import Number
import re
from typing import Any
from uuid import UUID

from serve_app.domain.identifiers import is_opaque
from serve_app.logs.exceptions import describe, in_lines, own_text
from serve_app.logs.privacy import Redactor
from serve_app.logs.request_context import current_request

#: Fields an event may carry (`extra={...}`, or named in the message). Any other is dropped and its name said.
FIELDS = frozenset(
    {
        *("assessment_id", "lesion_id", "image_id", "model_id", "embedding_space", "policy_version"),
        *("stage", "code", "status", "route", "method", "outcome", "invariant"),
        *("count", "bytes", "seconds", "latency_ms", "attempt", "port"),
    }
)
#: Fields that Ray Serve adds to its own records.
RAY_FIELDS = frozenset(
    {
        *("application", "deployment", "replica", "component_name", "component_id", "component"),
        *("job_id", "worker_id", "node_id", "actor_id", "task_id"),
    }
)
#: Attributes of Ray's that steer its handlers.
_STEERING = frozenset(
    {
        *("serve_access_log", "log_to_stderr", "skip_context_filter", "request_id", "description"),
        *("_ray_timestamp_ns", "timestamp_ns", "actor_name", "task_name", "task_func_name", "color_message"),
        *("told", "safe_fields"),
    }
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LONGEST_VALUE = 128
_PLACE = re.compile(r"%\((\w+)\)[-#0-9.]*[a-z]")


class CleanRecords:
    """A record factory: message, arguments and exception come out clean, whoever logs."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,  # noqa: ANN401 - logging's own
        exc_info: Any,  # noqa: ANN401
        func: str | None = None,
        sinfo: str | None = None,  # noqa: ARG002 - a stack is asked for by nobody here
    ) -> logging.LogRecord:
        """Make a record as `logging.LogRecord` would."""
        record = logging.LogRecord(name, level, fn, lno, "", (), None, func, None)
        record.msg = self._message(msg, args)
        record.safe_fields = self._named(args)
        error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
        if isinstance(error, BaseException):
            told = describe(error)
            for part in told:
                if "text" in part:
                    part["text"] = self._clean(part["text"])
            record.told = told
            record.exc_text = in_lines(told)
        return record

    def _message(self, msg: object, args: Any) -> str:  # noqa: ANN401
        if isinstance(msg, bytes | BaseException):
            return self._clean(self._argument(msg))
        text = str(msg)
        if not args:
            return self._clean(text)
        if isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], Mapping):
            args = args[0]
        try:
            if isinstance(args, Mapping):
                return self._named_message(text, args)
            return self._clean(text % tuple(self._argument(value) for value in args))
        except (TypeError, ValueError, KeyError):
            return self._clean(text)

    def _named_message(self, text: str, args: Mapping[str, object]) -> str:
        """Fill in values by their names: an allowed one stays as it is, so the words are cleaned apart."""
        literal, *rest = _PLACE.split(text)
        said = [self._clean(literal)]
        for name, following in zip(rest[::2], rest[1::2], strict=True):
            said += [str(self.field(name, args[name])), self._clean(following)]
        return "".join(said)

    def _named(self, args: Any) -> dict[str, object]:  # noqa: ANN401
        if isinstance(args, tuple) and len(args) == 1:
            args = args[0]
        if not isinstance(args, Mapping):
            return {}
        return {name: self.field(name, value) for name, value in args.items() if name in FIELDS}

    def _argument(self, value: object) -> Any:  # noqa: ANN401
        """A positional argument; numbers stay numbers, for %d."""
        if isinstance(value, Number) or value is None:
            return value
        if isinstance(value, BaseException):
            text = own_text(value)
            return f"{type(value).__name__}{f', {text}' if text else ''}"
        if isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__array__"):
            return "[bytes]"
        return str(value)

    def field(self, name: str, value: object) -> object:
        """The value of a named field: ids of ours, numbers and short names stay, anything else is a digest."""
        if value is None or (isinstance(value, bool | int | float) and math.isfinite(value)):
            return value
        if isinstance(value, float | UUID):
            return str(value)  # JSON has no word for infinity
        if isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__array__"):
            return "[bytes]"
        text = str(value)
        if isinstance(value, BaseException) or name not in FIELDS | RAY_FIELDS:
            return self._redactor.digest(text)
        request = current_request()
        if len(text) > _LONGEST_VALUE or (request and any(word in text for word in request.concealed)):
            return self._redactor.digest(text)
        return text.partition("\n")[0].partition("?")[0]

    def request_id(self, value: str) -> str:
        """The id that a record of Ray Serve's carries: the caller's own, so a digest unless its form names nobody."""
        return value if is_opaque(value) else self._redactor.digest(value)

    def _clean(self, text: str) -> str:
        request = current_request()
        if request is None:
            return self._redactor.clean(text)
        return self._redactor.clean(text, concealed=request.concealed, public=request.request_id)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, request_id, fields, exception."""

    def __init__(self, records: CleanRecords) -> None:
        super().__init__()
        self._records = records

    def format(self, record: logging.LogRecord) -> str:
        """Write the record; a field that is not allowed is named in `dropped`, its value is not."""
        request = current_request()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request is not None:
            line["request_id"] = request.request_id
        elif sent := getattr(record, "request_id", None):
            line["request_id"] = self._records.request_id(str(sent))
        line.update(getattr(record, "safe_fields", {}))
        dropped = []
        for name, value in vars(record).items():
            if name in FIELDS or name in RAY_FIELDS:
                line[name] = self._records.field(name, value)
            elif name not in _STANDARD and name not in _STEERING:
                dropped.append(name)
        if dropped:
            line["dropped"] = sorted(dropped)
        if told := getattr(record, "told", None):
            line["exception"] = told
        return json.dumps(line, ensure_ascii=True, default=lambda _: "[removed]")
