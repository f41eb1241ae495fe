"""Log records that are clean before any handler sees them, and their form as JSON lines.

The cleaning is in the record factory, not in a filter or formatter: Ray Serve, uvicorn and asyncio bring
handlers of their own, and put new ones in place whenever they are reconfigured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
import hashlib
import hmac
import json
import logging
import math
from numbers import Number
from pathlib import Path
import re
import secrets
import sys
import threading
import traceback
from typing import Any, Self, TextIO
from uuid import UUID

from pydantic import SecretStr

from serve_app.domain.errors import DermError
from serve_app.domain.identifiers import is_opaque

#: Shorter values are numbers, sexes and sites; replacing them would tear every other word apart.
_SHORTEST_CONCEALED = 4


@dataclass(slots=True)
class RequestContext:
    """One request: the id on its log lines, and the caller's own words, which are on none."""

    request_id: str
    concealed: set[str] = field(default_factory=set)


_request: ContextVar[RequestContext | None] = ContextVar("derm_request", default=None)


def begin_request(request_id: str, concealed: Iterable[str] = ()) -> None:
    """Have the log know of a request, in this task and all that it starts."""
    _request.set(RequestContext(request_id))
    conceal(*concealed)


def end_request() -> None:
    """Have the log forget it."""
    _request.set(None)


def conceal(*values: str | None) -> None:
    """Keep what a caller sent (ids, file names, tokens) out of every log line of the request at hand."""
    if request := _request.get():
        request.concealed.update(value for value in values if value and len(value) >= _SHORTEST_CONCEALED)


REMOVED = "[removed]"
#: Of a message, characters.
LONGEST = 400

#: Names of ours that may stand between quotation marks or hold digits.
_KNOWN = frozenset(
    {
        *("triage", "ingress", "preprocess", "classifier", "embedder", "retriever", "risk"),
        *("HTTP/1.0", "HTTP/1.1", "HTTP/2", "utf-8", "uint8", "float16", "float32", "sha256"),
    }
)
_NAMED = "patient|encounter|lesion|filename|file_name|sub|subject|actor|token|authorization|password|secret"
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # A repr of bytes, as uvicorn, h11 and asyncpg put into their messages.
    (re.compile(r"\bb'(?:[^'\\]|\\.)*'?|\bb\"(?:[^\"\\]|\\.)*\"?"), "[bytes]"),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), rf"\1 {REMOVED}"),
    (re.compile(r"[\w-]{8,}\.[\w-]{4,}\.[\w-]{8,}"), REMOVED),  # a JWT
    (re.compile(r"://[^\s/@]+@"), "://"),  # user and password of a URL
    (re.compile(r"\?[^\s'\"]+"), f"?{REMOVED}"),
    # An exception's text quotes what it stumbled over; its type says what happened.
    (re.compile(r"(?s)\b([A-Za-z_.]*(?:Error|Exception|Timeout|Disconnect))\b\s*[:(].*"), r"\1"),
)
_NAMED_VALUE = re.compile(
    rf"(?i)\b((?:{_NAMED})(?:_?id)?|idempotency[-_]key)(\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s,;)\]}}]+)"
)
_QUOTED = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\"|`([^`\n]*)`")
_WORD = re.compile(r"[^\s,;()\[\]{}<>='\"`|]+")
_PLAIN = re.compile(
    r"""(?x)
    /?[^\W\d_]+(?:[-_./:'][^\W\d_]+)*            # letters: a word, a dotted or hyphened one, a path
    | [-+]?\d{1,5}(?:[.:]\d{1,4})?               # a short number, a ratio, a time of day
    | \d{1,6}(?:\.\d+)?(?:%|ms|us|s|B|KB|MB|GB|KiB|MiB|GiB)   # a measure
    | (?:127\.0\.0\.1|\[?::1\]?|localhost)(?::\d{1,5})?       # this machine
    | [\w/.-]+\.(?:py|sql):\d{1,5}               # a place in the code
    | (?:[\w.-]*[-_./:])?\#[0-9a-f]{12}.{0,3}    # a digest
    | [\W_]+                                     # punctuation
    """
)
_DIGEST = re.compile(r"#[0-9a-f]{12}")


