"""Depthwise convolutions as sums over the kernel's taps, for XLA on CPU.

On CPU XLA computes a depthwise convolution 6 to 60 times slower than the same sum of shifted and
weighted maps, and its gradient 10 to 50 times slower (32 images of 4 to 64 px, 32 to 1,152
channels, float32, 2 cores, jax 0.10.1). Elsewhere it has fast kernels for them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aim_flax.layers.convolution import Pads, is_undilated, pad, plain, shifted
from aim_flax.layers.pointwise import pointwise_product
from aim_flax.layers.sums import sum_dtype


def depthwise_taps(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` that computes depthwise convolutions on CPU by taps.

    For the `conv_general_dilated` argument of `nn.Conv`; parameters stay as they are. That of
    channels-last images with one kernel for each channel, undilated, is meant; all others go to
    `pointwise_product`. It can be differentiated once, in reverse.

    Returns:
      What `jax.lax.conv_general_dilated` returns, but for rounding.
    """
    if not _is_depthwise(lhs, rhs, options):
        return pointwise_product(lhs, rhs, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _depthwise(lhs, rhs, tuple(window_strides), pads)


def _is_depthwise(lhs: jax.Array, rhs: jax.Array, options: Mapping[str, Any]) -> bool:
    groups = options.get("feature_group_count", 1)
    if rhs.ndim != 4 or not 1 < groups == lhs.shape[-1] == rhs.shape[-1]:
        return False
    if options.get("precision") is not None:
        return False
    return is_undilated(lhs, rhs, options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Returns (B, H', W', C) for x (B, H, W, C) and a kernel (k, k, 1, C)."""
    given = dict(strides=strides, pads=pads)
    # The convolution stands first in what is traced, so that `describe` counts it.
    return jax.lax.platform_dependent(
        x, kernel, default=partial(_convolve, **given), cpu=partial(_sum_of_taps, **given)
    )


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> tuple:
    return _depthwise(x, kernel, strides, pads), (x, kernel)


def _backward(strides: tuple[int, int], pads: Pads, kept: tuple, change: jax.Array) -> tuple:
    given = dict(strides=strides, pads=pads)
    return jax.lax.platform_dependent(
        *kept, change, default=partial(_gradients, **given), cpu=partial(_tap_gradients, **given)
    )


_depthwise.defvjp(_forward, _backward)


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    return plain(x, kernel, strides, pads, groups=x.shape[-1])


def _gradients(
    x: jax.Array, kernel: jax.Array, change: jax.Array, strides: tuple[int, int], pads: Pads
) -> tuple[jax.Array, jax.Array]:
    _, pullback = jax.vjp(partial(_convolve, strides=strides, pads=pads), x, kernel)
    return pullback(change)


def _sum_of_taps(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    (rows, columns), dtype = kernel.shape[:2], sum_dtype(x.dtype)
    size = [
        (n + low + high - k) // stride + 1
        for n, (low, high), k, stride in zip(
            x.shape[1:3], pads, kernel.shape[:2], strides, strict=True
        )
    ]
    x = pad(x, pads)
    weights = kernel.reshape(rows * columns, -1).astype(dtype)
    parts = shifted(x, (rows, columns), size, strides)
    terms = [tap.astype(dtype) * weight for tap, weight in zip(parts, weights, strict=True)]
    return sum(terms[1:], start=terms[0]).astype(x.dtype)


def _tap_gradients(
    x: jax.Array, kernel: jax.Array, change: jax.Array, strides: tuple[int, int], pads: Pads
) -> tuple[jax.Array, jax.Array]:
    # Of the input: the flipped kernel over the changes, set apart by the strides.
    apart = []
    for n, out, (low, _), k, stride in zip(
        x.shape[1:3], change.shape[1:3], pads, kernel.shape[:2], strides, strict=True
    ):
        before = k - 1 - low
        apart.append((before, n + k - 1 - before - ((out - 1) * stride + 1), stride - 1))
    of_x = _sum_of_taps(pad(change, apart), kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)))

    # Of the kernel: sums over the images first, one image after the other, and then over their
    # positions. As one reduction XLA on CPU takes several times as long.
    x = pad(x, pads)
    taps, size = kernel.shape[:2], change.shape[1:3]
    dtype = sum_dtype(x.dtype)

    def add(sums: list[jax.Array], image: tuple[jax.Array, jax.Array]) -> tuple[list, None]:
        one, by = image[0][None], image[1].astype(dtype)
        parts = [tap[0].astype(dtype) for tap in shifted(one, taps, size, strides)]
        return [total + part * by for total, part in zip(sums, parts, strict=True)], None

    zeros = [jnp.zeros(change.shape[1:], dtype)] * (taps[0] * taps[1])
    sums, _ = jax.lax.scan(add, zeros, (x, change))
    of_kernel = jnp.stack([s.sum(axis=(0, 1)) for s in sums]).reshape(kernel.shape)
    return of_x, of_kernel.astype(kernel.dtype)
