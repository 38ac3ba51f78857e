"""Decoding: every kind of image comes out upright, whole and near what was stored, or is told."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from aim_flax.data import images
from aim_flax.data.images import MOST_BYTES, ImageError, halvings, header, load
from tests.asserts import refused
from tests.photos import encode

HEIGHT, WIDTH = 60, 80


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth, of many colours, and of no symmetry."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


IMAGE = Image.fromarray(picture())
SHAPE = (HEIGHT, WIDTH, 3)


def oriented(orientation: int, order: str = "<") -> bytes:
    """EXIF data with a camera's name and an orientation."""
    exif = Image.Exif()
    exif.endian = order
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def grey16() -> Image.Image:
    return Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)


ENCODED = {
    "jpeg": encode(IMAGE, "JPEG", quality=95),
    "progressive jpeg": encode(IMAGE, "JPEG", quality=95, progressive=True),
    "grey jpeg": encode(IMAGE.convert("L"), "JPEG", quality=95),
    "cmyk jpeg": encode(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "rgb jpeg": encode(IMAGE, "JPEG", quality=95, keep_rgb=True),
    "png": encode(IMAGE, "PNG"),
    "grey png": encode(IMAGE.convert("L"), "PNG"),
    "grey and alpha png": encode(IMAGE.convert("LA"), "PNG"),
    "rgba png": encode(IMAGE.convert("RGBA"), "PNG"),
    "palette png": encode(IMAGE.convert("P"), "PNG"),
    "clear palette png": encode(IMAGE.convert("P"), "PNG", transparency=b"\x00\x80\xff"),
    "16 bit png": encode(grey16(), "PNG"),
    "webp": encode(IMAGE, "WEBP", quality=95),
    "lossless webp": encode(IMAGE, "WEBP", lossless=True),
    "clear webp": encode(IMAGE.convert("RGBA"), "WEBP", quality=95),
}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


GREY = IMAGE.convert("L").convert("RGB")
COLOURS = IMAGE.convert("P").convert("RGB")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("png", IMAGE),
        ("rgba png", IMAGE),
        ("lossless webp", IMAGE),
        ("grey png", GREY),
        ("grey and alpha png", GREY),
        ("palette png", COLOURS),
        ("clear palette png", COLOURS),
    ],
)
def test_lossless_formats_are_exact(kind, expected):
    np.testing.assert_array_equal(load(ENCODED[kind], SHAPE), np.asarray(expected))


@pytest.mark.parametrize(
    "kind", ["jpeg", "progressive jpeg", "rgb jpeg", "cmyk jpeg", "clear webp"]
)
def test_lossy_formats_are_near(kind):
    assert distance(load(ENCODED[kind], SHAPE), picture()) < 4


def test_16_bits_are_scaled_not_clipped():
    pixels = load(ENCODED["16 bit png"], (HEIGHT, WIDTH, 1))
    np.testing.assert_array_equal(pixels[..., 0], picture()[..., 0])


def with_tags(tiff: bytes, **values: int) -> bytes:
    """Returns a TIFF of one sample per pixel with other values of tags, by their names."""
    changed, (start,) = bytearray(tiff), struct.unpack_from("<I", tiff, 4)
    left = {ExifTags.Base[name]: value for name, value in values.items()}
    for i in range(*struct.unpack_from("<H", tiff, start)):
        place = start + 2 + 12 * i
        (tag,) = struct.unpack_from("<H", tiff, place)
        if tag in left:
            struct.pack_into("<I", changed, place + 8, left.pop(tag))
    assert not left
    return bytes(changed)


def grey32() -> np.ndarray:
    return picture()[..., 0].astype(np.int64) * 0x01010101


def unsigned32(values: np.ndarray) -> bytes:
    return with_tags(encode(values.astype(np.uint32).view(np.int32), "TIFF"), SampleFormat=1)