class Redactor:
    """Cleans text and values; `key` (32 bytes) is the node's, and makes its digests its own."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def digest(self, value: str) -> str:
        """Replace a value by 48 bits of its HMAC-SHA256: enough to follow it, too few to be it."""
        mac = hmac.new(self._key, value.encode(errors="replace"), hashlib.sha256)
        return f"#{mac.hexdigest()[:12]}"

    def clean(self, text: str, *, concealed: Iterable[str] = (), public: str = "") -> str:
        """Clean one message: its first line, at most 400 characters of it.

        `concealed` goes wherever it stands, even inside a word; `public` (the request's id) may stay.
        """
        text = text.partition("\n")[0][: 4 * LONGEST]
        for value in sorted(concealed, key=len, reverse=True):
            text = text.replace(value, self.digest(value))
        for pattern, replacement in _RULES:
            text = pattern.sub(replacement, text)
        text = _NAMED_VALUE.sub(lambda found: found[1] + found[2] + self.digest(found[3]), text)
        text = _QUOTED.sub(self._quoted, text)
        return _WORD.sub(partial(self._word, public), text)[:LONGEST]

    def _quoted(self, found: re.Match[str]) -> str:
        inside = next(group for group in found.groups() if group is not None)
        kept = not inside or inside in _KNOWN or _DIGEST.fullmatch(inside)
        return found[0] if kept else self.digest(inside)

    def _word(self, public: str, found: re.Match[str]) -> str:
        word = found[0]
        core = word.strip(".,:!?")
        if not core or core == public or core in _KNOWN or _PLAIN.fullmatch(core):
            return word
        return word.replace(core, self.digest(core), 1)


def node_key(secret: str) -> bytes:
    """Derive the key of a node's digests from its token secret: one for every process, and of no other use.

    A node without one (its tokens are signed with public keys) has another key in each process.
    """
    if not secret:
        return secrets.token_bytes(32)
    return hmac.new(secret.encode(), b"derm-cds log digests", hashlib.sha256).digest()


#: Of one exception: how many of its causes are told, and how many of the innermost places of each.
_CHAIN, _FRAMES = 5, 12
_ROOT = str(Path(__file__).resolve().parents[1]) + "/"
_SERVER_FAULT = 500


def describe(error: BaseException, clean: Callable[[str], str]) -> list[dict[str, Any]]:
    """Describe an exception and what caused it, outermost first: `type`, `at` (innermost last), and our `text`."""
    described: list[dict[str, Any]] = []
    current: BaseException | None = error
    while current is not None and len(described) < _CHAIN:
        # Not `extract_tb`, which reads source lines: a literal in one of them may be anything.
        frames = list(traceback.walk_tb(current.__traceback__))[-_FRAMES:]
        told: dict[str, Any] = {
            "type": f"{type(current).__module__}.{type(current).__qualname__}".removeprefix("builtins."),
            "at": [
                f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames
            ],
        }
        if text := own_text(current):
            told["text"] = clean(text)
        described.append(told)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return described


def own_text(error: BaseException) -> str:
    """The text of an error of ours that tells of the service; one that tells of a request quotes its caller."""
    return str(error) if isinstance(error, DermError) and error.status >= _SERVER_FAULT else ""


def in_lines(described: list[dict[str, Any]]) -> str:
    """Write a description as lines, for a handler that knows no fields."""
    return "\n".join(
        f"{'caused by ' if number else ''}{told['type']}{': ' if told.get('text') else ''}{told.get('text', '')}"
        + "".join(f"\n  at {place}" for place in told["at"])
        for number, told in enumerate(described)
    )


def _short(path: str) -> str:
    if path.startswith(_ROOT) and "/site-packages/" not in path:
        return path.removeprefix(_ROOT)
    roots = [root for root in sys.path if root and path.startswith(f"{root}/")]
    return path.removeprefix(f"{max(roots, key=len)}/") if roots else path.rpartition("/")[2]


#: Fields an event may carry as `extra`. Any other is dropped and its name said.
FIELDS = frozenset(
    {
        *("assessment_id", "lesion_id", "image_id", "model_id", "embedding_space", "policy_version"),
        *("stage", "code", "status", "route", "method", "outcome", "invariant"),
        *("count", "bytes", "seconds", "latency_ms", "attempt", "port"),
        # Ray Serve adds these to its own records.
        *("application", "deployment", "replica", "component_name", "component_id", "component"),
        *("job_id", "worker_id", "node_id", "actor_id", "task_id"),
    }
)
#: Attributes that every record has, and those of Ray's that steer its handlers.
_SILENT = frozenset(
    {
        *vars(logging.makeLogRecord({})),
        *("message", "asctime", "taskName", "described"),
        *("serve_access_log", "log_to_stderr", "skip_context_filter", "request_id", "description"),
        *("_ray_timestamp_ns", "timestamp_ns", "actor_name", "task_name", "task_func_name", "color_message"),
    }
)
_LONGEST_VALUE = 128


def _is_data(value: object) -> bool:
    return isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__array__")


class CleanRecords(logging.Formatter):
    """A record factory: message, arguments and exception come out clean, whoever logs; and the form of its records.

    One JSON object a line: time (RFC 3339, UTC), level, logger, message, request_id, fields, exception.
    """

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
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
        error = exc_info[1] if isinstance(exc_info, tuple) else exc_info
        if isinstance(error, BaseException):
            record.described = described = describe(error, self._clean)
            record.exc_text = in_lines(described)
        return record

    def _message(self, msg: object, args: Any) -> str:  # noqa: ANN401
        if isinstance(msg, bytes | BaseException):
            return self._clean(self._argument(msg))
        text = str(msg)
        try:
            return self._clean(text % tuple(map(self._argument, args)) if args else text)
        except (TypeError, ValueError):
            return self._clean(text)

    def _argument(self, value: object) -> Any:  # noqa: ANN401
        """A positional argument; numbers stay numbers, for %d."""
        if isinstance(value, Number) or value is None:
            return value
        if isinstance(value, BaseException):
            text = own_text(value)
            return f"{type(value).__name__}{f', {text}' if text else ''}"
        return "[bytes]" if _is_data(value) else str(value)

    def _field(self, value: object) -> object:
        """The value of an allowed field: ids of ours, numbers and short names stay, anything else is a digest."""
        if value is None or (isinstance(value, bool | int | float) and math.isfinite(value)):
            return value
        if isinstance(value, float | UUID):
            return str(value)  # JSON has no word for infinity
        if _is_data(value):
            return "[bytes]"
        text, request = str(value), _request.get()
        concealed = request.concealed if request else ()
        if (
            isinstance(value, BaseException)
            or len(text) > _LONGEST_VALUE
            or any(word in text for word in concealed)
        ):
            return self._redactor.digest(text)
        return text.partition("\n")[0].partition("?")[0]

    def _request_id(self, record: logging.LogRecord) -> str | None:
        """The id of the request at hand; of Ray Serve's own records the caller's, a digest where it may name somebody."""
        if request := _request.get():
            return request.request_id
        sent = str(getattr(record, "request_id", None) or "")
        return (sent if is_opaque(sent) else self._redactor.digest(sent)) if sent else None

    def format(self, record: logging.LogRecord) -> str:
        """Write the record; a field that is not allowed is named in `dropped`, its value is not."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := self._request_id(record):
            line["request_id"] = request_id
        extra = {name: value for name, value in vars(record).items() if name not in _SILENT}
        line.update({name: self._field(value) for name, value in extra.items() if name in FIELDS})
        if dropped := sorted(extra.keys() - FIELDS):
            line["dropped"] = dropped
        if told := getattr(record, "described", None):
            line["exception"] = told
        return json.dumps(line, ensure_ascii=True, default=lambda _: REMOVED)

    def _clean(self, text: str) -> str:
        request = _request.get() or RequestContext("")
        return self._redactor.clean(text, concealed=request.concealed, public=request.request_id)


class ProcessLog(logging.Handler):
    """The log of this process: every record clean, everything on JSON lines.

    In a replica the lines go where Ray Serve writes (its file, its rotation); elsewhere to `stream`
    (standard error unless given). Without this, what our own modules and uvicorn say in a replica is lost:
    Serve takes standard error in at a level that it then does not write.
    """

    def __init__(self, key: bytes, *, stream: TextIO | None = None) -> None:
        super().__init__()
        self._records = CleanRecords(Redactor(key))
        self._stream = logging.StreamHandler(stream or sys.__stderr__)
        self._stream.setFormatter(self._records)

    @classmethod
    def of_node(cls, secret: SecretStr) -> Self:
        """The log of a replica: its digests of removed values are those of every replica that has this secret."""
        return cls(node_key(secret.get_secret_value()))

    def install(self) -> None:
        """Clean every record from now on, and write those of all loggers but Ray Serve's, which writes its own."""
        logging.setLogRecordFactory(self._records)
        root = logging.getLogger()
        root.addHandler(self)
        root.setLevel(logging.INFO)
        self._take_over()
        threading.excepthook = _on_dead_thread

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        for handler in self._take_over() or [self._stream]:
            handler.handle(record)

    def _take_over(self) -> list[logging.Handler]:
        """Have Serve's own lines in our form; again after each of its reconfigurations, which make new handlers."""
        handlers = logging.getLogger("ray.serve").handlers
        for handler in handlers:
            # Serve buffers: the handler that formats is behind one that keeps.
            target = getattr(handler, "target", None) or handler
            target.setFormatter(self._records)
        return handlers


def _on_dead_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        logging.getLogger("derm.logs").error("a thread died", exc_info=args.exc_value)
