"""A sheet of images with what a network says of them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aim_flax import files
from aim_flax.use.predictor import Prediction

MOST = 400  # images on a sheet
_SIDE, _LINE, _GAP = 112, 14, 8  # pixels


def draw(thumbnails: Sequence[Image.Image], predictions: Sequence[Prediction]) -> Image.Image:
    """Returns the images in rows, below each its class and probability."""
    columns = max(1, math.ceil(math.sqrt(len(thumbnails))))
    width, height = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    rows = math.ceil(len(thumbnails) / columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), _font()
    for i, (thumbnail, prediction) in enumerate(zip(thumbnails, predictions, strict=True)):
        x, y = _GAP + i % columns * width, _GAP + i // columns * height
        left, top = (_SIDE - thumbnail.width) // 2, (_SIDE - thumbnail.height) // 2
        sheet.paste(thumbnail, (x + left, y + top))
        name = _shortened(prediction.label, canvas, font)
        canvas.text((x, y + _SIDE), name, "black", font)
        canvas.text((x, y + _SIDE + _LINE), f"{prediction.probability:.1%}", "grey", font)
    return sheet


def write(place: Path, sheet: Image.Image) -> None:
    with files.writing(place.absolute().parent):
        files.save_image(sheet, place)


def thumbnail(pixels: np.ndarray, white: int = 255) -> Image.Image:
    """Returns what the network sees, (H, W, C) uint8, at a size for the sheet."""
    if white != 255:
        pixels = (pixels.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    factor = _SIDE / max(image.size)
    size = tuple(max(1, round(factor * side)) for side in image.size)
    # Few pixels stay visible as such.
    how = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.BILINEAR
    return image.resize(size, how)


def _font() -> ImageFont.FreeTypeFont:
    # Imported here because only a sheet needs it. Pillow's own font has fewer letters.
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", _LINE - 3)


def _shortened(name: str, canvas: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    # A folder's name may have bytes that are not text, and line breaks.
    name = " ".join(name.encode(errors="backslashreplace").decode().split())
    if canvas.textlength(name, font) <= _SIDE:
        return name
    while name and canvas.textlength(name + "…", font) > _SIDE:
        name = name[:-1]
    return name + "…"
