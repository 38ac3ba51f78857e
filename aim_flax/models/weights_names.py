"""Under which names others keep the weights of our networks, and in which shape.

Sources of the names: torchvision's `resnet` and `vgg` and timm's `resnet` (the same), Keras's
`applications`, and lukemelas/EfficientNet-PyTorch, whose files the weights of EfficientNet-Lite0
have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aim_flax.models.keras_weights import LAYER_ROLES, NORM_ROLES

Path = tuple[str, ...]


class Place(NamedTuple):
    """Where an array belongs in our variables.

    Attributes:
      path: the collection, and the names within it.
      turn: from the array in the file to ours.
    """

    path: Path
    turn: Callable[[np.ndarray], np.ndarray]


# From the config's group `model` to the places by name.
Layout = Callable[[Mapping[str, Any]], dict[str, Place]]


def torch_resnet(model: Mapping[str, Any]) -> dict[str, Place]:
    layers = {"conv1": "stem/conv", "bn1": "stem/norm", "fc": "head"}
    for stage, block, ours in _blocks(model["stage_sizes"]):
        theirs = f"layer{stage}.{block - 1}"
        for i in (1, 2, 3):
            layers[f"{theirs}.conv{i}"] = f"{ours}/conv{i}"
            layers[f"{theirs}.bn{i}"] = f"{ours}/norm{i}"
        if block == 1:
            layers[f"{theirs}.downsample.0"] = f"{ours}/shortcut"
            layers[f"{theirs}.downsample.1"] = f"{ours}/shortcut_norm"
    return _torch_places(layers, model)


def torch_vgg(model: Mapping[str, Any]) -> dict[str, Place]:
    layers, number = {}, 0
    for stage, convolutions in enumerate(model["stage_sizes"], start=1):
        for i in range(1, convolutions + 1):
            layers[f"features.{number}"] = f"stage{stage}_conv{i}"
            if model["batch_norm"]:
                layers[f"features.{number + 1}"] = f"stage{stage}_norm{i}"
            number += 3 if model["batch_norm"] else 2
        number += 1  # the pool
    dense = len(model["dense_sizes"])
    for i in range(1, dense + 1):
        layers[f"classifier.{3 * (i - 1)}"] = f"dense{i}"
    layers[f"classifier.{3 * dense}"] = "head"
    places = _torch_places(layers, model)
    if dense and model["pooling"] != "global":
        channels = model["widths"][-1]
        first = places["classifier.0.weight"]
        places["classifier.0.weight"] = first._replace(turn=lambda a: _channels_last(a, channels))
    return places


def torch_efficientnet(model: Mapping[str, Any]) -> dict[str, Place]:
    layers = {"_conv_stem": "stem/conv", "_bn0": "stem/norm"}
    layers |= {"_conv_head": "top/conv", "_bn1": "top/norm", "_fc": "head"}
    for number, (stage, _, ours) in enumerate(_blocks(model["stage_sizes"])):
        parts = ("depthwise", "project") if stage == 1 else ("expand", "depthwise", "project")
        for part in parts:
            layers[f"_blocks.{number}._{part}_conv"] = f"{ours}/{part}"
        for part, norm in (("expand", 0), ("depthwise", 1), ("project", 2)):
            if part in parts:
                layers[f"_blocks.{number}._bn{norm}"] = f"{ours}/{part}_norm"
    return _torch_places(layers, model)


def keras_resnet(model: Mapping[str, Any]) -> dict[str, Place]:
    layers = {"conv1_conv": "stem/conv", "conv1_bn": "stem/norm", "predictions": "head"}
    for stage, block, ours in _blocks(model["stage_sizes"]):
        theirs = f"conv{stage + 1}_block{block}"
        for i in (1, 2, 3):
            layers[f"{theirs}_{i}_conv"] = f"{ours}/conv{i}"
            layers[f"{theirs}_{i}_bn"] = f"{ours}/norm{i}"
        if block == 1:
            layers[f"{theirs}_0_conv"] = f"{ours}/shortcut"
            layers[f"{theirs}_0_bn"] = f"{ours}/shortcut_norm"
    return _keras_places(layers, model, first="conv1_conv")


def keras_vgg(model: Mapping[str, Any]) -> dict[str, Place]:
    layers = {"predictions": "head"}
    for stage, i, _ in _blocks(model["stage_sizes"]):
        layers[f"block{stage}_conv{i}"] = f"stage{stage}_conv{i}"
    for i in range(1, len(model["dense_sizes"]) + 1):
        layers[f"fc{i}"] = f"dense{i}"
    return _keras_places(layers, model, first="block1_conv1")


LAYOUTS: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (torch_resnet, torch_vgg, torch_efficientnet, keras_resnet, keras_vgg)
}


def _blocks(stage_sizes: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Yields stage, block and our name of each block."""
    for stage, blocks in enumerate(stage_sizes, start=1):
        for block in range(1, blocks + 1):
            yield stage, block, f"stage{stage}_block{block}"


