"""Setting up the log of a process that serves: once, before its first request."""

from __future__ import annotations

from collections.abc import Callable
import logging
import sys
import threading
from typing import Self, TextIO

from pydantic import SecretStr

from serve_app.logs.privacy import Redactor, node_key
from serve_app.logs.records import CleanRecords, JsonLines

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
