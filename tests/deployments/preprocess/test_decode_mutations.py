"""Images whose bytes were changed at random: each is an image or a rejection, and none takes long."""

from __future__ import annotations

from collections import Counter
import io
from random import Random
from time import perf_counter

import numpy as np
from PIL import Image

from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from serve_app.domain.errors import RejectedUpload

COUNT = 2_000
HANG_S = 10.0


def seeds() -> list[bytes]:
    """Small images of every kind of encoding."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))
    ways = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": 0, "quality": 30}),
    ]
    found = []
    for mode in ("RGB", "L", "P", "RGBA", "CMYK"):
        for kind, options in ways:
            if (kind, mode) not in {("PNG", "CMYK"), ("JPEG", "P"), ("JPEG", "RGBA")}:
                buffer = io.BytesIO()
                picture.convert(mode).save(buffer, kind, **options)
                found.append(buffer.getvalue())
    return found


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
    dice, images, outcomes = Random(20261124), seeds(), Counter[str]()  # noqa: S311 - no secret
    geometry, limits = InputGeometry(64), UploadLimits(min_side=1)
    for _ in range(COUNT):
        image = mutate(dice.choice(images), dice.choice(images), dice)
        since = perf_counter()
        try:
            prepare_image(image, geometry, limits)
            outcomes["accepted"] += 1
        except RejectedUpload as rejection:
            outcomes[rejection.code] += 1
        assert perf_counter() - since < HANG_S
    # Both are tried: what is still a picture, and what is none any more.
    assert outcomes["accepted"] > COUNT / 50
    assert outcomes["undecodable_image"] > COUNT / 5
