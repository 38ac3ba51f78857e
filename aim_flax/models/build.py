"""Builds the network that a config describes."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.instead import Instead
from aim_flax.latch import AiM
from aim_flax.memory import Memory, check_memory
from aim_flax.models.efficientnet import EfficientNetLite
from aim_flax.models.mlp import MLP
from aim_flax.models.resnet import ResNet
from aim_flax.models.vgg import VGG
from aim_flax.modes import InMode
from aim_flax.updates import MemoryUpdate

MODELS = {"mlp": MLP, "resnet": ResNet, "vgg": VGG, "efficientnet_lite": EfficientNetLite}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Fields that no config sets: Flax's own, and of a latch those for networks that call it themselves.
_NO_OPTIONS = {"parent", "name"}
OF_CALLERS = {"mode", "check_batch", "called", "capture", "watch", "alter_read", "no_write"}


def build_model(config: ConfigDict, axis_name: str | None = None) -> nn.Module:
    """Returns the Linen module of a config: a plain network, or one with a memory latched on, or
    with something else in a memory's place.

    `model.init(key, images, train=False)` gives its variables and
    `model.apply(variables, images, train=False)` logits (B, num_classes), float32, for images
    (B, H, W, C), float32 after the config's `data.scale`, `mean` and `deviation`.

    Args:
      config: with `model` (a `name`, of MODELS or "package.module:Class" for a Linen module from
        anywhere, that class's fields, and `pretrained`, see `models.pretrained`), `memory` (None,
        or the fields of `Memory` and `AiM`, those of `MemoryUpdate` under `update_block`, and
        `learning_rate_scale`, which is the optimiser's: see `build_optimizer`), `instead` (the
        fields of `Instead`, of which `kind` may be None; it may be missing) and `dtype`.
      axis_name: the device axis over which training averages batch statistics and the carried
        memory; None on one device.

    Raises:
      UsageError: an unknown name or field, with the nearest valid one; the size of a kernel that
        this memory doesn't have; a class that cannot be imported, or does not compute in the
        `dtype` of the config.
    """
    check_choice("dtype", config.dtype, DTYPES)
    common = dict(axis_name=axis_name, dtype=DTYPES[config.dtype])
    fields = _values(config.model)
    name = config.model.name
    if name not in MODELS:
        # With attributes, and with a hash, as networks that take a ConfigDict need them.
        groups = {k: v for k, v in config.model.items() if isinstance(v, Mapping | ConfigDict)}
        fields |= {key: FrozenConfigDict(group) for key, group in groups.items()}
    del fields["name"]
    fields.pop("pretrained", None)
    network = network_class(name)
    known = {key: value for key, value in common.items() if key in field_names(network)}
    if "dtype" not in known and config.dtype != "float32":
        raise UsageError(f"dtype is {config.dtype}, but {name} has no field dtype to be told so")
    if "num_classes" not in field_names(network):
        raise UsageError(
            f"{name} has no field num_classes, by which it is told how many classes there are: give"
            " it one, or put it into a module that has it"
        )
    backbone = _construct("model", network, fields, **known)
    instead = _values(config.get("instead") or {})
    if instead.get("kind") is not None:
        if config.memory is not None:
            raise UsageError(
                f"instead.kind is {instead['kind']!r}, which takes a memory's place, but the config"
                " has a memory: set it in an arm without one"
            )
        return _construct("instead", Instead, instead, backbone=backbone)
    for key, value in instead.items():
        if value:
            raise UsageError(f"instead.{key} is {value!r}, but instead.kind is None")
    if config.memory is None:
        return backbone if name in MODELS else InMode(backbone)
    fields = _values(config.memory)
    fields.pop("learning_rate_scale", None)
    of_update = fields.pop("update_block", {})
    update = _construct("memory.update_block", MemoryUpdate, of_update, **common)
    of_memory = {f: fields.pop(f) for f in ("shape", "kind", "kernel_size") if f in fields}
    memory = _construct("memory", Memory, of_memory)
    _check_kernels(memory, update)
    return _construct("memory", AiM, fields, backbone=backbone, memory=memory, update=update)


def check_logits(output: Any, name: str, classes: int) -> None:
    """Raises UsageError unless what a network makes of one image is its logits, (1, classes)."""
    expected = f"logits (B, {classes}), one for each class, as a single array of floats"
    if not hasattr(output, "shape"):
        what = f"a {type(output).__name__}"
        if isinstance(output, tuple | list):
            what += f" of {len(output)}"
        elif isinstance(output, Mapping):
            what += f" with {', '.join(sorted(map(str, output)))}"
        raise UsageError(
            f"{name} returns {what}, expected {expected}: put it into a module that returns those"
        )
    if output.shape != (1, classes) or not jnp.issubdtype(output.dtype, jnp.floating):
        raise UsageError(
            f"{name} makes {output.dtype} {output.shape} of one image, expected {expected}"
        )


def plain(config: ConfigDict) -> ConfigDict:
    """Returns the config of the network alone, without what is latched on to it."""
    return ConfigDict({**config, "memory": None, "instead": None})


def network_class(name: str) -> type[nn.Module]:
    """Returns the class of a `model.name`; a package is looked for in the working directory, too.

    Raises:
      UsageError: no such class, or one that is no Linen module.
    """
    if ":" not in name:
        check_choice("model.name (or package.module:Class)", name, MODELS)
        return MODELS[name]
    path, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # As `python -m` does; a script's own folder stands in its place.
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise UsageError(f"model.name is {name!r}, but: {error}") from None
    except Exception as error:  # Whatever a module of someone's own raises.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"model.name is {name!r}, but importing {path} fails: {text}") from None
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        values = vars(module).items()
        classes = [n for n, v in values if isinstance(v, type) and issubclass(v, nn.Module)]
        raise UsageError(
            f"model.name is {name!r}, but {path} has no Linen module"
            f" {attribute!r}{nearest(attribute, classes)}"
        )
    return found


def field_names(module: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(module)}


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group of the config as keyword arguments: sequences as tuples, for hashing."""
    values = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            value = _values(value)
        values[key] = _as_tuple(value)
    return values


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _construct(
    group: str, module: type[nn.Module], options: dict[str, Any], **given: Any
) -> nn.Module:
    """Returns the module with the options of a group of the config, and the other fields given."""
    valid = field_names(module) - _NO_OPTIONS - given.keys()
    if module in (AiM, Instead):
        valid -= OF_CALLERS
    for key in options:
        if key not in valid:
            raise UsageError(
                f"{group}.{key} is no option of {module.__name__}{nearest(key, valid)}"
            )
    try:
        return module(**options, **given)
    except TypeError as error:  # A field of a network from elsewhere that has no default.
        raise UsageError(f"{group}: {error}") from None


def _check_kernels(memory: Memory, update: MemoryUpdate) -> None:
    """Raises UsageError if the size of a kernel is set that isn't there."""
    vector = len(check_memory(memory.shape, memory.kind)) == 1
    # Noise and zeros may stand in for a convolution with any kernel.
    no_kernel = vector or memory.kind in ("dense", "direct")
    if memory.kernel_size != Memory.kernel_size and no_kernel:
        raise UsageError(
            f"memory.kernel_size is {memory.kernel_size}, but a {memory.kind} memory of shape"
            f" {memory.shape} has no kernel: leave it {Memory.kernel_size}"
        )
    no_convolution = vector or update.form != "published"
    if update.kernel_size != MemoryUpdate.kernel_size and no_convolution:
        raise UsageError(
            f"memory.update_block.kernel_size is {update.kernel_size}, but {update.form} updates of"
            f" a memory of shape {memory.shape} have no convolution: leave it"
            f" {MemoryUpdate.kernel_size}"
        )


def trained(model: nn.Module) -> nn.Module:
    """Returns a run's network: that its memory follows the batch was seen in training, or when its
    variables were made. To see it the network is traced once more."""
    return model.clone(check_batch=False) if isinstance(model, AiM) else model
