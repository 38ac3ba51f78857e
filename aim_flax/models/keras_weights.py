"""Weights of the published Keras network, as variables of ours.

Source of the layer names: J. Lunkad's published AiM-ResNet50. `res<stage><block>_branch2a/2b/2c`
are a block's convolutions, `_branch1` its shortcut, with stages from 2 to 5 and blocks from a;
`mem_conv<stage>a_branch_a/b/c` and `Memory<stage>a_branch` are an update block, `mem_init` is the
memory that is updated and `mem_global` the one that is not.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from aim_flax.errors import UsageError, nearest

_STAGE_SIZES = (3, 4, 6, 3)
LAYER_ROLES = {"kernel": ("params", "kernel"), "bias": ("params", "bias")}
NORM_ROLES = {
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


def _layers() -> dict[str, str]:
    """Returns the path of our module by the name of the Keras layer."""
    layers = {
        "conv1": "stem/conv",
        "bn_conv1": "stem/norm",
        "mem_init": "memory/conv",
        "mem_global": "memory_initial/conv",
        "fc1000": "head",
    }
    for stage, blocks in enumerate(_STAGE_SIZES, start=1):
        for block, letter in enumerate("abcdef"[:blocks], start=1):
            keras, ours = f"{stage + 1}{letter}", f"stage{stage}_block{block}"
            for i, branch in enumerate("abc", start=1):
                layers[f"res{keras}_branch2{branch}"] = f"{ours}/conv{i}"
                layers[f"bn{keras}_branch2{branch}"] = f"{ours}/norm{i}"
        keras, ours = f"{stage + 1}a", f"stage{stage}_block1"
        layers[f"res{keras}_branch1"] = f"{ours}/shortcut"
        layers[f"bn{keras}_branch1"] = f"{ours}/shortcut_norm"
        if stage < len(_STAGE_SIZES):
            for i, branch in enumerate("abc", start=1):
                layers[f"mem_conv{keras}_branch_{branch}"] = f"{ours}/memory_update/conv{i}"
                layers[f"mem_bn{keras}_branch_2{branch}"] = f"{ours}/memory_update/norm{i}"
            layers[f"Memory{keras}_branch"] = f"{ours}/memory_update/output"
    return layers


def _places() -> dict[str, tuple[str, ...]]:
    """Returns the place in our variables by the weight's name, "layer/role" in Keras."""
    places = {}
    for layer, path in _layers().items():
        roles = NORM_ROLES if "norm" in path else LAYER_ROLES
        for role, (collection, parameter) in roles.items():
            places[f"{layer}/{role}"] = (collection, *path.split("/"), parameter)
    return places


def variables_from_keras(
    weights: Mapping[str, Mapping[str, np.ndarray]], like: Mapping[str, Any], hint: str = ""
) -> dict[str, dict]:
    """Turns weights of the published AiM-ResNet50 into variables of ours.

    Args:
      weights: arrays by layer name and role (kernel, bias, gamma, beta, moving_mean,
        moving_variance).
      like: the variables of `AiM` around `ResNet`, with the published patterns and read_mode
        "concat", or anything else with the same tree and shapes (`jax.eval_shape`);
        `split_reads` gives the "add" form.
      hint: end of the message about a wrong shape.

    Returns:
      {"params": ..., "batch_stats": ...}: the same arrays, dtypes unchanged.

    Raises:
      UsageError: names a weight that is missing, unknown or of the wrong shape; or `like` is of
        another network.
    """
    arrays = traverse_util.flatten_dict(weights, sep="/")
    places = _places()
    shapes = {place: leaf.shape for place, leaf in traverse_util.flatten_dict(like).items()}
    if differing := shapes.keys() ^ places.values():
        raise UsageError(
            "the network is not the published one: only one of them has the variable"
            f" {'/'.join(min(differing))}"
        )
    for name, place in places.items():
        if name not in arrays:
            raise UsageError(
                f"the Keras weights lack {name}, of shape {shapes[place]}"
                + nearest(name, arrays.keys() - places.keys())
            )
    for name in arrays:
        if name not in places:
            raise UsageError(
                f"the Keras weights have {name}, which is none of the published network's"
                + nearest(name, places)
            )
    for name, place in places.items():
        if np.shape(arrays[name]) != shapes[place]:
            raise UsageError(
                f"the Keras weight {name} has shape {np.shape(arrays[name])}, expected"
                f" {shapes[place]}{hint}"
            )
    return traverse_util.unflatten_dict({place: arrays[name] for name, place in places.items()})


def split_reads(variables: Mapping[str, Any], plain_params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the variables of a read_mode "concat" network into those of its "add" form.

    In a read's kernel the input channels are the feature map's first, then the memory's: the
    first stay with the layer, the others become the kernel of its `memory_read`.

    Args:
      variables: of the latched network.
      plain_params: parameters of the backbone without memory, or anything else with the same
        tree and shapes (`jax.eval_shape`).

    Returns:
      `variables` with other "params", whose function is the same.

    Raises:
      UsageError: where a parameter of the backbone is missing, or differs from the plain one in
        more than the number of its input channels.
    """
    params = traverse_util.flatten_dict(variables["params"])
    for place, plain in traverse_util.flatten_dict(plain_params).items():
        name = "/".join(place)
        if place not in params:
            raise UsageError(f"the latched network lacks the backbone's parameter {name}")
        joint = params[place]
        if joint.shape == plain.shape:
            continue
        inputs = plain.shape[-2] if place[-1] == "kernel" else 0
        if not inputs or joint[..., :inputs, :].shape != plain.shape:
            raise UsageError(
                f"the parameter {name} has shape {joint.shape}, which is not {plain.shape} with a"
                " memory's channels appended"
            )
        params[place] = joint[..., :inputs, :]
        params[*place[:-1], "memory_read", "kernel"] = joint[..., inputs:, :]
    return {**variables, "params": traverse_util.unflatten_dict(params)}
