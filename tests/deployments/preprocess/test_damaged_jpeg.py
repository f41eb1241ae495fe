"""A JPEG of which data are missing is not taken for a whole one."""

from __future__ import annotations

import random

from PIL import Image, ImageFilter
import pytest

from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from serve_app.domain.errors import UndecodableImage

KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "optimised": {"optimize": True, "subsampling": 0},
}


def damage(data: bytes) -> float | None:
    """What the file lacks; None for one that is rejected."""
    try:
        return prepare_image(data, InputGeometry(176), UploadLimits()).quality.damaged
    except UndecodableImage:
        return None


@pytest.fixture(scope="module")
def jpegs(lesion, encode) -> dict[str, bytes]:
    noise = Image.effect_noise((600, 450), 30).filter(ImageFilter.GaussianBlur(1))
    picture = Image.blend(lesion(600, 450), noise.convert("RGB"), 0.3)
    return {kind: encode(picture, "JPEG", quality=85, **options) for kind, options in KINDS.items()} | {
        "grey": encode(picture.convert("L"), "JPEG", quality=85),
        "cmyk": encode(picture.convert("CMYK"), "JPEG", quality=85),
    }


def scan_of(data: bytes) -> int:
    return data.index(b"\xff\xda") + 2 + 12


@pytest.mark.parametrize("kind", [*KINDS, "grey", "cmyk"])
def test_what_is_cut_off_behind_an_end_marker_is_missed(jpegs, kind):
    data = jpegs[kind]
    start, end = scan_of(data), len(data) - 2
    assert damage(data) == 0.0
    for share in (0.95, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03, 0.01):
        found = damage(data[: end - int(share * (end - start))] + b"\xff\xd9")
        # A progressive file that was cut short is whole, but coarse, until most of it is gone.
        if share >= (0.8 if kind == "progressive" else 0.2):
            assert found is None, share
        elif share <= 0.01:
            assert found is not None
        assert found is None or found > 0, share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["removed", "zeroed", "random"])
def test_what_is_broken_in_the_middle_is_noticed(jpegs, kind, how):
    data, rng = jpegs[kind], random.Random(kind + how)  # noqa: S311
    start, end = scan_of(data), len(data) - 2
    for share in (0.5, 0.2):
        length = int(share * (end - start))
        at = start + (end - start - length) // 2
        filling = {
            "removed": b"",
            "zeroed": bytes(length),
            "random": rng.randbytes(length).replace(b"\xff", b""),
        }
        found = damage(data[:at] + filling[how] + data[at + length :])
        assert found is None or found > 0, share


def test_scans_that_never_came_are_missed(jpegs):
    data = jpegs["progressive"]
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(starts) == 10
    # Before each scan come its tables.
    found = [damage(data[: data.rindex(b"\xff\xc4", 0, start)] + b"\xff\xd9") for start in starts[1:]]
    assert found[:3] == [None] * 3, "no detail of the luma at all"
    assert all(share is None or share > 0 for share in found)
    assert found[-1] is not None
    assert damage(data[:-2] + data[starts[-1] :]), "one scan twice: whether it is damaged cannot be told"


def test_a_harmless_fault_of_the_metadata_is_none_of_the_picture(jpegs):
    data = jpegs["baseline"]
    odd_revision = data[:11] + b"\x09" + data[12:]
    junk = data[:2] + b"\xff\xfe\x00\x04ab" + b"junk" + data[2:]
    for harmless in (odd_revision, junk, data + b"\0" * 500):
        assert damage(harmless) == 0.0
    # And it does not hide what is one.
    end = len(data) - 2
    assert damage(odd_revision[: end - (end - scan_of(data)) // 2] + b"\xff\xd9") is None


def test_the_share_is_stated_to_who_sent_it(jpegs):
    data = jpegs["baseline"]
    cut = data[: scan_of(data) + (len(data) - scan_of(data)) // 2] + b"\xff\xd9"
    with pytest.raises(UndecodableImage, match=r"about [45]\d% of the picture is missing"):
        prepare_image(cut, InputGeometry(176), UploadLimits())


def test_camera_originals_are_whole_and_their_halves_are_not(isic_dir):
    for path in sorted((isic_dir / "uploads").glob("*.jpg")):
        data = path.read_bytes()
        assert damage(data) == 0.0, path.name
        assert damage(data[: (len(data) + data.rindex(b"\xff\xda")) // 2] + b"\xff\xd9") != 0.0, path.name


def test_the_file_that_was_answered_as_whole(failing_dir):
    assert damage((failing_dir / "pub-06-damaged-cut60.jpg").read_bytes()) is None
