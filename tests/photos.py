"""Small folders of images, and datasets in memory of the test's own, for tests."""

import io
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from aim_flax import config as configs

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits_mlp.py")
FOLDER_CONFIG = str(Path(__file__).parents[1] / "configs" / "image_folder_resnet50.py")


def small(directory: Path, *assignments: str) -> tuple[str, ...]:
    """What makes that config's network and batches small enough for tests, and more."""
    network = ("data.image_shape=(8,8,3)", "model.stage_sizes=(1,)", "model.width=4")
    more = ("model.stem=cifar", "schedule.warmup_epochs=0.0")
    sizes = ("train.batch_size=8", "eval.batch_size=8", "train.epochs=2")
    return (f"data.dir={directory}", *network, *more, *sizes, *assignments)


def folder(directory: Path, *assignments: str) -> ConfigDict:
    config = configs.load(f"{FOLDER_CONFIG}:control")
    return configs.override(config, small(directory, *assignments))


def encode(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """Returns an encoded image; PNG keeps every pixel."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze())
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
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

    def label(self, index: int) -> int:
        return self.labels[index]

    def name(self, index: int) -> str:
        return f"photo {index}"

    def mark(self, index: int) -> bytes:
        return f"{index} {len(self.encoded[index])}".encode()


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


def mlp(directory: Path, *assignments: str, arm: str = "control") -> ConfigDict:
    """A network on a folder of images that compiles as quickly as possible."""
    data = ("data.name=folder", f"data.dir={directory}", "data.image_shape=(8,8,3)")
    network = ("data.scale=255.0", "model.features=(16,)", "model.num_classes=None")
    sizes = ("train.batch_size=8", "eval.batch_size=8", "train.epochs=1", "train.steps_per_call=1")
    memory = () if arm == "control" else ("memory.shape=(8,)", "memory.update_block.features=(4,)")
    config = configs.load(f"{DIGITS}:{arm}")
    return configs.override(config, [*data, *network, *sizes, *memory, *assignments])
