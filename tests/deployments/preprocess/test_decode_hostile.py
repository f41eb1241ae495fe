"""Whatever a caller sends, it is an image or one of our four errors: fast, and in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
import struct
import subprocess
import sys
import textwrap
import time
import zlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from deployments.preprocess.decode import UploadLimits, decode_image
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from serve_app.domain.errors import (
    ImageTooSmall,
    TooLarge,
    UndecodableImage,
    UnsupportedImage,
)
from tests.images import encode

#: Images whose bytes are changed at random, and how long any may take, seconds.
MUTATED, HANG_S = 1_000, 2.0
REJECTIONS = (TooLarge, UnsupportedImage, ImageTooSmall, UndecodableImage)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def tally(images: Iterable[bytes], geometry: InputGeometry, limits: UploadLimits) -> Counter[str]:
    """How many were accepted, and rejected by which code; each in less than HANG_S."""
    outcomes: Counter[str] = Counter()
    for image in images:
        started = time.perf_counter()
        try:
            prepared = prepare_image(image, geometry, limits)
        except REJECTIONS as rejection:
            outcomes[rejection.code] += 1
        else:
            outcomes["accepted"] += 1
            assert prepared.pixels.shape == (geometry.side, geometry.side, 3)
        assert time.perf_counter() - started < HANG_S
    return outcomes


def test_every_corpus_file_is_an_image_or_one_of_our_errors(corpora_dir):
    paths = (path for path in sorted((corpora_dir / "images").rglob("*")) if path.is_file())
    outcomes = tally((path.read_bytes() for path in paths), InputGeometry(192), UploadLimits(min_side=1))
    assert outcomes.total() > 1000
    assert {"accepted", "unsupported_image", "undecodable_image"} <= set(outcomes), outcomes


def test_every_valid_file_of_pngsuite_is_accepted(corpora_dir):
    for path in sorted((corpora_dir / "images" / "pngsuite").glob("*.png")):
        # x marks a corrupt file; Pillow forgives a wrong checksum of the pixels (xcsn0g01).
        if not path.name.startswith("x"):
            assert decode_image(path.read_bytes(), UploadLimits(min_side=1)).image.mode == "RGB", path.name


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 1), (40_000_001, 1), (6325, 6325)])
def test_a_pixel_bomb_is_refused_by_its_header(size):
    files = [png_claiming(*size)]
    if max(size) < 2**16:  # a JPEG's sides have two bytes each
        jpeg = SAMPLES["JPEG"]
        at = jpeg.index(b"\xff\xc0")
        files.append(jpeg[: at + 5] + struct.pack(">HH", *size) + jpeg[at + 9 :])
    for data in files:
        started = time.perf_counter()
        with pytest.raises(TooLarge):
            decode_image(data, UploadLimits(min_side=1))
        assert time.perf_counter() - started < 0.1


def test_a_text_bomb_is_refused():
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 80_000_000, 1))
    with pytest.raises(UndecodableImage):
        decode_image(png_claiming(300, 300, bomb), UploadLimits())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_image_is_undecodable(lesion, kind, share):
    data = encode(lesion(600, 480), kind)
    for target in (None, 96):
        with pytest.raises(UndecodableImage):
            decode_image(data[: int(share * len(data))], UploadLimits(), target_side=target)


def _sample(kind: str) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010E] = "a description"
    image = Image.radial_gradient("L").resize((40, 32)).convert("RGB")
    return encode(image, kind, exif=tags, icc_profile=b"\0" * 128)


EXIF = b"Exif\0\0II*\0\x08\0\0\0"
SAMPLES = {kind: _sample(kind) for kind in ("JPEG", "PNG")}


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from([b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"iTXt", b"zTXt", b"acTL", b"fcTL", b"pHYs"]),
    body=st.binary(max_size=64),
)
def test_any_chunk_with_a_right_checksum_raises_nothing_else(kind, body):
    sample = SAMPLES["PNG"]
    _accept_or_reject(sample[:33] + chunk(kind, body) + sample[33:])


@settings(max_examples=100, deadline=None)
@given(
    marker=st.integers(0xE0, 0xEF),
    body=st.binary(max_size=64),
    start=st.sampled_from([b"", EXIF, b"MPF\0II*\0\x08\0\0\0", b"Adobe\0", b"ICC_PROFILE\0"]),
)
def test_any_application_segment_raises_nothing_else(marker, body, start):
    sample = SAMPLES["JPEG"]
    body = start + body
    _accept_or_reject(
        sample[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body + sample[2:]
    )


def _accept_or_reject(data: bytes) -> None:
    tally([data], InputGeometry(32), UploadLimits(max_pixels=4_000_000, min_side=1))


def seeds() -> list[bytes]:
    """Small images of every kind of encoding."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))
    ways = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": 0, "quality": 30}),
    ]
    return [
        encode(picture.convert(mode), kind, **options)
        for mode in ("RGB", "L", "P", "RGBA", "CMYK")
        for kind, options in ways
        if (kind, mode) not in {("PNG", "CMYK"), ("JPEG", "P"), ("JPEG", "RGBA")}
    ]


