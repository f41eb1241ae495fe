"""Log records that are clean before any handler sees them, and their form as JSON lines.

The cleaning is in the record factory, not in a filter or formatter: Ray Serve, uvicorn and asyncio bring
handlers of their own, and put new ones in place whenever they are reconfigured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
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


REMOVED = "[removed]"
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
)
#: An exception's text quotes what it stumbled over; its type says what happened.
_EXCEPTION_TEXT = re.compile(r"\b([A-Za-z_.]*(?:Error|Exception|Timeout|Disconnect))\b\s*[:(].*", re.DOTALL)
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
    """
)
_TRIM = ".,:!?"


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
        text = _EXCEPTION_TEXT.sub(r"\1", text)
        text = _NAMED_VALUE.sub(lambda found: found[1] + found[2] + self.digest(found[3]), text)
        text = _QUOTED.sub(self._quoted, text)
        return _WORD.sub(self._word(public), text)[:LONGEST]

    def _quoted(self, found: re.Match[str]) -> str:
        inside = next(group for group in found.groups() if group is not None)
        kept = not inside or inside in _KNOWN or re.fullmatch(r"#[0-9a-f]{12}", inside)
        return found[0] if kept else self.digest(inside)

    def _word(self, public: str) -> Callable[[re.Match[str]], str]:
        def judge(found: re.Match[str]) -> str:
            word = found[0]
            core = word.strip(_TRIM)
            if not core or core == public or core in _KNOWN or _PLAIN.fullmatch(core) or _is_digest(core):
                return word
            if not any(character.isalnum() for character in core):
                return word  # punctuation
            return word.replace(core, self.digest(core), 1)

        return judge


def _is_digest(word: str) -> bool:
    return re.fullmatch(r"(?:[\w.-]*[-_./:])?#[0-9a-f]{12}.{0,3}", word) is not None


def node_key(secret: str) -> bytes:
    """Derive the key of a node's digests from its token secret: one for every process, and of no other use.

    A node without one (its tokens are signed with public keys) has another key in each process.
    """
    if not secret:
        return secrets.token_bytes(32)
    return hmac.new(secret.encode(), b"derm-cds log digests", hashlib.sha256).digest()


_CHAIN = 5
_FRAMES = 12
_ROOT = str(Path(__file__).resolve().parents[1]) + "/"
_SERVER_FAULT = 500


def describe(error: BaseException) -> list[dict[str, Any]]:
    """Describe an exception and what caused it, outermost first: `type`, `at` (innermost last), and our `text`."""
    described: list[dict[str, Any]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(described) < _CHAIN:
        seen.add(id(current))
        told: dict[str, Any] = {"type": _name(type(current)), "at": _places(current)}
        if text := own_text(current):
            told["text"] = text
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


def _name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _places(error: BaseException) -> list[str]:
    # Not `extract_tb`, which reads source lines: a literal in one of them may be anything.
    frames = list(traceback.walk_tb(error.__traceback__))[-_FRAMES:]
    return [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames]


def _short(path: str) -> str:
    if path.startswith(_ROOT) and "/site-packages/" not in path:
        return path.removeprefix(_ROOT)
    for root in sorted(sys.path, key=len, reverse=True):
        if root and path.startswith(f"{root}/"):
            return path.removeprefix(f"{root}/")
    return path.rpartition("/")[2]


#: Shorter values are numbers, sexes and sites; replacing them would tear every other word apart.
_SHORTEST = 4


@dataclass(slots=True)
class RequestContext:
    """One request: the id on its log lines, and the caller's own words, which are on none."""

    request_id: str
    concealed: set[str] = field(default_factory=set)


_current: ContextVar[RequestContext | None] = ContextVar("derm_request", default=None)


def begin_request(request_id: str, concealed: Iterable[str] = ()) -> None:
    """Have the log know of a request, in this task and all that it starts."""
    _current.set(RequestContext(request_id))
    conceal(*concealed)


def end_request() -> None:
    """Have the log forget it."""
    _current.set(None)


def conceal(*values: str | None) -> None:
    """Keep what a caller sent (ids, file names, tokens) out of every log line of the request at hand."""
    request = _current.get()
    if request is not None:
        request.concealed.update(value for value in values if value and len(value) >= _SHORTEST)


def current_request() -> RequestContext | None:
    """The request that this task or thread works for, if any."""
    return _current.get()


_SERVE = "ray.serve"
_log = logging.getLogger("derm.logs")


class ProcessLog:
    """The log of this process: every record clean, everything on JSON lines.

    In a replica the lines go where Ray Serve writes (its file, its rotation); elsewhere to `stream`
    (standard error unless given). Without this, what our own modules and uvicorn say in a replica is lost:
    Serve takes standard error in at a level that it then does not write.
    """

    def __init__(self, key: bytes, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
        self._records = CleanRecords(Redactor(key))
        self._formatter = JsonLines(self._records)
        self._handler = _ToServe(self._formatter, logging.StreamHandler(stream or sys.__stderr__))
        self._level = level
        self._undo: list[Callable[[], object]] = []

    @classmethod
    def of_node(cls, secret: SecretStr) -> Self:
        """The log of a replica: its digests of removed values are those of every replica that has this secret."""
        return cls(node_key(secret.get_secret_value()))

    def install(self) -> None:
        """Clean every record from now on, and write those of all loggers but Ray Serve's, which writes its own."""
        root, factory = logging.getLogger(), logging.getLogRecordFactory()
        level, hook = root.level, threading.excepthook
        self._undo = [
            lambda: logging.setLogRecordFactory(factory),
            lambda: root.removeHandler(self._handler),
            lambda: root.setLevel(level),
            lambda: setattr(threading, "excepthook", hook),
        ]
        logging.setLogRecordFactory(self._records)
        root.addHandler(self._handler)
        root.setLevel(self._level)
        self._handler.take_over()
        threading.excepthook = _on_dead_thread

    def remove(self) -> None:
        """Put everything back as it was: for tests."""
        for step in self._undo:
            step()
        self._undo = []


class _ToServe(logging.Handler):
    """Hands records to the handlers of Ray Serve's logger, as long as it has any; else to a stream."""

    def __init__(self, formatter: logging.Formatter, stream: logging.Handler) -> None:
        super().__init__()
        self._formatter, self._stream = formatter, stream
        stream.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        handlers = self.take_over()
        for handler in handlers or [self._stream]:
            handler.handle(record)

    def take_over(self) -> list[logging.Handler]:
        """Have Serve's own lines in our form; again after each of its reconfigurations, which make new handlers."""
        handlers = logging.getLogger(_SERVE).handlers
        for handler in handlers:
            # Serve buffers: the handler that formats is behind one that keeps.
            target = getattr(handler, "target", None) or handler
            if target.formatter is not self._formatter:
                target.setFormatter(self._formatter)
        return handlers


def _on_dead_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _log.error("a thread died", exc_info=args.exc_value)
