"""1x1 convolutions as matrix products, for XLA on CPU.

On CPU a 1x1 convolution takes longer than the same product of two matrices, and a product over
several axes of an image sometimes twice as long as one over its pixels in a row. Elsewhere XLA has
fast kernels for convolutions, and on TPU pixels that strides leave would be copied first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aim_flax.layers.convolution import convolution, is_undilated, plain


def pointwise_product(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` that computes 1x1 convolutions on CPU as products.

    For the `conv_general_dilated` argument of `nn.Conv`; parameters stay as they are. An ungrouped
    1x1 convolution of unpadded, undilated, channels-last images becomes a product over channels,
    of the pixels that the strides leave; it can be differentiated in reverse only. All others go to
    `convolution`.

    Returns:
      What `jax.lax.conv_general_dilated` returns, but for rounding.
    """
    if _is_product(lhs, rhs, padding, options):
        return _pointwise(lhs, rhs, tuple(window_strides), options.get("precision"))
    return convolution(lhs, rhs, window_strides, padding, **options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _pointwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any):
    """Returns (B, H', W', F) for x (B, H, W, C) and a kernel (1, 1, C, F)."""
    given = dict(strides=strides, precision=precision)
    return jax.lax.platform_dependent(
        x, kernel, default=partial(_convolve, **given), cpu=partial(_multiply, **given)
    )


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any) -> tuple:
    return _pointwise(x, kernel, strides, precision), (x, kernel)


def _backward(strides: tuple[int, int], precision: Any, kept: tuple, change: jax.Array) -> tuple:
    def gradients(way: Any, x: jax.Array, kernel: jax.Array, change: jax.Array) -> tuple:
        _, pullback = jax.vjp(partial(way, strides=strides, precision=precision), x, kernel)
        return pullback(change)

    ways = {"default": partial(gradients, _convolve), "cpu": partial(gradients, _multiply)}
    return jax.lax.platform_dependent(*kept, change, **ways)


_pointwise.defvjp(_forward, _backward)


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any):
    return plain(x, kernel, strides, "VALID", precision)


def _multiply(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], precision: Any):
    # Slicing first, so that pixels between the strides are never multiplied.
    x = x[:, :: strides[0], :: strides[1]]
    product = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=precision)
    return product.reshape(*x.shape[:-1], -1)


def _is_product(
    lhs: jax.Array,
    rhs: jax.Array,
    padding: str | Sequence[tuple[int, int]],
    options: Mapping[str, Any],
) -> bool:
    if rhs.ndim != 4 or rhs.shape[:2] != (1, 1) or options.get("feature_group_count", 1) != 1:
        return False
    # SAME pads nothing where the kernel covers one pixel, whatever the stride.
    if padding not in ("SAME", "VALID") and any(n != 0 for sides in padding for n in sides):
        return False
    return is_undilated(lhs, rhs, {**options, "rhs_dilation": None})