def mutate(image: bytes, other: bytes, dice: Random) -> bytes:
    """Change some bytes, or cut, remove, repeat, insert or join a run of them."""
    data = bytearray(image)
    start = dice.randrange(len(data))
    end = min(len(data), start + dice.choice((1, 4, 64, 1024)))
    match dice.randrange(6):
        case 0:
            for _ in range(dice.choice((1, 3, 30))):
                data[dice.randrange(len(data))] = dice.choice((0, 0xFF, dice.randrange(256)))
        case 1:
            del data[start:]
        case 2:
            del data[start:end]
        case 3:
            data[start:start] = data[start:end]
        case 4:
            data[start:start] = dice.randbytes(end - start)
        case _:
            data[start:] = other[dice.randrange(len(other)) :]
    return bytes(data)


def test_mutated_images_are_images_or_rejections() -> None:
    dice, images = Random(20261124), [*seeds(), *SAMPLES.values()]  # noqa: S311 - no secret
    mutated = (mutate(dice.choice(images), dice.choice(images), dice) for _ in range(MUTATED))
    outcomes = tally(mutated, InputGeometry(64), UploadLimits(min_side=1))
    # Both are tried: what is still a picture, and what is none any more.
    assert outcomes["accepted"] > MUTATED / 50
    assert outcomes["undecodable_image"] > MUTATED / 5


THREADS = """
    from concurrent.futures import ThreadPoolExecutor
    import sys, warnings
    from deployments.preprocess.decode import UploadLimits, decode_image
    data = open(sys.argv[1], "rb").read()
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: decode_image(data, UploadLimits(min_side=1)), range(200)))
    assert warnings.filters == before
    warnings.warn("ours is still heard", stacklevel=1)
"""


def test_threads_hear_nothing_of_broken_metadata_and_everything_else(tmp_path):
    """What one decoder does must not change the warnings that another goes by."""
    entry = b"\x0e\x01\x02\x00\xff\xff\x00\x00\xff\xff\xff\x00"  # points behind the end of the data
    exif = EXIF + b"\x01\0" + entry + b"\0\0\0\0"
    Image.radial_gradient("L").resize((60, 48)).convert("RGB").save(tmp_path / "image", "JPEG", exif=exif)
    done = program(THREADS, tmp_path / "image")
    assert "ours is still heard" in done.stderr
    assert done.stderr.count("Warning") == 1, done.stderr


def program(code: str, image: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which the image's path is given to."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(image)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


MEMORY = """
    import resource, sys
    from deployments.preprocess.decode import UploadLimits
    from deployments.preprocess.preprocess import prepare_image
    from deployments.preprocess.pixels import InputGeometry
    data = open(sys.argv[1], "rb").read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare_image(data, InputGeometry(192), UploadLimits())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("mode", "kind", "most"),
    [("RGB", "PNG", 220), ("RGBA", "PNG", 380), ("P", "PNG", 420), ("RGB", "JPEG", 60)],
)
def test_forty_megapixels_stay_in_bounded_memory(tmp_path, mode, kind, most):
    """MiB above the start, in a process of its own; an RGBA of that size is 153 MiB of pixels."""
    path = tmp_path / "large"
    image = Image.linear_gradient("L").resize((8000, 5000), Image.Resampling.NEAREST)
    options = {"transparency": 3} if mode == "P" else {}
    image.convert(mode).save(path, kind, **({"compress_level": 1} | options if kind == "PNG" else {}))
    del image
    assert float(program(MEMORY, path).stdout) < most
