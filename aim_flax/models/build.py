"""Builds the network that a config describes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.latch import AiM
from aim_flax.memory import Memory, MemoryUpdate, check_memory
from aim_flax.models.mlp import MLP
from aim_flax.models.resnet import ResNet
from aim_flax.models.vgg import VGG

MODELS = {"mlp": MLP, "resnet": ResNet, "vgg": VGG}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Fields that no config sets: Flax's own, and those that `intervene` sets.
_NO_OPTIONS = {"parent", "name", "alter_read", "no_write"}


def build_model(config: ConfigDict, axis_name: str | None = None) -> nn.Module:
    """Returns the Linen module of a config: a plain network, or one with a memory latched on.

    `model.init(key, images, train=False)` gives its variables and
    `model.apply(variables, images, train=False)` logits (B, num_classes), for images
    (B, H, W, C).

    Args:
      config: with `model` (a `name` of MODELS and that class's fields), `memory` (None, or the
        fields of `Memory` and `AiM`, those of `MemoryUpdate` under `update_block`, and
        `learning_rate_scale`, which is the optimiser's: see `build_optimizer`) and `dtype`.
      axis_name: the device axis over which training averages batch statistics and the carried
        memory; None on one device.

    Raises:
      UsageError: an unknown name or field, with the nearest valid one; the size of a kernel that
        this memory doesn't have.
    """
    check_choice("dtype", config.dtype, DTYPES)
    common = dict(axis_name=axis_name, dtype=DTYPES[config.dtype])
    fields = _values(config.model)
    name = fields.pop("name")
    check_choice("model.name", name, MODELS)
    backbone = _construct("model", MODELS[name], fields, **common)
    if config.memory is None:
        return backbone
    fields = _values(config.memory)
    fields.pop("learning_rate_scale", None)
    of_update = fields.pop("update_block", {})
    update = _construct("memory.update_block", MemoryUpdate, of_update, **common)
    of_memory = {f: fields.pop(f) for f in ("shape", "kind", "kernel_size") if f in fields}
    memory = _construct("memory", Memory, of_memory)
    _check_kernels(memory, update)
    return _construct("memory", AiM, fields, backbone=backbone, memory=memory, update=update)


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group of the config as keyword arguments: sequences as tuples, for hashing."""
    values = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            value = _values(value)
        values[key] = tuple(value) if isinstance(value, list) else value
    return values


def _construct(
    group: str, module: type[nn.Module], options: dict[str, Any], **given: Any
) -> nn.Module:
    """Returns the module with the options of a group of the config, and the other fields given."""
    valid = {field.name for field in dataclasses.fields(module)} - _NO_OPTIONS - given.keys()
    for key in options:
        if key not in valid:
            raise UsageError(
                f"{group}.{key} is no option of {module.__name__}{nearest(key, valid)}"
            )
    return module(**options, **given)


def _check_kernels(memory: Memory, update: MemoryUpdate) -> None:
    """Raises UsageError if the size of a kernel is set that isn't there."""
    dense = len(check_memory(memory.shape, memory.kind)) == 1
    # Noise and zeros may stand in for a convolution with any kernel.
    if memory.kernel_size != Memory.kernel_size and (dense or memory.kind == "direct"):
        raise UsageError(
            f"memory.kernel_size is {memory.kernel_size}, but a {memory.kind} memory of shape"
            f" {memory.shape} has no kernel: leave it {Memory.kernel_size}"
        )
    if update.kernel_size != MemoryUpdate.kernel_size and dense:
        raise UsageError(
            f"memory.update_block.kernel_size is {update.kernel_size}, but updates of a memory of"
            f" shape {memory.shape} have no convolution: leave it {MemoryUpdate.kernel_size}"
        )