def _torch_places(layers: Mapping[str, str], model: Mapping[str, Any]) -> dict[str, Place]:
    """Returns the places of PyTorch's arrays, from our path of each of its layers."""
    places = {}
    for layer, ours in layers.items():
        path = tuple(ours.split("/"))
        if "norm" in path[-1]:
            places[f"{layer}.weight"] = Place(("params", *path, "scale"), _as_it_is)
            places[f"{layer}.bias"] = Place(("params", *path, "bias"), _as_it_is)
            places[f"{layer}.running_mean"] = Place(("batch_stats", *path, "mean"), _as_it_is)
            places[f"{layer}.running_var"] = Place(("batch_stats", *path, "var"), _as_it_is)
        else:
            places[f"{layer}.weight"] = Place(("params", *path, "kernel"), _kernel)
            if path[0] == "head" or path[0].startswith("dense") or _has_bias(model):
                places[f"{layer}.bias"] = Place(("params", *path, "bias"), _as_it_is)
    return places


def _has_bias(model: Mapping[str, Any]) -> bool:
    """Returns whether the convolutions of a network have biases."""
    return model["name"] == "vgg" or model.get("conv_bias", False)


def _keras_places(
    layers: Mapping[str, str], model: Mapping[str, Any], first: str
) -> dict[str, Place]:
    """Returns the places of Keras's arrays; `first` is the layer that gets blue, green, red."""
    places = {}
    for layer, ours in layers.items():
        path = tuple(ours.split("/"))
        norm = "norm" in path[-1]
        for role, (collection, parameter) in (NORM_ROLES if norm else LAYER_ROLES).items():
            if (
                role == "bias"
                and path[0] != "head"
                and not (path[0].startswith("dense") or _has_bias(model))
            ):
                continue
            places[f"{layer}/{role}"] = Place((collection, *path, parameter), _as_it_is)
    kernel = places[f"{first}/kernel"]
    places[f"{first}/kernel"] = kernel._replace(turn=lambda a: a[:, :, ::-1])
    return places


def _as_it_is(array: np.ndarray) -> np.ndarray:
    return array


def _kernel(array: np.ndarray) -> np.ndarray:
    """From (out, in) or (out, in, rows, columns) to ([rows, columns,] in, out)."""
    return np.moveaxis(array, (0, 1), (-1, -2))


def _channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    """A dense kernel of a flattened map whose channels come first, (out, C·H·W), (H = W)."""
    size = round((array.shape[1] / channels) ** 0.5) if array.ndim == 2 else 0
    if array.ndim != 2 or size * size * channels != array.shape[1]:
        return _kernel(array)  # Its shape is refused.
    maps = array.reshape(-1, channels, size, size)
    return np.moveaxis(maps, 1, -1).reshape(len(array), -1).T
