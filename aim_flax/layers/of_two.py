"""Layers of two inputs side by side, [x, m], that never put them into one array.

By linearity a layer of [x, m] is the sum of one of x and one of m, each with its part of the
kernel. An m that is the same for all examples is then multiplied once, and broadcast.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

# What profiles call the memory's part of a layer.
SCOPE = "memory_read"


class ConvOfTwo(nn.Conv):
    """`nn.Conv` of [x, m] along the channels, with the same variables."""

    @nn.compact
    def __call__(self, x: jax.Array, m: jax.Array) -> jax.Array:
        """Returns what `nn.Conv` makes of x (B, ..., C) and m (1 or B, ..., D)."""
        return sum(halves(self, x, m))


class DenseOfTwo(nn.Dense):
    """`nn.Dense` of [x, m] along the last axis, with the same variables."""

    @nn.compact
    def __call__(self, x: jax.Array, m: jax.Array) -> jax.Array:
        """Returns what `nn.Dense` makes of x (B, ..., C) and m (1 or B, ..., D)."""
        return sum(halves(self, x, m))


def halves(layer: nn.Conv | nn.Dense, x: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what a layer of [x, m] makes of x, bias included, and what m adds to that.

    Every group of a grouped convolution reads the whole of m: the kernel's part for m is that of an
    ungrouped one. [x, m], with a copy of m for every group, would be larger than x by as many times
    as m has channels.

    Args:
      layer: whose call this is a part of. Its class may be a subclass that changes nothing but
        `__call__`.
      x, m: inputs with as many axes, in one dtype.
    """
    kind, sizes, changes = nn.Dense, (), {}
    if isinstance(layer, nn.Conv):
        size = layer.kernel_size
        kind, sizes = nn.Conv, (size,) if isinstance(size, int) else tuple(size)
        changes = {"feature_group_count": 1}
    own = x.shape[-1] // getattr(layer, "feature_group_count", 1)
    shape = (*sizes, own + m.shape[-1], layer.features)
    # In the order in which the layer makes them, so with the initial values that it would draw.
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    params = {"kernel": kernel[..., :own, :]}
    if layer.use_bias:
        shape = (layer.features,)
        params["bias"] = layer.param("bias", layer.bias_init, shape, layer.param_dtype)
    y = twin(layer, kind).apply({"params": params}, x)
    reader = twin(layer, kind, use_bias=False, **changes)
    with jax.named_scope(SCOPE):
        return y, reader.apply({"params": {"kernel": kernel[..., own:, :]}}, m)


def twin(layer: nn.Module, kind: type[nn.Module], parent: Any = None, **changes: Any) -> nn.Module:
    """Returns a module of the class `kind` with a layer's options."""
    names = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
    options = {name: getattr(layer, name) for name in names}
    return kind(**{**options, **changes}, parent=parent)
