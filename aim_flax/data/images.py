"""From an encoded image to pixels: any channel count, depth, orientation and format."""

import io
import math
import struct
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

# OpenCV's own threads would compete with those that load images.
cv2.setNumThreads(0)
# Between its limit and twice that, Pillow would only warn.
warnings.simplefilter("error", Image.DecompressionBombWarning)
_BOMBS = (Image.DecompressionBombWarning, Image.DecompressionBombError)
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS

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
_EXIF = b"Exif\0\0"
_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"


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
        bits become 8, transparency is dropped, palettes and CMYK become RGB. Damaged EXIF data is
        ignored.
      shape: (H, W, C) of the result; C is 3, or 1 for grey.
      region: the part to decode.
      fit: "stretch": a region of the whole image, whose proportions change; "crop": a region of
        the largest part in the middle that has the proportions of H and W.
      centre: the share of that image's or part's height and width, in the middle, that counts as
        the whole: the rest is cut off.

    Returns:
      (H, W, C) uint8.

    Raises:
      ImageError: truncated, empty, of more pixels than Pillow's limit (about 89 million), or
        otherwise no image.
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
            with Image.open(io.BytesIO(encoded)) as image:
                name, (width, height) = image.format, image.size
                orientation = _orientation(image.info.get("exif", b""))
    except _FAILURES as error:
        raise ImageError(_reason(encoded, error)) from None
    return (name, width, height) if orientation in _TRANSPOSED else (name, height, width)


def _decode_jpeg(
    encoded: bytes, shape: tuple[int, int, int], region: Region, fit: str, centre: float
) -> np.ndarray:
    """Returns all pixels, upright, halved within the decoder as `load` says."""
    height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
    if height * width > _MAX_PIXELS:
        raise Image.DecompressionBombError
    orientation = _jpeg_orientation(encoded)
    upright = (width, height) if orientation in _TRANSPOSED else (height, width)
    rows, columns = _slices(upright, shape, region, fit, centre)
    ratio = min((rows.stop - rows.start) / shape[0], (columns.stop - columns.start) / shape[1])
    # The decoder's inverse DCT is quick at 1/2, 1/4 and 1/8 only.
    factor = 2 ** min(3, int(math.log2(max(1.0, ratio))))
    inks = color in ("CMYK", "YCCK")
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


def _decode_other(encoded: bytes, channels: int) -> np.ndarray:
    """Returns all pixels, upright."""
    with Image.open(io.BytesIO(encoded)) as image:
        # PNG may have its EXIF data after the pixels.
        image.load()
        orientation = _orientation(image.info.get("exif", b""))
        if image.mode.startswith("I"):
            # Pillow would clip 16 bits at 255.
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(grey)
        elif image.mode == "P":
            # Pillow warns when palettes with transparency become RGB directly.
            image = image.convert("RGBA")
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return _UPRIGHT[orientation](pixels) if orientation in _UPRIGHT else pixels


def _jpeg_orientation(encoded: bytes) -> int:
    # By Exif 2.32 it comes before everything else, a thumbnail's scan included.
    start = encoded.find(_EXIF, 0, encoded.find(_START_OF_SCAN))
    return 1 if start < 0 else _orientation(encoded[start : start + 65536])


def _orientation(exif: bytes) -> int:
    """Returns the orientation that EXIF data gives; 1, upright, if it gives none or is damaged.

    Pillow's reader takes longer than decoding, and warns or fails if any other tag is damaged.
    """
    tiff = exif.removeprefix(_EXIF)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(entries):
            tag, value = struct.unpack_from(order + "H6xH2x", tiff, directory + 2 + 12 * i)
            if tag == ExifTags.Base.Orientation:
                return value
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
    if isinstance(error, _BOMBS):
        return f"has more than {_MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "is no image of a known format"
    return f"cannot be decoded: {str(error).removesuffix('.')}"
