"""Taking patients, images and secrets out of text that is to be logged.

Words stay, values go. What is not plainly a word of a message (an id, a number long enough to be one, a
quoted string, a query string, bytes, a token, the text of an exception) is removed, or replaced by a keyed
digest: equal values look equal on every line of a node, and nobody without its key can try names against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import hashlib
import hmac
import re
import secrets

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
