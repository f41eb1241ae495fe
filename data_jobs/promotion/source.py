"""The file that a model comes in: taken whole, with its digest, before anything of it is parsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import hashlib
from http.client import HTTPException, HTTPMessage
import os
from pathlib import Path
import re
from typing import IO
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from data_jobs.promotion.refusal import ImportRefused

#: The largest network of timm's EfficientNet family is a quarter of this.
MAX_BYTES = 1 << 30
_HUB = "hf-hub:"
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?")
_TIMEOUT_S = 30
_BLOCK = 1 << 20
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A copy in our own folder, the SHA-256 of its bytes, and where it came from."""

    path: Path
    sha256: str
    origin: str


def take_source(source: str, sha256: str | None, folder: Path, *, max_bytes: int = MAX_BYTES) -> SourceFile:
    """Copy a local file, or download an https URL or `hf-hub:ORG/NAME[@REVISION]`, into `folder`.

    What comes over a network must have its SHA-256 stated beforehand. Raises ImportRefused for a
    digest that is missing or another, a file that is too large, or one that cannot be had; the
    copy is then removed.
    """
    remote = source.startswith(_HUB) or "://" in source
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256.lower()):
        raise ImportRefused("--sha256 takes 64 hex digits.")
    if remote and sha256 is None:
        raise ImportRefused(f"{source} comes over the network: state its SHA-256 with --sha256.")
    url = _hub_url(source) if source.startswith(_HUB) else source
    path = folder / "source.partial"
    try:
        with _download(url) if remote else Path(source).open("rb") as stream:
            digest = _copy(stream, path, source, max_bytes)
        _require_digest(source, digest, sha256)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return SourceFile(path.rename(folder / "source"), digest, source)


def _require_digest(source: str, found: str, stated: str | None) -> None:
    if stated is not None and found != stated.lower():
        raise ImportRefused(f"{source} has SHA-256 {found}, not {stated.lower()}: it is not that file.")


def _copy(stream: IO[bytes], path: Path, source: str, max_bytes: int) -> str:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as target:
        try:
            while block := stream.read(_BLOCK):
                size += len(block)
                if size > max_bytes:
                    raise ImportRefused(f"{source} is larger than {max_bytes} bytes.")
                digest.update(block)
                target.write(block)
        except (HTTPException, TimeoutError, ConnectionError) as error:
            raise ImportRefused(f"{source} broke off after {size} bytes: {error}.") from error
    return digest.hexdigest()


def _hub_url(source: str) -> str:
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB))
    if match is None:
        raise ImportRefused(f"{source} is not {_HUB}ORGANISATION/NAME or {_HUB}ORGANISATION/NAME@REVISION.")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    # Of a repository's files only this one: the others may be pickles.
    return f"{hub}/{match['name']}/resolve/{match['revision'] or 'main'}/model.safetensors"


class _CheckedRedirects(HTTPRedirectHandler):
    """A server may send us on, but only over the same kind of connection."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """As the base class's, after a look at the new address."""
        _require_safe(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _download(url: str) -> Iterator[IO[bytes]]:
    _require_safe(url)
    request = Request(url, headers={"User-Agent": "derm-cds"})  # noqa: S310 - `_require_safe` looked at it
    try:
        with build_opener(_CheckedRedirects).open(request, timeout=_TIMEOUT_S) as response:
            yield response
    except (URLError, TimeoutError) as error:
        raise ImportRefused(
            f"{url} cannot be had: {getattr(error, 'reason', error)}. On a machine without a network, bring the "
            "file over and give its path."
        ) from error


def _require_safe(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    raise ImportRefused(f"{url}: only https is taken.")
