"""One image from its source to its file: whole, a JPEG that the service reads, and only then under its name."""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
from pathlib import Path

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.references.fetch.errors import Refused, Transient
from data_jobs.references.fetch.retry import Pace
from data_jobs.references.fetch.source import Source
from deployments.preprocess.decode import decode_image, sniff_content_type
from serve_app.domain.errors import ImageTooSmall, RejectedUpload, TooLarge

PARTIAL = ".partial"
# Decoded small: every byte of the picture is gone through all the same.
_CHECK_SIDE = 224


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A file that was checked: `bytes` and `sha256` (hex) are its own."""

    isic_id: str
    bytes: int
    sha256: str


def store_image(source: Source, isic_id: str, file: Path, pace: Pace) -> StoredImage:
    """Fetch one image, in one attempt. Raises Transient, Refused, or Stopped; OSError when it can not be written.

    It is written beside its place and renamed when whole. Not flushed to the disk: what a power cut
    damages is found by its digest when the fetch is run again.
    """
    partial = file.with_name(file.name + PARTIAL)
    data = bytearray()
    try:
        with source.open(isic_id) as body, partial.open("wb") as written:
            for chunk in body.chunks:
                pace.step()
                data += chunk
                if len(data) > ARCHIVE_LIMITS.max_bytes:
                    raise Refused(f"{isic_id} has more than {ARCHIVE_LIMITS.max_bytes} bytes.", "too large")
                written.write(chunk)
        if body.length not in {None, len(data)}:
            raise Transient(f"{isic_id}: {len(data)} bytes came, not {body.length}.", "wrong length")
        check_jpeg(isic_id, bytes(data))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return StoredImage(isic_id, len(data), hashlib.sha256(data).hexdigest())


def is_stored(image: StoredImage, file: Path) -> bool:
    """Whether the file still is what it was when it was checked."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return len(data) == image.bytes and hashlib.sha256(data).hexdigest() == image.sha256


def check_jpeg(isic_id: str, data: bytes) -> None:
    """Raise Transient for what is no whole JPEG, Refused for one that the service would not take."""
    try:
        if sniff_content_type(data) != "image/jpeg":
            # An error page of something on the way, mostly: worth another attempt.
            raise Transient(f"{isic_id} came as something that is no JPEG.", "no JPEG")
        decode_image(data, ARCHIVE_LIMITS, target_side=_CHECK_SIDE)
    except (TooLarge, ImageTooSmall) as error:
        raise Refused(f"{isic_id}: {error}", type(error).code) from error
    except RejectedUpload as error:
        raise Transient(f"{isic_id}: {error}", "no whole JPEG") from error
