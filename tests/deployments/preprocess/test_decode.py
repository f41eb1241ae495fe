"""What comes out of every kind of JPEG and PNG a camera or a PMS may send."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
import pytest

from deployments.preprocess.decode import UploadLimits, decode_image, sniff_content_type
from deployments.preprocess.preprocess import prepare_image
from deployments.preprocess.resize import InputGeometry
from serve_app.domain.errors import ImageTooSmall, TooLarge, UnsupportedImage

LIMITS = UploadLimits()
TARGET = 96

# What a camera held that way stores, for each EXIF orientation: the inverse of what makes it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def decode(data: bytes, target_side: int | None = None) -> Image.Image:
    return decode_image(data, LIMITS, target_side=target_side).image


def exif(orientation: object) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("target", [None, TARGET])
def test_png_comes_upright_in_all_eight_orientations(lesion, encode, orientation, target):
    # 768 and 576 are whole multiples of the reduction, so that pixels are equal and not just close.
    upright = lesion(768, 576)
    how = STORED[orientation]
    stored = upright if how is None else upright.transpose(how)
    data = encode(stored, "PNG", exif=exif(orientation), compress_level=1)
    decoded = decode_image(data, LIMITS, target_side=target)
    expected = decode_image(encode(upright, "PNG", compress_level=1), LIMITS, target_side=target)
    assert (decoded.width, decoded.height) == (768, 576)
    assert decoded.extent == expected.extent == (0, 0, *decoded.image.size)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(expected.image))


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_reduction_with_a_rest_does_not_shift_the_picture(lesion, encode, difference, orientation, kind):
    upright = lesion(2049, 1537)
    how = STORED[orientation]
    stored = upright if how is None else upright.transpose(how)
    options = {"quality": 95} if kind == "JPEG" else {"compress_level": 1}
    prepared = prepare_image(
        encode(stored, kind, exif=exif(orientation), **options), InputGeometry(TARGET), LIMITS
    )
    expected = upright.resize((TARGET, TARGET), Image.Resampling.BICUBIC)
    assert (prepared.width, prepared.height) == (2049, 1537)
    assert difference(Image.fromarray(prepared.pixels), expected) < 1.0


@pytest.mark.parametrize("orientation", STORED)
def test_jpeg_comes_upright_in_all_eight_orientations(lesion, encode, difference, orientation):
    upright = lesion(768, 576)
    how = STORED[orientation]
    stored = upright if how is None else upright.transpose(how)
    data = encode(stored, "JPEG", quality=95, exif=exif(orientation))
    assert difference(decode(data), upright) < 1.5


@pytest.mark.parametrize("picture", ["Landscape", "Portrait"])
def test_orientation_corpus_comes_upright(corpora_dir, difference, picture):
    folder = corpora_dir / "images" / "exif"
    limits = UploadLimits(min_side=1)
    first, *others = (
        prepare_image((folder / f"{picture}_{i}.jpg").read_bytes(), InputGeometry(224), limits)
        for i in range(1, 9)
    )
    for other in others:
        assert (other.width, other.height) == (first.width, first.height)
        assert difference(Image.fromarray(other.pixels), Image.fromarray(first.pixels)) < 3.0


@pytest.mark.parametrize("orientation", [0, 9, 4242])
def test_an_orientation_that_is_none_is_ignored(lesion, encode, orientation):
    data = encode(lesion(300, 240), "JPEG", exif=exif(orientation))
    decoded = decode_image(data, LIMITS)
    assert (decoded.width, decoded.height) == (300, 240) == decoded.image.size


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"garbage",
        b"II*\x00",
        b"II*\x00\xff\xff\xff\xff",
        b"MM\x00*\x00\x00\x00\x08\xff\xff" + b"\xff" * 40,
    ],
)
def test_broken_exif_does_not_cost_a_good_photograph(lesion, encode, junk):
    for kind in ("JPEG", "PNG"):
        data = encode(lesion(300, 240), kind, exif=b"Exif\x00\x00" + junk)
        assert decode(data).size == (300, 240)


def test_content_decides_the_type():
    assert sniff_content_type(b"\xff\xd8\xff\xe0") == "image/jpeg"
    assert sniff_content_type(b"\x89PNG\r\n\x1a\n") == "image/png"
    for data in (b"", b"\xff\xd8", b"GIF89a", b"BM", b"RIFF\x00\x00\x00\x00WEBP", b"%PDF-1.7", b"\x89PNG"):
        with pytest.raises(UnsupportedImage):
            sniff_content_type(data)


def test_a_name_means_nothing(tmp_path, lesion):
    path = tmp_path / "lesion.png"
    lesion(300, 240).save(path, "JPEG")
    assert prepare_image(path.read_bytes(), InputGeometry(TARGET), LIMITS).content_type == "image/jpeg"


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_unsupported(lesion, encode, kind):
    with pytest.raises(UnsupportedImage):
        decode_image(encode(lesion(300, 240), kind), LIMITS)


def test_a_phone_photograph_with_a_second_picture_inside_decodes(lesion, encode, difference):
    picture = lesion(300, 240)
    data = encode(picture, "MPO", save_all=True, append_images=[lesion(60, 48)])
    assert difference(decode(data), picture) < 3.0


@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_modes(lesion, encode, difference, mode, target):
    picture = lesion(480, 384)
    data = encode(picture.quantize(256) if mode == "P" else picture.convert(mode), "PNG")
    decoded = decode(data, target)
    grey = mode in {"1", "L", "LA"}
    like = decode(encode(picture.convert("L").convert("RGB") if grey else picture, "PNG"), target)
    assert decoded.mode == "RGB"
    # Dithered black and white, and a palette of 256, are only near.
    assert difference(decoded, like) < (150 if mode == "1" else 12 if mode == "P" else 0.01)


@pytest.mark.parametrize("kind", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes(lesion, encode, difference, kind, progressive):
    picture = lesion(480, 384)
    data = encode(picture.convert(kind), "JPEG", quality=95, progressive=progressive)
    expected = picture.convert("L").convert("RGB") if kind == "L" else picture
    assert difference(decode(data), expected) < 3.0
    assert decode(data, TARGET).mode == "RGB"


@pytest.mark.parametrize("target", [None, TARGET])
def test_sixteen_bits_of_grey_keep_their_range(encode, target):
    ramp = np.tile(np.linspace(0, 65535, 512).astype(np.uint16), (400, 1))
    decoded = np.asarray(decode(encode(Image.fromarray(ramp), "PNG"), target))
    across = decoded.mean(axis=(0, 2))
    assert across[0] < 3
    assert across[-1] > 252
    assert abs(across[len(across) // 2] - 127.5) < 3


def test_sixteen_bits_of_grey_with_a_transparent_one(corpora_dir):
    # PngSuite: 16 bits of grey, white is transparent. Through Pillow's RGBA it would clip to white.
    data = (corpora_dir / "images" / "pngsuite" / "tbwn0g16.png").read_bytes()
    decoded = np.asarray(decode_image(data, UploadLimits(min_side=1)).image)
    words = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decoded[..., 0], (words >> 8).astype(np.uint8))


@pytest.mark.parametrize("target", [None, TARGET])
def test_transparency_is_laid_on_white(encode, target):
    size = (400, 400)
    palette = Image.new("P", size, 3)
    palette.putpalette(list(range(12)))
    cases = [
        encode(Image.new("RGBA", size, (10, 20, 30, 0)), "PNG"),
        encode(Image.new("LA", size, (10, 0)), "PNG"),
        encode(palette, "PNG", transparency=3),
        encode(palette, "PNG", transparency=b"\xff\xff\xff\x00"),
        encode(Image.new("RGB", size, (10, 20, 30)), "PNG", transparency=(10, 20, 30)),
        encode(Image.new("L", size, 10), "PNG", transparency=10),
        encode(Image.new("1", size, 0), "PNG", transparency=0),
    ]
    for data in cases:
        assert np.asarray(decode(data, target)).min() == 255


def test_metadata_is_dropped(lesion, encode):
    tags = exif(1)
    tags[0x010E] = "patient name"
    data = encode(
        lesion(300, 240), "JPEG", exif=tags, comment=b"patient name", icc_profile=b"patient name" * 20
    )
    decoded = decode(data)
    assert decoded.info == {}
    assert set(vars(decoded)) == set(vars(Image.new("RGB", (1, 1))))
    assert not decoded.getexif()
    assert b"patient name" not in encode(decoded, "PNG") + encode(decoded, "JPEG")


def test_size_limits_are_inclusive(lesion, encode):
    data = encode(lesion(300, 240), "PNG")
    assert decode_image(data, UploadLimits(len(data), 300 * 240, 240)).image.size == (300, 240)
    with pytest.raises(TooLarge):
        decode_image(data, UploadLimits(len(data) - 1, 300 * 240, 240))
    with pytest.raises(TooLarge):
        decode_image(data, UploadLimits(len(data), 300 * 240 - 1, 240))
    with pytest.raises(ImageTooSmall):
        decode_image(data, UploadLimits(len(data), 300 * 240, 241))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_images_give_whole_pixels_where_they_are_allowed(encode, size):
    prepared = prepare_image(
        encode(Image.new("RGB", size, (90, 60, 50)), "PNG"), InputGeometry(TARGET), UploadLimits(min_side=1)
    )
    assert prepared.pixels.shape == (TARGET, TARGET, 3)
    assert (prepared.width, prepared.height) == size
    assert (prepared.pixels == (90, 60, 50)).all()


@pytest.mark.parametrize("size", [(400, 300), (900, 675), (1600, 1200), (2049, 1537)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_reducing_early_changes_hardly_a_pixel(lesion, encode, difference, size, kind):
    data = encode(lesion(*size), kind, **({"quality": 95} if kind == "JPEG" else {}))
    full = decode(data).resize((TARGET, TARGET), Image.Resampling.BICUBIC)
    early = prepare_image(data, InputGeometry(TARGET), LIMITS).pixels
    assert difference(full, Image.fromarray(early)) < 1.0
