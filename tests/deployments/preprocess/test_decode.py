"""What comes out of every kind of JPEG and PNG a camera or a PMS may send."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
import pytest

from deployments.preprocess.decode import UploadLimits, decode_image, sniff_content_type
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
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


@pytest.mark.parametrize("orientation", [1, 2, 4, 6])
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_exif_does_not_cost_a_good_photograph(lesion, encode, kind):
    tiff = (b"", b"garbage", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08" + b"\xff" * 42)
    for broken in (*(b"Exif\0\0" + junk for junk in tiff), exif(0), exif(9), exif(4242)):
        assert decode(encode(lesion(300, 240), kind, exif=broken)).size == (300, 240)


def test_other_formats_are_unsupported_by_name(lesion, encode):
    written = {kind: encode(lesion(300, 240), kind) for kind in ("GIF", "BMP", "TIFF", "WebP", "AVIF", "PDF")}
    begun = {
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "DICOM": b"\0" * 128 + b"DICM\x02\0\0\0",
        "JPEG XL": b"\xff\x0a\xfa",
        "JPEG 2000": b"\xff\x4f\xff\x51\0",
        "ZIP": b"PK\x03\x04",
        "a video or an image in an MPEG-4 container": b"\0\0\0\x18ftypmp42",
    }
    for name, start in (written | begun).items():
        with pytest.raises(UnsupportedImage, match=f"content is {name};"):
            sniff_content_type(start + b"\0" * 100)
    with pytest.raises(UnsupportedImage, match="JPEG"):
        sniff_content_type(b"\xff\xd8" + b"\0" * 100)


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


def with_primaries(*colorants: tuple[float, float, float]) -> bytes:
    """An RGB matrix profile with the tone curve of sRGB; XYZ of red, green and blue for D50."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132])
    places = {
        bytes(profile[at : at + 4]): profile[at + 4 : at + 8] for at in range(132, 132 + 12 * count, 12)
    }
    for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True):
        at = int.from_bytes(places[tag]) + 8
        profile[at : at + 12] = struct.pack(">3i", *(round(value * 65536) for value in xyz))
    return bytes(profile)


SRGB = with_primaries((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = with_primaries((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841))
ADOBE_RGB = with_primaries((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


@pytest.mark.parametrize("profile", [DISPLAY_P3, ADOBE_RGB])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_brought_to_srgb_from_their_profile(lesion, encode, difference, profile, kind, mode):
    picture = lesion(600, 450)
    if mode == "P":
        picture = picture.quantize(256).convert("RGB")
    source, target = (ImageCms.ImageCmsProfile(io.BytesIO(p)) for p in (SRGB, profile))
    stored = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
    assert difference(stored, picture) > 3
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    if kind == "PNG" and mode != "RGB":
        stored = stored.convert(mode, palette=Image.Palette.ADAPTIVE)
    data = encode(stored, kind, icc_profile=profile, **options)
    assert difference(decode(data), picture) < 1.5
    reduced, expected = (decode(d, TARGET) for d in (data, encode(picture, "PNG")))
    assert difference(reduced, expected) < 1.5


@pytest.mark.parametrize(
    "profile",
    [
        b"\0" * 128,
        b"profile" * 100,
        DISPLAY_P3[:200],
        DISPLAY_P3[:132] + b"\xff" * (len(DISPLAY_P3) - 132),
        DISPLAY_P3.replace(b"RGB XYZ ", b"CMYKLab "),
        DISPLAY_P3.replace(b"RGB XYZ ", b"GRAYXYZ "),
        DISPLAY_P3 + b"\0" * 5_000_000,
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_that_is_none_is_ignored(lesion, encode, profile, mode):
    picture = lesion(300, 240).convert(mode)
    for kind in ("JPEG", *(["PNG"] if mode != "CMYK" else [])):
        plain, tagged = (encode(picture, kind, **o) for o in ({}, {"icc_profile": profile}))
        assert np.array_equal(np.asarray(decode(plain)), np.asarray(decode(tagged)))


def test_the_same_colours_as_adobe_rgb_give_nearly_the_same_pixels(failing_dir, isic_dir, difference):
    profiled = prepare_image(
        (failing_dir / "pub-05-melanoma-adobergb-icc.png").read_bytes(), InputGeometry(176), LIMITS
    )
    plain = prepare_image(
        (isic_dir / "images" / "ISIC_0028285.jpg").read_bytes(),
        InputGeometry(176),
        UploadLimits(min_side=100),
    )
    assert difference(Image.fromarray(profiled.pixels), Image.fromarray(plain.pixels)) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_orientation_in_xmp_alone_is_not_followed(lesion, encode, kind):
    """As in browsers: what the clinician saw was not turned."""
    picture = lesion(300, 240)
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    if kind == "JPEG":
        data = encode(picture, kind, xmp=xmp)
    else:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        data = encode(picture, kind, pnginfo=text)
    assert b'tiff:Orientation="6"' in data
    assert decode(data).size == (300, 240)


def test_text_and_profiles_of_any_size_do_not_cost_a_good_png(lesion, encode, failing_dir):
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a word " * 500_000, zip=True)
    text.add_itxt("Description", "ein Wort " * 500_000, zip=True)
    text.add_text("Raw", "word " * 500_000)
    plain = encode(lesion(300, 240), "PNG")
    for options in ({"pnginfo": text}, {"icc_profile": SRGB + b"\0" * 1_500_000}):
        data = encode(lesion(300, 240), "PNG", **options)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(decode(plain)))
    decode((failing_dir / "pub-07-valid-png-ztxt-3MB.png").read_bytes())


def test_a_kind_of_jpeg_that_is_not_decoded_is_named(lesion, encode, failing_dir):
    twelve = (failing_dir / "pub-09-jpeg-12bit.jpg").read_bytes()
    with pytest.raises(UnsupportedImage, match="12-bit JPEG is not supported"):
        decode(twelve)
    data = encode(lesion(300, 240), "JPEG")
    frame = data.index(b"\xff\xc0")
    for code, name in ((0xC3, "Lossless JPEG"), (0xC5, "Hierarchical JPEG"), (0xF7, "JPEG-LS")):
        with pytest.raises(UnsupportedImage, match=f"{name} is not supported"):
            decode(data[: frame + 1] + bytes([code]) + data[frame + 2 :])


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
