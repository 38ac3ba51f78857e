"""Convolutions of images that are quick, with their gradients, on XLA's CPU.

XLA computes the gradient of a kernel as a convolution with windows as large as the map. To few
features that takes up to six times as long as products over the kernel's rows, with windows of the
output's changes side by side. On CPUs without AVX-512 it takes two to four times as long as the
convolution itself also from few channels and to many features; there it is a sum of products over
the rows, or over the taps. The gradient of an input takes XLA a transposed kernel: where that is
large and the map small, one product with the kernel as it lies is quicker, whose parts are added
up. A convolution from few channels to few features, such as a small network's first, fills XLA's
vectors badly: with neighbouring columns side by side it takes a sixth to two thirds of the time.
Where a kernel is larger than its map, as in the last stages of networks for small images, XLA takes
up to a hundred times as long as the product with all windows side by side. Elsewhere all is left to
XLA.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from aim_flax.layers.sums import sum_dtype

Pads = tuple[tuple[int, int], tuple[int, int]]
_NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with another gradient of the kernel on CPU.

    For the `conv_general_dilated` argument of `nn.Conv`. Ungrouped, undilated convolutions of
    channels-last images are meant, which can be differentiated in reverse only; all others go to
    `jax.lax`.

    Returns:
      What `jax.lax.conv_general_dilated` returns.
    """
    if not is_undilated(lhs, rhs, options) or options.get("feature_group_count", 1) != 1:
        return jax.lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(lhs, rhs, tuple(window_strides), pads, options.get("precision"))


def is_undilated(lhs: jax.Array, rhs: jax.Array, options: Mapping[str, Any]) -> bool:
    """Returns whether a convolution with these options is of images (B, H, W, C), undilated."""
    dilations = (*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ()))
    if rhs.ndim != 4 or any(n != 1 for n in dilations):
        return False
    numbers, channels_last = (
        jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, form)
        for form in (options.get("dimension_numbers"), _NUMBERS)
    )
    return numbers == channels_last


def plain(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads | str,
    precision: Any = None,
    groups: int = 1,
) -> jax.Array:
    """Returns XLA's convolution, (B, H', W', F), of x (B, H, W, C) and a kernel (k, l, C, F)."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        pads,
        dimension_numbers=_NUMBERS,
        feature_group_count=groups,
        precision=precision,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, precision: Any
) -> jax.Array:
    given = dict(strides=strides, pads=pads, precision=precision)
    _, columns, channels, features = kernel.shape
    default = cpu = partial(plain, **given)
    out = _positions(x.shape[2] + sum(pads[1]), columns, strides[1])
    fold = max(2, 32 // features)
    if _is_larger(kernel, x):
        cpu = partial(_in_windows, **given)
    elif channels < 8 and features < 64 and out % fold == 0:
        cpu = partial(_folded, fold=fold, **given)
    return _by_platform(default, cpu, x, kernel)


def _in_windows(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, precision: Any
) -> jax.Array:
    """Returns the convolution as one product of all windows of x."""
    x = pad(x, pads)
    size = list(map(_positions, x.shape[1:3], kernel.shape[:2], strides))
    windows = jnp.concatenate(list(shifted(x, kernel.shape[:2], size, strides)), axis=-1)
    product = jnp.matmul(
        windows.reshape(-1, windows.shape[-1]),
        kernel.reshape(windows.shape[-1], -1),
        precision=precision,
    )
    return product.reshape(*windows.shape[:3], -1)


def _folded(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
    fold: int,
) -> jax.Array:
    """Returns the convolution with so many neighbouring columns of the output side by side.

    As features of one, so that XLA's vectors are full: the kernel has as many copies, each moved on
    by a stride, with zeros around. `fold` must divide the output's columns.
    """
    rows, columns, channels, features = kernel.shape
    step = fold * strides[1]
    taps = -(-((fold - 1) * strides[1] + columns) // step)
    out = _positions(x.shape[2] + sum(pads[1]), columns, strides[1])
    parts = out // fold + taps - 1
    x = pad(x, (pads[0], (pads[1][0], parts * step - x.shape[2] - pads[1][0])))
    empty = taps * step - columns
    before = [i * strides[1] for i in range(fold)]
    moved = [jnp.pad(kernel, ((0, 0), (n, empty - n), (0, 0), (0, 0))) for n in before]
    kernel = jnp.stack(moved, axis=-2)
    y = plain(
        x.reshape(*x.shape[:2], parts, step * channels),
        kernel.reshape(rows, taps, step * channels, fold * features),
        (strides[0], 1),
        "VALID",
        precision,
    )
    return y.reshape(*y.shape[:2], out, features)


def _forward(x: jax.Array, kernel: jax.Array, *given: Any) -> tuple:
    return _convolve(x, kernel, *given), (x, kernel)


def _backward(
    strides: tuple[int, int], pads: Pads, precision: Any, kept: tuple, change: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    given = dict(strides=strides, pads=pads, precision=precision)
    channels, features = x.shape[-1], change.shape[-1]

    def as_convolution(x: jax.Array, change: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: plain(x, kernel, **given), kernel)[1](change)[0]

    def as_products(x: jax.Array, change: jax.Array) -> jax.Array:
        multiply = partial(jnp.matmul, precision=precision)
        if windows_of_changes:
            return _windows_of_changes(multiply, x, change, kernel.shape, pads)
        x = pad(x, pads)
        if channels < 8:
            return _windows(multiply, x, change, kernel.shape, strides)
        taps = shifted(x, kernel.shape[:2], change.shape[1:3], strides)
        return _products(multiply, taps, change, kernel.shape)

    windows_of_changes = channels >= 4 * features and strides == (1, 1)
    # Those of few channels are convolved as quickly, or quicker, and need no room beside them.
    few = features <= 16 or 8 <= channels <= 32
    left = not windows_of_changes and (few or _has_avx512())
    of_kernel = _by_platform(as_convolution, as_convolution if left else as_products, x, change)

    def as_transposed(kernel: jax.Array, change: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: plain(x, kernel, **given), x)[1](change)[0]

    def as_product(kernel: jax.Array, change: jax.Array) -> jax.Array:
        return _to_input(kernel, change, x.shape[1:3], **given)

    larger = _is_larger(kernel, x) or _is_larger(kernel, change)
    whole = larger or kernel.size >= 2 * change.size
    way = as_product if whole else as_transposed
    return _by_platform(as_transposed, way, kernel, change), of_kernel


def _by_platform(default: Any, cpu: Any, *arrays: jax.Array) -> jax.Array:
    """Returns what one of two functions makes of arrays; where they are one, it is traced once."""
    if cpu is default:
        return default(*arrays)
    return jax.lax.platform_dependent(*arrays, default=default, cpu=cpu)


def _to_input(
    kernel: jax.Array,
    change: jax.Array,
    size: Sequence[int],
    strides: tuple[int, int],
    pads: Pads,
    precision: Any,
) -> jax.Array:
    """Returns an input's gradient, (B, *size, C), of one product with the kernel as it lies."""
    rows, columns, channels, features = kernel.shape
    product = jax.lax.dot_general(
        change.reshape(-1, features),
        kernel.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=sum_dtype(change.dtype),
    )
    product = product.reshape(*change.shape[:3], rows, columns, channels)

    def around(tap: int, axis: int) -> tuple[int, int, int]:
        before, stride = tap - pads[axis][0], strides[axis]
        behind = size[axis] - before - (change.shape[1 + axis] - 1) * stride - 1
        return before, behind, stride - 1

    first, *others = (
        pad(product[:, :, :, i, j], (around(i, 0), around(j, 1)))
        for i in range(rows)
        for j in range(columns)
    )
    return sum(others, first).astype(change.dtype)


