"""The file that a model comes in: taken whole, with its digest, before anything of it is parsed, and what it then is."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from contextlib import contextmanager
from dataclasses import dataclass
import hashlib
import json
import os
from pathlib import Path
import re
import struct
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from data_jobs.promotion.candidate import ImportRefused

FileKind = Literal["onnx", "safetensors", "checkpoint"]

#: As in the reference implementation of safetensors.
_MAX_HEADER = 100_000_000


def sniff_kind(path: Path) -> FileKind:
    """Tell safetensors, a torch archive and ONNX apart; ImportRefused for a pickle or anything else.

    A torch archive holds a pickle: it is read, with `weights_only`, only when it is our own.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        return "checkpoint"
    if head[:1] == b"\x80":
        raise ImportRefused(
            f"{path.name} is a pickle: it would run whatever its author wrote. Have it as safetensors."
        )
    if head[8:9] == b"{":
        read_safetensors_header(path)
        return "safetensors"
    # ONNX is a ModelProto, which begins with ir_version: field 1, a varint.
    if head[:1] == b"\x08":
        return "onnx"
    raise ImportRefused(f"{path.name} is neither ONNX nor safetensors.")


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read the names, types and shapes of the tensors, and `__metadata__`; ImportRefused when it is broken."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_HEADER, size - 8):
            raise ImportRefused(
                f"{path.name} is no whole safetensors file: its header is longer than the file."
            )
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ImportRefused(f"{path.name} has a broken safetensors header.") from error
    if 8 + length + max(ends, default=0) != size:
        raise ImportRefused(f"{path.name} is cut short, or longer than its header says.")
    found: dict[str, Any] = header
    return found


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
        with _download(url) if remote else _read(Path(source)) as blocks:
            digest = _copy(blocks, path, source, max_bytes)
        _require_digest(source, digest, sha256)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return SourceFile(path.rename(folder / "source"), digest, source)


def _require_digest(source: str, found: str, stated: str | None) -> None:
    if stated is not None and found != stated.lower():
        raise ImportRefused(f"{source} has SHA-256 {found}, not {stated.lower()}: it is not that file.")


def _copy(blocks: Iterator[bytes], path: Path, source: str, max_bytes: int) -> str:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as target:
        try:
            for block in blocks:
                size += len(block)
                if size > max_bytes:
                    raise ImportRefused(f"{source} is larger than {max_bytes} bytes.")
                digest.update(block)
                target.write(block)
        except httpx.HTTPError as error:
            raise ImportRefused(f"{source} broke off after {size} bytes: {error}.") from error
    return digest.hexdigest()


@contextmanager
def _read(path: Path) -> Iterator[Iterator[bytes]]:
    with path.open("rb") as file:
        yield iter(lambda: file.read(_BLOCK), b"")


def _hub_url(source: str) -> str:
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB))
    if match is None:
        raise ImportRefused(f"{source} is not {_HUB}ORGANISATION/NAME or {_HUB}ORGANISATION/NAME@REVISION.")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    # Of a repository's files only this one: the others may be pickles.
    return f"{hub}/{match['name']}/resolve/{match['revision'] or 'main'}/model.safetensors"


@contextmanager
def _download(url: str) -> Iterator[Iterator[bytes]]:
    with httpx.Client(
        follow_redirects=True,
        timeout=_TIMEOUT_S,
        headers={"User-Agent": "derm-cds", "Accept-Encoding": "identity"},
        # Asked of every redirection, too.
        event_hooks={"request": [lambda request: _require_safe(str(request.url))]},
    ) as client:
        try:
            response = client.send(client.build_request("GET", url), stream=True)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise ImportRefused(
                f"{url} cannot be had: {error}. On a machine without a network, bring the file over and give its path."
            ) from error
        with contextlib.closing(response):
            yield response.iter_raw(_BLOCK)


def _require_safe(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    raise ImportRefused(f"{url}: only https is taken.")
