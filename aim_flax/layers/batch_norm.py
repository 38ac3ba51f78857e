"""Batch norm whose sums over images and positions are quick on XLA's CPU.

XLA computes a sum over all axes but the last one number at a time, on one core. Here eight slices
of an array are added up, which it does at the speed of memory on all cores, and the rest is summed
as a matrix product with rows of ones, for which it calls a library. Batch norm and relu with their
gradients take a fifth to a third of the time (docs/performance.md). Elsewhere all is left to XLA.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.layers.sums import sum_dtype

_SLICES = 8
# One row would be a matrix-vector product, which XLA compiles itself, with what it takes in.
_ONES = 8


class BatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` of arrays (B, ..., C) over all axes but the last, with the same variables.

    It equals that but for rounding, and can be differentiated in reverse only. Not for masks, or
    groups of devices; it always has a scale and a bias, and sums in float32 at least.
    """

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Returns (B, ..., C) in `dtype`, or in that of the input and the parameters."""
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = x.shape[-1:]
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        kept_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        mean, var = kept_mean.value, kept_var.value
        if not running:
            mean, square = _moments(x)
            if self.axis_name is not None and not self.is_initializing():
                mean, square = jax.lax.pmean((mean, square), self.axis_name)
            var = jnp.maximum(square - mean**2, 0)
            if not self.is_initializing():
                for kept, new in ((kept_mean, mean), (kept_var, var)):
                    kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        y = _affine(x, factor, bias - mean * factor)
        return y.astype(self.dtype or jnp.result_type(x, scale, bias))


@jax.custom_vjp
def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the means of a map's numbers and of their squares, (C,)."""
    count = x.size // x.shape[-1]
    total, squares = _sums(lambda x: (x, x * x), x)
    return total / count, squares / count


def _moments_forward(x: jax.Array) -> tuple:
    return _moments(x), x


def _moments_backward(x: jax.Array, changes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    of_mean, of_square = (change / (x.size // x.shape[-1]) for change in changes)
    return ((of_mean + 2 * of_square * x.astype(of_mean.dtype)).astype(x.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


@jax.custom_vjp
def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns x·factor + offset in the dtype of the factor."""
    return x.astype(factor.dtype) * factor + offset


def _affine_forward(x: jax.Array, factor: jax.Array, offset: jax.Array) -> tuple:
    return _affine(x, factor, offset), (x, factor)


def _affine_backward(kept: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple:
    x, factor = kept
    of_factor, of_offset = _sums(lambda x, by: (x * by, by), x, change)
    dtype = factor.dtype
    return (change * factor).astype(x.dtype), of_factor.astype(dtype), of_offset.astype(dtype)


_affine.defvjp(_affine_forward, _affine_backward)


def _sums(terms: Callable[..., tuple[jax.Array, ...]], *maps: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the sums, (C,), over all axes but the last of what `terms` makes of arrays."""
    dtype = sum_dtype(maps[0].dtype)

    def at_once(*maps: jax.Array) -> tuple[jax.Array, ...]:
        found = terms(*(part.astype(dtype) for part in maps))
        return tuple(part.sum(axis=tuple(range(part.ndim - 1))) for part in found)

    def in_slices(*maps: jax.Array) -> tuple[jax.Array, ...]:
        rows = maps[0].size // maps[0].shape[-1]
        count = next(n for n in range(_SLICES, 0, -1) if rows % n == 0)
        slices = [part.reshape(count, rows // count, -1) for part in maps]
        found = [terms(*(part[i].astype(dtype) for part in slices)) for i in range(count)]
        ones = jnp.ones((_ONES, rows // count), dtype)
        return tuple((ones @ sum(parts[1:], parts[0]))[0] for parts in zip(*found, strict=True))

    return jax.lax.platform_dependent(*maps, default=at_once, cpu=in_slices)
