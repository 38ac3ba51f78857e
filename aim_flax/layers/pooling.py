"""Max pooling of images that is quick on XLA's CPU, with its gradient.

XLA takes the largest numbers of windows one by one, and finds where each came from with index maps
of the input's size. Here it compares the taps of the window, as whole maps. Elsewhere all is left
to XLA.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.layers.convolution import Pads, pad, shifted


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


def _size(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> list[int]:
    """Returns the rows and columns that a padded map is pooled to."""
    sizes = zip(x.shape[1:3], window, strides, strict=True)
    return [(n - k) // stride + 1 for n, k, stride in sizes]


def _largest(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], pads: Pads
) -> jax.Array:
    x = pad(x, pads, -jnp.inf)
    first, *others = shifted(x, window, _size(x, window, strides), strides)
    for other in others:
        first = jnp.maximum(first, other)
    return first


def _to_the_largest(
    x: jax.Array,
    y: jax.Array,
    change: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    pads: Pads,
) -> jax.Array:
    """Returns the input's gradient: each window's change, where its largest number stands first."""
    size, padded = x.shape, pad(x, pads, -jnp.inf)
    (down, across), (rows, columns) = strides, y.shape[1:3]
    left, parts = jnp.ones(y.shape, bool), {}
    taps = shifted(padded, window, (rows, columns), strides)
    for n, tap in enumerate(taps):
        is_first = left & (tap == y)
        left &= ~is_first
        i, j = divmod(n, window[1])
        # Positions that are as far from their stride's start are a map of their own.
        part = jnp.where(is_first, change, jnp.zeros((), change.dtype))
        parts.setdefault((i % down, j % across), []).append(((i // down, j // across), part))
    reach = [-(-n // stride) for n, stride in zip(padded.shape[1:3], strides, strict=True)]

    def total(place: tuple[int, int]) -> jax.Array:
        found = jnp.zeros((size[0], *reach, size[3]), change.dtype)
        for (i, j), part in parts.get(place, []):
            found += pad(part, [(i, reach[0] - i - rows), (j, reach[1] - j - columns)])
        return found

    maps = [jnp.stack([total((i, j)) for j in range(across)], axis=3) for i in range(down)]
    whole = jnp.stack(maps, axis=2)
    whole = whole.reshape(size[0], reach[0] * down, reach[1] * across, size[3])
    (top, _), (before, _) = pads
    return whole[:, top : top + size[1], before : before + size[2]]