def grey12() -> bytes:
    """Two pixels in three bytes."""
    values = picture()[..., 0].astype(np.uint16) * 16 + 15
    left, right = values[:, ::2], values[:, 1::2]
    parts = [left >> 4, (left & 15) << 4 | right >> 8, right & 255]
    packed = np.stack(parts, -1).reshape(HEIGHT, WIDTH * 3 // 2).astype(np.uint8)
    return with_tags(encode(packed, "TIFF"), ImageWidth=WIDTH, BitsPerSample=12)


@pytest.mark.parametrize(
    "encoded",
    [
        unsigned32(grey32()),
        grey12(),
        encode(grey16(), "TIFF"),
        with_tags(
            encode(Image.fromarray(65535 - np.asarray(grey16())), "TIFF"),
            PhotometricInterpretation=0,
        ),
        encode(grey16(), "PPM"),
        encode(grey16(), "JPEG2000"),
    ],
    ids=["32 bit", "12 bit", "16 bit", "white is 0", "pgm", "jpeg 2000"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_depth_is_scaled_by_what_its_format_says(encoded, channels):
    pixels = load(encoded, (HEIGHT, WIDTH, channels))
    np.testing.assert_array_equal(pixels, np.repeat(picture()[..., :1], channels, -1))


def floats(white: float) -> Image.Image:
    return Image.fromarray(picture()[..., 0].astype(np.float32) / 255 * white)


@pytest.mark.parametrize(
    ("encoded", "kind"),
    [
        (encode(floats(1.0), "TIFF"), "floating-point pixels, and TIFF"),
        (encode(floats(255.0), "TIFF"), "floating-point pixels, and TIFF"),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.0, 1.0), "floating-point pixels, and PPM"),
        (encode(picture()[..., 0].astype(np.int32), "TIFF"), "signed pixels, and TIFF"),
        (
            encode(grey16(), "TIFF", tiffinfo={ExifTags.Base.SampleFormat: 2}),
            "signed pixels, and TIFF",
        ),
    ],
    ids=["to 1", "to 255", "pfm", "32 bit", "16 bit"],
)
def test_numbers_without_a_black_and_white_are_refused(encoded, kind):
    for read in (header, lambda encoded: load(encoded, SHAPE)):
        message = f"has {kind} does not say which are black and white: save it with unsigned ones"
        with refused(f"^{message} of 8 or 16 bits$", kind=ImageError):
            read(encoded)


def test_small_numbers_in_32_bits_are_never_silently_black():
    for most in (255, 65535):
        values = picture()[..., 0].astype(np.int64) * most // 255
        message = (
            f"^has 32-bit pixels of at most {values.max():,}, which are all black where 4,294,9"
        )
        with refused(message, kind=ImageError):
            load(unsigned32(values), SHAPE)
    assert not load(unsigned32(np.zeros((HEIGHT, WIDTH))), SHAPE).any()


def test_lab_and_alpha_that_is_multiplied_in():
    to_lab = ImageCms.buildTransform(*map(ImageCms.createProfile, ("sRGB", "LAB")), "RGB", "LAB")
    lab = encode(ImageCms.applyTransform(IMAGE, to_lab), "TIFF")
    assert distance(load(lab, SHAPE), picture()) < 2
    assert distance(load(lab, (HEIGHT, WIDTH, 1))[..., 0], np.asarray(IMAGE.convert("L"))) < 2
    grey = encode(IMAGE.convert("LA"), "TIFF")
    multiplied = with_tags(grey, ExtraSamples=1)
    for channels in (1, 3):
        expected = load(grey, (HEIGHT, WIDTH, channels))
        np.testing.assert_array_equal(load(multiplied, (HEIGHT, WIDTH, channels)), expected)


@pytest.mark.parametrize("kind", ENCODED)
def test_one_channel_is_the_grey_of_three(kind):
    grey = load(ENCODED[kind], (HEIGHT, WIDTH, 1))
    assert grey.shape == (HEIGHT, WIDTH, 1)
    expected = np.asarray(Image.fromarray(load(ENCODED[kind], SHAPE)).convert("L"))
    assert distance(grey[..., 0], expected) < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_rotations_are_undone_as_pillow_does(orientation, order, kind):
    encoded = encode(IMAGE, kind, exif=oriented(orientation, order), quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    shape = (upright.height, upright.width)
    assert header(encoded) == (kind, *shape)
    np.testing.assert_array_equal(load(encoded, (*shape, 3)), np.asarray(upright))
    assert distance(load(encoded, (*shape, 1))[..., 0], np.asarray(upright.convert("L"))) < 1


def segment(marker: int, content: bytes) -> bytes:
    """Returns a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def typed(kind: int, order: str) -> bytes:
    """EXIF data whose orientation, 6, is a number of this type (TIFF 6.0, section 2)."""
    code = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}[kind]
    entry = struct.pack(order + "HHI", ExifTags.Base.Orientation, kind, 1)
    value = struct.pack(order + code, 6).ljust(4, b"\0")
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(order + "IH", 8, 1) + entry + value + bytes(4)


def in_text(exif: bytes) -> bytes:
    """EXIF data as ImageMagick writes it into a PNG."""
    return b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())


BEFORE = {  # what may stand in a JPEG before its EXIF data
    "a segment with the marker of a scan": segment(0xED, b"Photoshop 3.0\0 \xff\xda "),
    "a comment that names EXIF": segment(0xFE, b"Exif\0\0 is not here"),
    "bytes that fill up": b"\xff\xff\xff",
    "a marker that stands alone": b"\xff\x01",
    "other data of the same marker": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
}


@pytest.mark.parametrize("before", BEFORE)
def test_exif_is_found_behind(before):
    check_turned("jpeg", BEFORE[before] + segment(0xE1, oriented(6)), 2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4, 8, 9])
def test_orientations_may_be_whole_numbers_of_any_type(kind, order):
    check_turned("jpeg", segment(0xE1, typed(kind, order)), 2)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("how", ["eXIf", "tEXt", "zTXt"])
def test_exif_is_found_in_a_png(how, behind):
    """In its own chunk or, as ImageMagick writes it, in a text; before the pixels or after them."""
    name, _, text = in_text(oriented(6)).partition(b"\0")
    content = {
        "eXIf": oriented(6).removeprefix(b"Exif\0\0"),
        "tEXt": in_text(oriented(6)),
        "zTXt": name + b"\0\0" + zlib.compress(text),
    }[how]
    check_turned("png", chunk(how.encode(), content), -12 if behind else 33)


def check_turned(kind: str, added: bytes, place: int) -> None:
    """Asserts that an image is turned by what is added to its file there."""
    plain = ENCODED[kind]
    encoded = plain[:place] + added + plain[place:]
    assert header(encoded) == (kind.upper(), WIDTH, HEIGHT)
    expected = np.rot90(load(plain, SHAPE), -1)
    np.testing.assert_array_equal(load(encoded, (WIDTH, HEIGHT, 3)), expected)


@pytest.mark.parametrize(
    "chunks",
    [
        chunk(b"tEXt", in_text(oriented(6))[:-4]),
        chunk(b"tEXt", b"Raw profile type exif\0no digits"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 2\nzz\n"),
        chunk(b"zTXt", b"exif\0\0" + zlib.compress(b"text")),
        chunk(b"tEXt", b"exif\0text"),
    ],
    ids=["odd", "short", "no digits", "zTXt of that name", "tEXt of that name"],
)
def test_damaged_exif_in_texts_is_passed_over(chunks):
    png = encode(IMAGE, "PNG")
    encoded = png[:33] + chunks + png[33:]
    assert header(encoded) == ("PNG", HEIGHT, WIDTH)
    np.testing.assert_array_equal(load(encoded, SHAPE), picture())


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_are_those_of_the_upright_image(orientation, fit):
    region = (0.25, 0.5, 0.5, 0.25)
    encoded = encode(IMAGE, "JPEG", exif=oriented(orientation), quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    plain = encode(upright, "PNG")
    shape = (12, 12, 3)
    assert distance(load(encoded, shape, region, fit), load(plain, shape, region, fit)) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_passed_over(kind):
    """Whatever byte of it is wrong, or missing, the pixels are there; nothing warns of it."""
    exif = oriented(6)
    square = IMAGE.resize((16, 16))

    def pixels(exif: bytes) -> bytes:
        encoded = encode(square, kind, exif=exif, lossless=True)
        assert header(encoded) == (kind, 16, 16)
        return load(encoded, (16, 16, 3)).tobytes()

    cut = {pixels(exif[:at]) for at in range(6, len(exif))}
    changed = {pixels(exif[:at] + b"\xff" + exif[at + 1 :]) for at in range(6, len(exif))}
    # The orientation is read from what is left of it, or taken as upright.
    assert cut == changed == {pixels(oriented(1)), pixels(oriented(6))}


@pytest.mark.parametrize(
    ("size", "region", "fit", "expected"),
    [
        ((30, 20), (0.25, 0.5, 0.5, 0.25), "stretch", picture()[15:45, 40:60]),
        # The largest middle part of the proportions.
        ((60, 60), (0, 0, 1, 1), "crop", picture()[:, 10:70]),
        ((20, 80), (0, 0, 1, 1), "crop", picture()[20:40]),
        # A region is one of that part: here its lower right quarter.
        ((30, 30), (0.5, 0.5, 0.5, 0.5), "crop", picture()[30:60, 40:70]),
        # The smallest one is one pixel.
        ((4, 4), (1.0, 1.0, 0.0, 0.0), "stretch", np.tile(picture()[-1, -1], (4, 4, 1))),
    ],
)
def test_regions_and_crops_are_cut_out_exactly(size, region, fit, expected):
    pixels = load(ENCODED["png"], (*size, 3), region, fit)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_halving_averages(kind, halvings):
    """Against Pillow's mean over squares, on noise, which anything but a mean would change."""
    height, width, factor = 512, 640, 2**halvings
    noise = np.random.default_rng(0).normal(0, 40, (height, width, 3))
    large = Image.fromarray((picture(height, width) + noise).clip(0, 255).astype(np.uint8))
    encoded = encode(large, kind, quality=95, subsampling=0)
    pixels = load(encoded, (height // factor, width // factor, 3))
    expected = np.asarray(large.reduce(factor))
    assert distance(pixels, expected) < 1.5
    # Each halving rounds halves up.
    assert abs(pixels.mean() - expected.mean()) < 0.15 * halvings
    # Not halved, the noise would stay: picking pixels is far off.
    picked = np.asarray(large)[::factor, ::factor]
    assert distance(picked, expected) > 15


def test_halved_in_the_decoder_or_after_is_the_same_picture():
    """Sizes that no power of two divides; a region that decides how often."""
    large = Image.fromarray(picture(731, 1003))
    for region in ((0, 0, 1, 1), (0.1, 0.2, 0.5, 0.6)):
        jpeg = load(encode(large, "JPEG", quality=95, subsampling=0), (100, 90, 3), region)
        assert distance(jpeg, load(encode(large, "PNG"), (100, 90, 3), region)) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(500, 1), (1, 500), (1, 1), (3, 2000)])
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_thin_images(kind, size, fit):
    color = (200, 90, 30)
    pixels = load(encode(Image.new("RGB", size, color), kind, quality=95), (32, 24, 3), fit=fit)
    assert pixels.shape == (32, 24, 3)
    assert np.abs(pixels.astype(int) - color).max() <= 4


@pytest.mark.parametrize("kind", ENCODED)
def test_truncated_files_are_told_or_whole(kind):
    encoded = ENCODED[kind]
    whole = load(encoded, SHAPE)
    for tenth in range(10):
        with pytest.raises(ImageError):
            load(encoded[: len(encoded) * tenth // 10], SHAPE)
    for missing in range(1, 40):
        try:
            pixels = load(encoded[:-missing], SHAPE)
        except ImageError:
            continue
        # Only what stands behind the pixels was missing.
        np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "is empty"),
        (b"no image " * 20, "is no image of a known format"),
        (b"<html>404</html>", "is no image of a known format"),
        (b"\xff\xd8", "cannot be decoded: "),
        (b"\xff\xd8" + b"garbage" * 50, "cannot be decoded: "),
        (ENCODED["png"][:8], "is no image of a known format"),
    ],
)
def test_what_is_no_image(encoded, message):
    for read in (header, lambda encoded: load(encoded, SHAPE)):
        with refused(f"^{message}", kind=ImageError):
            read(encoded)


def jpeg_of_size(height: int, width: int) -> bytes:
    jpeg = ENCODED["jpeg"]
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def png_of_size(height: int, width: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">II", width, height) + ENCODED["png"][24:29]
    return ENCODED["png"][:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + ENCODED["png"][33:]


@pytest.mark.parametrize("of_size", [jpeg_of_size, png_of_size])
def test_sizes_that_no_image_has(of_size):
    for size in ((HEIGHT, 0), (0, WIDTH)):
        with pytest.raises(ImageError):
            load(of_size(*size), SHAPE)
    # Pillow would only warn of the first, and nothing would stop a JPEG.
    for size in ((10_000, 10_000), (60_000, 60_000)):
        with pytest.raises(ImageError, match="^has more than 89,478,485 pixels$"):
            load(of_size(*size), SHAPE)


def png(rows: int, interlaced: bool = False) -> bytes:
    """A PNG of 60x80 whose last row is red, of which only the first rows are there."""
    pixels = picture()
    pixels[-1] = (255, 0, 0)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    passes = [*passes, (1, 0, 2, 1)] if interlaced else [(0, 0, 1, 1)]
    lines = [line for top, left, *by in passes for line in pixels[top :: by[0], left :: by[1]]]
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines[:rows]))
    size = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, interlaced)
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", data[:100]) + chunk(b"IDAT", data[100:])
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
def test_pngs_that_end_early_are_damaged(interlaced):
    """Whole in all but their pixels: what Pillow, which leaves the other rows black, lets pass."""
    everything = 10**6
    whole = load(png(everything, interlaced), SHAPE)
    np.testing.assert_array_equal(whole[:-1], picture()[:-1])
    for rows in (1, 20, 59):
        message = r"^cannot be decoded: \d+% of its pixels are missing$"
        with refused(message, kind=ImageError):
            load(png(rows, interlaced), SHAPE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_black_images_are_whole(mode):
    assert not load(encode(Image.new(mode, (7, 5)), "PNG"), (5, 7, 3)).any()


def test_other_programs_are_not_started():
    """Pillow would hand EPS to Ghostscript, whatever a file is called."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for read in (header, lambda encoded: load(encoded, SHAPE)):
        with refused("^is no image of a known format$", kind=ImageError):
            read(eps)


MOST = {  # kind, mode, further options: side of a square image that costs nearly 256 MiB
    "png": ("PNG", "RGB", {}, 4_700),
    "palette": ("PNG", "P", {}, 3_600),
    "16 bits": ("PNG", "I;16", {}, 3_600),
    "webp": ("WEBP", "RGB", {}, 3_600),
    "jpeg 2000": ("JPEG2000", "RGB", {}, 3_600),
    "avif": ("AVIF", "RGB", {"speed": 10}, 3_600),
    "tiff": ("TIFF", "RGB", {"compression": "tiff_lzw"}, 4_700),
    "inks": ("TIFF", "CMYK", {"compression": "tiff_lzw"}, 3_600),
    "jpeg": ("JPEG", "RGB", {}, 6_600),
    "progressive": ("JPEG", "RGB", {"progressive": True}, 4_700),
}


def cost(encoded: bytes) -> int:
    """Returns the bytes that decoding takes, in a process of its own, whose memory tells."""
    program = """
import sys
from pathlib import Path
from aim_flax.data.images import load

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

encoded = sys.stdin.buffer.read()
Path("/proc/self/clear_refs").write_text("5")
before = most()
load(encoded, (64, 64, 3))
print(most() - before)
"""
    arguments = [sys.executable, "-c", program]
    return int(subprocess.run(arguments, input=encoded, capture_output=True, check=True).stdout)


of_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
@of_linux
@pytest.mark.parametrize("kind", MOST)
def test_no_image_costs_more_than_is_said(kind):
    """A larger image is refused."""
    form, mode, options, side = MOST[kind]
    assert cost(encode(Image.new(mode, (side, side)), form, **options)) < MOST_BYTES
    larger = encode(Image.new(mode, (side * 5 // 4,) * 2), form, **options)
    if form != "JPEG":
        with refused("^has [0-9,]+ pixels, too many to decode in 256 MiB$", kind=ImageError):
            load(larger, SHAPE)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "mode", "progressive", "bytes_per_pixel", "expected"),
    [
        # A JPEG costs 6 a pixel that is decoded and, in several scans, 6 a pixel of all.
        ("JPEG", "RGB", False, 7.0, 0),
        ("JPEG", "RGB", False, 5.0, 1),
        ("JPEG", "RGB", False, 1.0, 2),
        ("JPEG", "RGB", True, 13.0, 0),
        ("JPEG", "RGB", True, 7.0, 2),
        ("JPEG", "CMYK", False, 7.0, 1),
        ("PNG", "RGB", False, 13.0, 0),
    ],
)
def test_an_image_halved_often_enough_can_be_decoded(
    monkeypatch, kind, mode, progressive, bytes_per_pixel, expected, orientation
):
    image = Image.fromarray(picture(241, 323)).convert(mode)
    encoded = encode(image, kind, progressive=progressive, exif=oriented(orientation))
    monkeypatch.setattr(images, "MOST_BYTES", int(bytes_per_pixel * 241 * 323))
    times = halvings(encoded)
    assert times == expected
    _, height, width = header(encoded)
    assert load(encoded, (height // 2**times, width // 2**times, 3)).any()
    if times:
        with refused("too many to decode", kind=ImageError):
            load(encoded, (height // 2 ** (times - 1), width // 2 ** (times - 1), 3))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_image_of_several_is_taken(kind):
    frames = [Image.fromarray(np.roll(picture(), 7 * shift, 0)).convert("P") for shift in range(3)]
    frames = [frame if kind == "GIF" else frame.convert("RGB") for frame in frames]
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.n_frames == 3
    assert header(encoded) == (kind, HEIGHT, WIDTH)
    np.testing.assert_array_equal(load(encoded, SHAPE), np.asarray(frames[0].convert("RGB")))


def animation(frames: int, side: int) -> bytes:
    """Returns a GIF, red, then green, and then blue in all other frames."""
    colours = [Image.new("RGB", (side, side), colour) for colour in ("red", "lime", "blue")]
    two, three = (
        encode(colours[0], "GIF", save_all=True, append_images=colours[1:count]) for count in (2, 3)
    )
    assert three.startswith(two[:-1])
    # Blocks of frames follow one another, up to a last byte.
    return two[:-1] + three[len(two) - 1 : -1] * (frames - 2) + two[-1:]


@of_linux
def test_an_animation_of_ten_thousand_frames_costs_one():
    """Which are 30 GB of pixels."""
    encoded = animation(10_000, 1000)
    np.testing.assert_array_equal(load(encoded, (1, 1, 3)), [[(255, 0, 0)]])
    assert cost(encoded) < cost(animation(2, 1000)) + 2**22
    # Nothing behind the first frame is looked at.
    damaged = encode(Image.new("RGB", (9, 9), "red"), "GIF")[:-1] + b"no frame"
    np.testing.assert_array_equal(load(damaged, (1, 1, 3)), [[(255, 0, 0)]])


def test_decoders_write_nothing(tmp_path):
    """In a process of its own, where no warning is an error."""
    program = """
import sys
from aim_flax.data.images import ImageError, load
for line in sys.stdin:
    try:
        load(bytes.fromhex(line), (8, 8, 3))
    except ImageError:
        pass
"""
    files = [oriented(6)[:at] for at in range(8, 30, 3)]
    files = [encode(IMAGE, kind, exif=exif) for exif in files for kind in ("JPEG", "PNG", "WEBP")]
    files += [encode(IMAGE.convert("CMYK"), "JPEG", exif=oriented(6)[:20])]
    files += [png_of_size(10_000, 10_000), jpeg_of_size(10_000, 10_000)]
    files += list(ENCODED.values())
    files += [encoded[: len(encoded) * n // 4] for encoded in ENCODED.values() for n in range(4)]
    # As cameras do: bytes between the markers.
    files += [ENCODED["jpeg"].replace(b"\xff\xdb", b"ab\xff\xdb", 1)]
    result = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(file.hex() for file in files),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
