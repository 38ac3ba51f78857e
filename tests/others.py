"""Tiny networks of others, as files of weights, and what PyTorch and Keras compute with them.

data/pretrained_tiny.json is written by `benchmarks/pretrained.py --golden`: of each network the
names and shapes of its weights, and the logits and norms of gradients in float64. The weights are
drawn by rule from their names, here as there.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from tests.runs import load

GOLDEN = json.loads(Path(__file__).with_name("data").joinpath("pretrained_tiny.json").read_text())
SIZES, NETWORKS = GOLDEN["sizes"], GOLDEN["networks"]
LABELS = np.array([3, 1])
# The options of the networks in the file.
OPTIONS = {
    "resnet": ("image_folder_resnet50", ["stage_sizes=(1,2)", "width=4"]),
    "vgg": (
        "stanford_dogs_vgg16",
        [
            *("stage_sizes=(1,2)", "widths=(4,6)", "dense_sizes=(8,8)"),
            *("batch_norm=True", "pooling=grid"),
        ],
    ),
    "efficientnet_lite": (
        "image_folder_efficientnet",
        [
            *("stage_sizes=(1,2,1,1,1,1,1)", "widths=(4,5,4,5,4,5,4)"),
            *("stem_width=6", "top_width=6"),
        ],
    ),
}
TORCH, TORCH_V1, VGG, LITE, KERAS = (
    *("torchvision:resnet", "torchvision_v1:resnet", "torchvision:vgg"),
    *("efficientnet_lite0:efficientnet_lite", "keras:resnet"),
)


def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *SIZES, 3))


def drawn(name: str, shape: tuple[int, ...], outputs_last: bool = False) -> np.ndarray:
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        inputs = np.prod(shape[:-1] if outputs_last else shape[1:])
        return (numbers * (2 / inputs) ** 0.5).astype(np.float32)
    about_1 = ("running_var", "weight", "variance", "gamma")
    return (0.2 * numbers.clip(-2, 2) + name.endswith(about_1)).astype(np.float32)


def weights(network: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a network by their names."""
    last = network.startswith("keras")
    shapes = NETWORKS[network]["weights"].items()
    return {name: drawn(name, tuple(shape), last) for name, shape in shapes}


def write(network: str, folder: Path, arrays: Mapping[str, np.ndarray] | None = None) -> Path:
    """Writes a network's weights, or others, as the file that they would come in."""
    arrays = weights(network) if arrays is None else arrays
    if not network.startswith("keras"):
        file = folder / "weights.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
        return file
    file = folder / "weights.h5"
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        layer, role = name.split("/")
        layers.setdefault(layer, {})[f"{layer}/{role}:0"] = array
    with h5py.File(file, "w") as opened:
        opened.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, roles in layers.items():
            opened.create_group(layer).attrs["weight_names"] = [role.encode() for role in roles]
            for role, array in roles.items():
                opened[layer][role] = array
    return file


def config(network: str, file: Path | str, *changes: str, arm: str = "control") -> ConfigDict:
    """Returns the config of a network that starts from a file."""
    source, model = network.split(":")
    name, options = OPTIONS[model]
    if network == KERAS:
        options = ["stage_sizes=(1,2)"]
    pretrained = source if model == "efficientnet_lite" else f"{source}:{file}"
    found = load(
        f"{name}:{arm}",
        [
            *(f"model.pretrained={pretrained}", "model.num_classes=5"),
            *(f"data.image_shape=({SIZES[0]},{SIZES[1]},3)", *changes),
            *(f"model.{option}" for option in options),
        ],
    )
    if network == KERAS:
        with found.unlocked(), found.model.ignore_type():
            found.model.width = (64, 4)
    return found
