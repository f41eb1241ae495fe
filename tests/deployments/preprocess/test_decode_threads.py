"""Decoders run in threads: what one of them does must not change what another goes by."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
import io
import subprocess
import sys
import textwrap
import warnings

from PIL import Image
import pytest

from deployments.preprocess.decode import UploadLimits, decode_image
from serve_app.domain.errors import UndecodableImage

LIMITS = UploadLimits(min_side=1)
THREADS = 8


@pytest.fixture(scope="module")
def broken_metadata() -> bytes:
    """A good photograph whose EXIF makes Pillow warn: an entry that points behind the end of the data."""
    picture = Image.radial_gradient("L").resize((60, 48)).convert("RGB")
    entry = b"\x0e\x01\x02\x00\xff\xff\x00\x00\xff\xff\xff\x00"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_pillow_does_warn_of_it(broken_metadata) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(broken_metadata)).getexif().get(0x0112)
    assert any(issubclass(warning.category, UserWarning) for warning in seen)


def test_eight_threads_leave_the_filters_as_they_were(broken_metadata) -> None:
    before, shown = list(warnings.filters), warnings.showwarning
    cut = broken_metadata[: len(broken_metadata) // 2]

    def decode(turn: int) -> str:
        try:
            return decode_image(cut if turn % 3 == 0 else broken_metadata, LIMITS, target_side=16).image.mode
        except UndecodableImage:
            return "undecodable"

    with ThreadPoolExecutor(THREADS) as threads:
        outcomes = list(threads.map(decode, range(60 * THREADS)))
    assert outcomes == ["undecodable" if turn % 3 == 0 else "RGB" for turn in range(60 * THREADS)]
    assert warnings.filters == before
    assert warnings.showwarning is shown


PROGRAM = """
    from concurrent.futures import ThreadPoolExecutor
    import sys, warnings
    from deployments.preprocess.decode import UploadLimits, decode_image
    data = open(sys.argv[1], "rb").read()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: decode_image(data, UploadLimits(min_side=1)), range(200)))
    warnings.warn("ours is still heard", stacklevel=1)
"""


def test_a_process_hears_nothing_of_broken_metadata_and_everything_else(broken_metadata, tmp_path) -> None:
    path = tmp_path / "image"
    path.write_bytes(broken_metadata)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ours is still heard" in done.stderr
    assert done.stderr.count("Warning") == 1, done.stderr