@cache
def _has_avx512() -> bool:
    """Returns whether this machine's CPU has AVX-512, as far as Linux says so."""
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _positions(size: int, taps: int, stride: int) -> int:
    """Returns how many positions a convolution has along a padded axis of this size."""
    return (size - taps) // stride + 1


def _is_larger(kernel: jax.Array, x: jax.Array) -> bool:
    """Returns whether a kernel has more taps than a map has positions."""
    return math.prod(kernel.shape[:2]) > math.prod(x.shape[1:3])


_convolve.defvjp(_forward, _backward)


def _products(
    multiply: Any, parts: Iterable[jax.Array], change: jax.Array, shape: Sequence[int]
) -> jax.Array:
    """Returns a kernel's gradient, of this shape, as one product for each part of the input."""
    change = change.reshape(-1, change.shape[-1])
    found = [multiply(part.reshape(-1, part.shape[-1]).T, change) for part in parts]
    return jnp.stack(found).reshape(shape)


def _windows(
    multiply: Any,
    x: jax.Array,
    change: jax.Array,
    shape: Sequence[int],
    strides: tuple[int, int],
) -> jax.Array:
    """Returns the kernel's gradient as one product for each of its rows, of a padded x."""
    height, width = change.shape[1:3]
    x = _side_by_side(x, shape[1], width, strides[1])
    rows = shifted(x, (shape[0], 1), (height, width), (strides[0], 1))
    return _products(multiply, rows, change, shape)


def _side_by_side(x: jax.Array, columns: int, width: int, stride: int) -> jax.Array:
    """Returns the columns that each column of a kernel's windows is over, (B, H, width, l * C)."""
    parts = shifted(x, (1, columns), (x.shape[1], width), (1, stride))
    return jnp.concatenate(list(parts), axis=-1)


def _windows_of_changes(
    multiply: Any, x: jax.Array, change: jax.Array, shape: Sequence[int], pads: Pads
) -> jax.Array:
    """Returns the kernel's gradient, for strides of 1, with windows of the output's changes.

    What a tap is to the input, the opposite one is to the output.
    """
    rows, columns, channels, features = shape
    sizes = zip(x.shape[1:3], change.shape[1:3], (rows, columns), pads, strict=True)
    around = [(k - 1 - low, n + low - out) for n, out, k, (low, _) in sizes]
    turned = (rows, columns, features, channels)
    found = _windows(multiply, pad(change, around), x, turned, (1, 1))
    return found[::-1, ::-1].swapaxes(2, 3)


def pad(x: jax.Array, pads: Sequence[Sequence[int]], value: float = 0) -> jax.Array:
    """Pads rows and columns of maps, (B, H, W, C).

    Args:
      pads: for rows and for columns how many come before and behind, and, if not 0, between them; a
        negative number takes some away.
    """
    around = [(0, 0, 0), *((*sides, 0)[:3] for sides in pads), (0, 0, 0)]
    return jax.lax.pad(x, jnp.full((), value, x.dtype), around)


def shifted(
    x: jax.Array, taps: Sequence[int], size: Sequence[int], strides: Sequence[int]
) -> Iterator[jax.Array]:
    """Yields, for each tap of a kernel, the part of a padded map that it is multiplied with."""
    stops = [(n - 1) * stride + 1 for n, stride in zip(size, strides, strict=True)]
    for i in range(taps[0]):
        for j in range(taps[1]):
            yield x[:, i : i + stops[0] : strides[0], j : j + stops[1] : strides[1]]
