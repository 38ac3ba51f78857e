"""Max pooling of images that is quick on XLA's CPU, with its gradient.

XLA takes the largest numbers of windows one by one, and finds where each came from with index maps
of the input's size. Here the taps of the window are compared as whole maps, those of a row and then
the rows. Elsewhere all is left to XLA.
"""

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.layers.convolution import Pads


def max_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> jax.Array:
    """Returns what `nn.max_pool` makes of images (B, H, W, C), floats.

    It can be differentiated in reverse only. Of equal numbers the first in the window gets the
    gradient, as there.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    with jax.named_scope("max_pool"):  # for profiles
        return _max_pool(x, tuple(window), tuple(strides), pads)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads
) -> jax.Array:
    given = dict(window=window, strides=strides, pads=pads)
    return jax.lax.platform_dependent(
        x, default=partial(_pool, **given), cpu=partial(_largest, **given)
    )


def _forward(x: jax.Array, *given: tuple) -> tuple:
    y = _max_pool(x, *given)
    return y, (x, y)


def _backward(
    window: tuple[int, int], strides: tuple[int, int], pads: Pads, kept: tuple, change: jax.Array
) -> tuple[jax.Array]:
    given = dict(window=window, strides=strides, pads=pads)

    def of_xla(x: jax.Array, y: jax.Array, change: jax.Array) -> jax.Array:
        return jax.vjp(partial(_pool, **given), x)[1](change)[0]

    way = partial(_to_the_largest, **given)
    return (jax.lax.platform_dependent(*kept, change, default=of_xla, cpu=way),)


_max_pool.defvjp(_forward, _backward)


def _pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads) -> jax.Array:
    return nn.max_pool(x, window, strides, pads)


class _Line(NamedTuple):
    """The part of a window that lies along one axis of maps (B, H, W, C)."""

    axis: int
    window: int
    stride: int
    pads: tuple[int, int]

    def padded(self, x: jax.Array) -> jax.Array:
        around = [(0, 0, 0)] * x.ndim
        around[self.axis] = (*self.pads, 0)
        return jax.lax.pad(x, jnp.full((), -jnp.inf, x.dtype), around)

    def taps(self, x: jax.Array) -> Iterator[jax.Array]:
        """Yields, for each place in the window, the numbers of all windows there."""
        x = self.padded(x)
        length = x.shape[self.axis] - self.window
        for first in range(self.window):
            last = first + length // self.stride * self.stride + 1
            # Of a map smaller than the window there are none.
            where = (0, 0) if length < 0 else (first, last)
            yield jax.lax.slice_in_dim(x, *where, self.stride, self.axis)


def _lines(window: tuple[int, int], strides: tuple[int, int], pads: Pads) -> tuple[_Line, _Line]:
    """Returns a window's columns and its rows.

    In this order the first of the rows that have the largest number, and in it the first column, is
    the first in the window.
    """
    rows, columns = map(_Line, (1, 2), window, strides, pads)
    return columns, rows


def _largest(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads
) -> jax.Array:
    for line in _lines(window, strides, pads):
        x = functools.reduce(jnp.maximum, line.taps(x))
    return x


def _to_the_largest(
    x: jax.Array,
    y: jax.Array,
    change: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads,
) -> jax.Array:
    """Returns the input's gradient: each window's change, where its largest number stands first."""
    columns, rows = _lines(window, strides, pads)
    between = functools.reduce(jnp.maximum, columns.taps(x))
    return _along(columns, x, between, _along(rows, between, y, change))


def _along(line: _Line, x: jax.Array, y: jax.Array, change: jax.Array) -> jax.Array:
    """Returns the gradient of a map x of whose numbers in each window y are the largest."""
    axis, stride, zero = line.axis, line.stride, jnp.zeros((), change.dtype)
    size, number = x.shape[axis] + sum(line.pads), y.shape[axis]
    reach = -(-size // stride)
    left = jnp.ones(y.shape, bool)
    # Positions that are as far from their stride's start are a map of their own.
    shape = (*x.shape[:axis], reach, *x.shape[axis + 1 :])
    maps = [jnp.zeros(shape, change.dtype)] * stride
    for n, tap in enumerate(line.taps(x)):
        is_first = left & (tap == y)
        left &= ~is_first
        around = [(0, 0, 0)] * x.ndim
        around[axis] = (n // stride, reach - n // stride - number, 0)
        part = jnp.where(is_first, change, zero)
        maps[n % stride] = maps[n % stride] + jax.lax.pad(part, zero, around)
    whole = jnp.stack(maps, axis=axis + 1)
    whole = whole.reshape(*x.shape[:axis], reach * stride, *x.shape[axis + 1 :])
    low = line.pads[0]
    return jax.lax.slice_in_dim(whole, low, low + x.shape[axis], axis=axis)
