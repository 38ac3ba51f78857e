"""Small folders of images, and datasets in memory of the test's own, for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """Returns an encoded image; PNG keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, kind, **options)
    return buffer.getvalue()


def draw(seed: int, size: tuple[int, int] = (8, 8), label: int = 0) -> np.ndarray:
    """Returns noise, (*size, 3) uint8, whose brightness tells its label."""
    noise = np.random.default_rng(seed).integers(0, 120, (*size, 3))
    return (noise + 45 * label).clip(0, 255).astype(np.uint8)


class Photos:
    """A split of encoded images in memory; see `aim_flax.data.records.Records`."""

    def __init__(self, count: int, size: tuple[int, int] = (8, 8), classes: int = 3, seed: int = 0):
        self.labels = [i % classes for i in range(count)]
        images = (draw(seed + i, size, label) for i, label in enumerate(self.labels))
        self.encoded = [encode(image) for image in images]

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, index: int) -> tuple[bytes, int]:
        return self.encoded[index], self.labels[index]

    def name(self, index: int) -> str:
        return f"photo {index}"


def write_folder(
    directory: Path, train: int = 60, val: int = 12, test: int = 21, size: tuple[int, int] = (8, 8)
) -> Path:
    """Writes <directory>/{train,val,test}/<class>/<number>.png, three classes in turn."""
    seed = 0
    for split, count in (("train", train), ("val", val), ("test", test)):
        for i in range(count):
            label = i % 3
            folder = directory / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:04}.png").write_bytes(encode(draw(seed, size, label)))
            seed += 1
    return directory
