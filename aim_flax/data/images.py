"""From an encoded image to pixels: any channel count, depth, orientation and format."""

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

# OpenCV's own threads would compete with those that load images.
cv2.setNumThreads(0)
# Between its limit and twice that, Pillow would only warn.
warnings.simplefilter("error", Image.DecompressionBombWarning)
_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
# No image costs more memory than this while it is decoded.
MOST_BYTES = 256 << 20
# What decoding by Pillow costs per pixel, measured; other modes go through copies, and some
# decoders have the image whole as well.
_PIXEL_BYTES, _OTHER_PIXEL_BYTES = 12, 20
_PLAIN_MODES, _TWICE_WHOLE = ("1", "L", "RGB"), ("AVIF", "JPEG2000", "WEBP")
# By name: Pillow would try all that it has, and its EPS, for one, starts another program.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI")
_FORMATS += ("TGA", "TIFF", "WEBP")

# Top, left, height and width, as shares of the image.
Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
FITS = ("stretch", "crop")

# EXIF orientation: what brings the stored pixels upright (Exif 2.32, tag 0x0112).
_UPRIGHT = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
_TRANSPOSED = (5, 6, 7, 8)
# Some write its name twice; a PNG may have it as a text.
_EXIF, _PREFIXES = b"Exif\0\0", re.compile(rb"(?:Exif\0\0)*")
_EXIF_TEXT = "Raw profile type exif"
# How whole numbers are written, by their type (TIFF 6.0, section 2).
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
# JPEG, by ITU-T T.81, table B.1: a marker is a byte after any number of 0xFF; some stand alone, and
# the others begin a segment.
_JPEG, _MARKER = b"\xff\xd8", re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_ALONE = (0x01, *range(0xD0, 0xD9))
_END, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_INKS = ("CMYK", "YCCK")
# Markers of frames, and of those that come in several scans.
_FRAMES, _PROGRESSIVE = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA), (0xC2, 0xCA)
# The decoder's inverse DCT is quick at 1/2, 1/4 and 1/8 only.
_MOST_HALVINGS = 3
# PNG: how it begins, and its chunks of pixels; channels by colour type; first column and row, and
# steps, of the passes of an interlaced one (PNG specification, third edition, 11.2.1 and 8.1).
_PNG, _PNG_PIXELS = b"\x89PNG\r\n\x1a\n", (b"IDAT", b"fdAT")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4))
_PNG_PASSES += ((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# TIFF 6.0: a sample format (section 19), and a photometric interpretation (section 8).
_SIGNED, _WHITE_IS_ZERO = 2, 0
# Modes that Pillow can't turn into grey and RGB without a step between, or only with a warning.
_STEPS = {"P": "RGBA", "LAB": "RGB", "La": "LA"}


class ImageError(ValueError):
    """Bytes that are no whole image."""


# What the decoders raise on damaged files; SyntaxError and EOFError are Pillow's.
_FAILURES = (ValueError, OSError, SyntaxError, EOFError, *_BOMBS)


def load(
    encoded: bytes,
    shape: tuple[int, int, int],
    region: Region = WHOLE,
    fit: str = "stretch",
    centre: float = 1.0,
) -> np.ndarray:
    """Decodes a part of an image at a given size.

    While a photograph is at least twice the size, it is halved by averaging; then it is
    interpolated bilinearly.

    Args:
      encoded: JPEG, or what Pillow reads: PNG, WebP, ... Stored rotations (EXIF) are undone, 16
        bits become 8, transparency is dropped, palettes, CMYK and LAB become RGB. Damaged EXIF data
        is ignored. Of an animation, or a file of several images, the first alone is decoded.
      shape: (H, W, C) of the result; C is 3, or 1 for grey.
      region: the part to decode.
      fit: "stretch": a region of the whole image, whose proportions change; "crop": a region of
        the largest part in the middle that has the proportions of H and W.
      centre: the share of that image's or part's height and width, in the middle, that counts as
        the whole: the rest is cut off.

    Returns:
      (H, W, C) uint8.

    Raises:
      ImageError: truncated, empty, without some of its rows, of more pixels than Pillow's limit
        (about 89 million), so large that it would cost over `MOST_BYTES`, of numbers of which
        its format does not say what is black and white, or otherwise no image.
    """
    height, width, _ = shape
    try:
        if encoded.startswith(_JPEG):
            pixels = _decode_jpeg(encoded, shape, region, fit, centre)
        else:
            pixels = _decode_other(encoded, shape[2])
    except _FAILURES as error:
        raise ImageError(_reason(encoded, error)) from None
    rows, columns = _slices(pixels.shape[:2], shape, region, fit, centre)
    pixels = pixels[rows, columns]
    while min(pixels.shape[0] / height, pixels.shape[1] / width) >= 2:
        half = (math.ceil(pixels.shape[1] / 2), math.ceil(pixels.shape[0] / 2))
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels.reshape(shape)


def header(encoded: bytes) -> tuple[str, int, int]:
    """Returns what an image says of itself: format ("JPEG", "PNG", ...), height and width.

    The size is that of the upright image. Nothing is decoded: the pixels may be damaged.

    Raises:
      ImageError: as `load` does, if the header shows it.
    """
    try:
        if encoded.startswith(_JPEG):
            name, (height, width, _, _) = "JPEG", simplejpeg.decode_jpeg_header(encoded)
            orientation = _jpeg_orientation(encoded)
        else:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_samples(image)
                name, (width, height) = image.format, image.size
                orientation = _orientation(_exif(_info(image, encoded)))
    except _FAILURES as error:
        raise ImageError(_reason(encoded, error)) from None
    return (name, width, height) if orientation in _TRANSPOSED else (name, height, width)


def halvings(encoded: bytes) -> int:
    """Returns how often an image must be halved for `load` to decode all of it in `MOST_BYTES`.

    `load` does so at `height // 2**n` and `width // 2**n`, as a JPEG is made smaller while it is
    decoded. Other formats cost the same at any size: 0.

    Raises:
      ImageError: as `header` does.
    """
    if not encoded.startswith(_JPEG):
        return 0
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
    except _FAILURES as error:
        raise ImageError(_reason(encoded, error)) from None
    for n in range(_MOST_HALVINGS):
        if _jpeg_cost(encoded, height, width, color, 2**n) <= MOST_BYTES:
            return n
    return _MOST_HALVINGS


def _decode_jpeg(
    encoded: bytes, shape: tuple[int, int, int], region: Region, fit: str, centre: float
) -> np.ndarray:
    """Returns all pixels, upright, halved within the decoder as `load` says."""
    height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
    if height * width > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    orientation = _jpeg_orientation(encoded)
    upright = (width, height) if orientation in _TRANSPOSED else (height, width)
    rows, columns = _slices(upright, shape, region, fit, centre)
    ratio = min((rows.stop - rows.start) / shape[0], (columns.stop - columns.start) / shape[1])
    factor = 2 ** min(_MOST_HALVINGS, int(math.log2(max(1.0, ratio))))
    _check_cost(_jpeg_cost(encoded, height, width, color, factor), height * width)
    inks = color in _INKS
    pixels = simplejpeg.decode_jpeg(
        encoded,
        "CMYK" if inks else "GRAY" if shape[2] == 1 else "RGB",
        # The quick one saves 5 % of the time, but is 0.8 of 255 darker, and worse at high quality.
        fastdct=False,
        min_height=math.ceil(height / factor),
        min_width=math.ceil(width / factor),
    )
    if inks:
        # As Adobe, and so everyone, writes them: 255 is no ink.
        pixels = Image.fromarray(255 - pixels, "CMYK")
        pixels = np.asarray(pixels.convert("L" if shape[2] == 1 else "RGB"))
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def _jpeg_cost(encoded: bytes, height: int, width: int, color: str, factor: int) -> int:
    """Returns the bytes that it costs to decode a JPEG at 1 / `factor` of its height and width."""
    inks = color in _INKS
    # The decoder keeps all coefficients, of 2 bytes, of an image that comes in several scans.
    kept = height * width * (8 if inks else 6) if _is_progressive(encoded) else 0
    decoded = math.ceil(height / factor) * math.ceil(width / factor)
    return kept + decoded * (_OTHER_PIXEL_BYTES if inks else 6)


def _decode_other(encoded: bytes, channels: int) -> np.ndarray:
    """Returns all pixels, upright."""
    with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
        _check_samples(image)
        size = math.prod(image.size)
        plain = image.mode in _PLAIN_MODES and image.format not in _TWICE_WHOLE
        _check_cost((_PIXEL_BYTES if plain else _OTHER_PIXEL_BYTES) * size, size)
        # PNG may have its EXIF data after the pixels.
        image.load()
        if image.format == "PNG":
            _check_rows(image, encoded)
        orientation = _orientation(_exif(image.info))
        if image.mode.startswith("I"):
            image = _in_8_bits(image)
        elif image.mode in _STEPS:
            image = image.convert(_STEPS[image.mode])
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def _check_samples(image: Image.Image) -> None:
    """Raises ImageError for pixels of which no format says what is black and white."""
    signed = image.format == "TIFF" and _SIGNED in image.tag_v2.get(ExifTags.Base.SampleFormat, ())
    if signed or image.mode == "F":
        raise ImageError(
            f"has {'signed' if signed else 'floating-point'} pixels, and {image.format} does not"
            " say which are black and white: save it with unsigned ones of 8 or 16 bits"
        )


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image of more bits, which Pillow would clip at 255, in 8."""
    values, bits, inverted = np.asarray(image), 16, False
    if image.format == "TIFF":
        (bits,) = image.tag_v2[ExifTags.Base.BitsPerSample]
        inverted = image.tag_v2[ExifTags.Base.PhotometricInterpretation] == _WHITE_IS_ZERO
    # Pillow has 32 bits as signed ones.
    values = values.view(np.uint32) if bits == 32 else values
    pixels = (values >> (bits - 8)).astype(np.uint8)
    # Whatever the format says, programs put counts and numbers of labels there.
    if bits == 32 and values.any() and not pixels.any():
        raise ImageError(
            f"has {bits}-bit pixels of at most {values.max():,}, which are all black where"
            f" {2**bits - 1:,} is white: save it with 8 or 16 bits"
        )
    return Image.fromarray(255 - pixels if inverted else pixels)


def _check_cost(cost: int, pixels: int) -> None:
    if cost > MOST_BYTES:
        raise ImageError(f"has {pixels:,} pixels, too many to decode in {MOST_BYTES >> 20} MiB")


def _check_rows(image: Image.Image, encoded: bytes) -> None:
    """Raises OSError for a decoded PNG whose data end early: Pillow leaves the other rows black."""
    width, height, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", encoded, 16)
    last = image.crop((0, height - 1, width, height))
    if not interlaced and last.getbbox(alpha_only=False):
        return
    expected = 0
    for left, top, across, down in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = math.ceil((width - left) / across), math.ceil((height - top) / down)
        if columns > 0 and rows > 0:
            # A byte for the filter, before each row.
            expected += rows * (1 + math.ceil(columns * bits * _PNG_CHANNELS[color] / 8))
    found, inflate = 0, zlib.decompressobj()
    for kind, start, stop in _chunks(encoded):
        rest = encoded[start + 8 : stop - 4] if kind == b"IDAT" else b""
        while rest:
            found += len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
    if found < expected:
        raise OSError(f"{1 - found / expected:.0%} of its pixels are missing")


def _chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields of each chunk of a PNG what kind it is, where it starts, and where it ends."""
    place = len(_PNG)
    while place + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, place)
        yield kind, place, place + 12 + length
        place += 12 + length


def _segments(encoded: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the marker and content of each segment of a JPEG before its first scan."""
    place = len(_JPEG)
    while found := _MARKER.search(encoded, place):
        marker, place = found[1][0], found.end()
        if marker in (_START_OF_SCAN, _END):
            return
        if marker in _ALONE:
            continue
        length = int.from_bytes(encoded[place : place + 2])
        yield marker, encoded[place + 2 : place + length]
        place += length


def _is_progressive(encoded: bytes) -> bool:
    frames = (marker for marker, _ in _segments(encoded) if marker in _FRAMES)
    return next(frames, None) in _PROGRESSIVE


def _jpeg_orientation(encoded: bytes) -> int:
    for marker, content in _segments(encoded):
        if marker == _APP1 and content.startswith(_EXIF):
            return _orientation(content)
    return 1


def _info(image: Image.Image, encoded: bytes) -> dict[str, Any]:
    """Returns what an image that isn't decoded says of itself; a PNG behind its pixels, too."""
    if image.format != "PNG":
        return image.info
    others = [encoded[a:b] for kind, a, b in _chunks(encoded) if kind not in _PNG_PIXELS]
    try:
        with Image.open(io.BytesIO(_PNG + b"".join(others)), formats=("PNG",)) as whole:
            return whole.info
    except _FAILURES:  # Something is damaged, or missing at the end.
        return image.info


def _exif(info: dict[str, Any]) -> bytes:
    """Returns the EXIF data of what Pillow tells of an image, or b""."""
    exif, text = info.get("exif"), info.get(_EXIF_TEXT)
    if exif is None and text is not None:
        # As ImageMagick writes it: in hexadecimal digits, below three lines.
        try:
            return bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b""
    # A text of a PNG may have that name.
    return exif if isinstance(exif, bytes) else b""


def _orientation(exif: bytes) -> int:
    """Returns the orientation that EXIF data gives; 1, upright, if it gives none or is damaged.

    Pillow's reader takes longer than decoding, and warns or fails if any other tag is damaged.
    """
    tiff = exif[_PREFIXES.match(exif).end() :]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            entry = directory + 2 + 12 * i
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == ExifTags.Base.Orientation and kind in _WHOLE_NUMBERS and count == 1:
                return struct.unpack_from(order + _WHOLE_NUMBERS[kind], tiff, entry + 8)[0]
    except struct.error:
        pass
    return 1


def _slices(
    size: tuple[int, int], shape: tuple[int, int, int], region: Region, fit: str, centre: float
) -> tuple[slice, slice]:
    """Returns the rows and columns of a region of an image of this size."""
    scale = min(size[0] / shape[0], size[1] / shape[1])

    def cut(axis: int) -> slice:
        whole, limit = size[axis], size[axis]
        margin = 0.0
        if fit == "crop":
            whole = scale * shape[axis]
        whole *= centre
        if fit == "crop" or centre < 1:
            margin = (limit - whole) / 2
        start = margin + region[axis] * whole
        first = min(round(start), limit - 1)
        return slice(first, max(first + 1, min(round(start + region[axis + 2] * whole), limit)))

    return cut(0), cut(1)


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "is empty"
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, _BOMBS):
        return f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "is no image of a known format"
    return f"cannot be decoded: {str(error).removesuffix('.')}"
