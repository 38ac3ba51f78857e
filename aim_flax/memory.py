"""The memory itself, and how it takes a feature map's size.

Source: J. Lunkad, "AiM: Memory for Artificial Intelligence" (March 2021), the article and the
notebook published with it. Shapes: images and feature maps are (B, H, W, C); a convolutional
memory is (1 or B, R, K, D), that is R rows, K columns and D channels; a dense memory is
(1 or B, D). Of maps with n spatial axes, such as (B, T, C) or (B, P, H, W, C), a memory has n as
well; its positions are its slots.
"""

import math
import zlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice

MEMORY_KINDS = ("conv", "dense", "direct", "noise", "zero")
FITS = ("reshape", "resize")


class Memory(nn.Module):
    """A tensor of floats that backpropagation edits: the notebook before anything is written.

    `conv` and `dense` are a layer that is only ever fed ones, so their content is that layer's
    weights (the article's memory block); `direct` has one parameter per float. A 1x1 convolution on
    ones gives the same D values at each of the R·K positions: with `conv` and kernel_size 1 the
    memory holds only D distinct numbers (see `distinct_values`).

    `noise` and `zero` are controls without parameters, which tell what a memory's content is worth
    from what the rest of the latch is: standard normal floats, drawn anew at each training step and
    from a fixed key in evaluation, and all zeros.

    Attributes:
      shape: (R, K, D) for `conv`, (D,) for `dense`, either for the others. For maps with other
        spatial axes than an image's as many sizes and D: (K, D), (P, R, K, D). `dense` also makes
        slots, (S, D), whose contents are independent.
      kind: "conv" (a convolution D -> D, SAME, with bias), "dense" (D -> D with bias, for each
        slot), "direct", "noise" or "zero".
      kernel_size: of the convolution, an int or one for each axis. Published: 1; the author
        suggests (R, K).
      kernel_init: initialiser of the layer's kernel. Glorot uniform, as in the published code,
        gives content of unit variance; `direct` draws its floats from N(0, 1) to match.
      param_dtype: dtype of the parameters and of the memory.

    Raises:
      UsageError: on a shape, kind or kernel size that does not fit the rest.
      flax.errors.InvalidRngError: `noise` in training without a "memory" key.
    """

    shape: Sequence[int]
    kind: str = "conv"
    kernel_size: int | Sequence[int] = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, train: bool = False) -> jax.Array:
        """Returns the memory, (1, *shape): the same for every example, so batch size 1.

        Args:
          train: whether `noise` is drawn from the "memory" key; the other kinds don't ask.
        """
        shape = check_memory(self.shape, self.kind)
        if self.kind == "zero":
            return jnp.zeros((1, *shape), self.param_dtype)
        if self.kind == "noise":
            key = self.make_rng("memory") if train else fixed_key(self.path)
            return jax.random.normal(key, (1, *shape), self.param_dtype)
        if self.kind == "direct":
            init = nn.initializers.normal(stddev=1.0)
            return self.param("content", init, shape, self.param_dtype)[None]
        options = {
            "features": shape[-1],
            "kernel_init": self.kernel_init,
            "param_dtype": self.param_dtype,
        }
        if self.kind == "dense":
            return self._dense(shape, options)
        ones = jnp.ones((1, *shape), self.param_dtype)
        kernel_size = kernel_of(self.kernel_size, len(shape) - 1)
        return nn.Conv(kernel_size=kernel_size, **options, name="conv")(ones)

    def _dense(self, shape: tuple[int, ...], options: dict[str, Any]) -> jax.Array:
        """Returns a Dense layer of ones, (1, D) or (1, S, D): each slot with a kernel D -> D."""
        *slots, channels = shape
        ones = jnp.ones((1, channels), self.param_dtype)
        if not slots:
            return nn.Dense(**options, name="dense")(ones)

        def of_each_slot(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            keys = jax.random.split(key, slots[0])
            kernels = [self.kernel_init(key, (channels, channels), dtype) for key in keys]
            return jnp.concatenate(kernels, axis=1)

        features = {"features": slots[0] * channels, "kernel_init": of_each_slot}
        flat = nn.Dense(**{**options, **features}, name="dense")(ones)
        return flat.reshape(1, *shape)


def check_memory(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """Returns `shape` as a tuple, or raises UsageError when it is none for this kind of memory."""
    check_choice("the memory's kind", kind, MEMORY_KINDS)
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    least, most = {"conv": (2, 4), "dense": (1, 2)}.get(kind, (1, 4))
    if not least <= len(shape) <= most or not _positive(shape):
        forms = {"conv": "(R, K, D), (K, D) or (P, R, K, D)", "dense": "(D,) or (S, D)"}
        form = forms.get(kind, f"(D,), {forms['conv']}")
        raise UsageError(f"a {kind} memory has shape {form}, each at least 1, not {shape}")
    return shape


def distinct_values(
    shape: Sequence[int], kind: str, kernel_size: int | Sequence[int] = 1, count: int = 1
) -> int:
    """Returns how many of the floats of `count` such memories can differ from each other.

    A convolution on ones tells two positions apart only by the part of its kernel that falls
    outside the map, so at most the border differs from the inside.
    """
    shape = check_memory(shape, kind)
    if kind == "zero":
        return 1
    if kind != "conv":
        return count * math.prod(shape)
    *sizes, distinct = shape
    for size, k in zip(sizes, kernel_of(kernel_size, len(sizes)), strict=True):
        before, after = (k - 1) // 2, k // 2
        distinct *= len({(min(i, before), min(size - 1 - i, after)) for i in range(size)})
    return count * distinct


def fixed_key(path: Sequence[str]) -> jax.Array:
    """Returns a key that depends on a module's path alone, for evaluation that can be repeated."""
    return jax.random.fold_in(
        jax.random.key(0), np.uint32(zlib.crc32("/".join(path).encode("utf-8")))
    )


def fit(m: jax.Array, *size: int) -> jax.Array:
    """Reshapes and pads a memory to the spatial size of a feature map, losing nothing.

    The T = R·K·D floats of each example are laid out in row, column, channel order. With
    T >= H·W they fill (H, W, ceil(T / (H·W))), zeros at the tail. With fewer they form the
    smallest square that holds them, S = ceil(sqrt(T)), zero-padded to S² in front and behind and
    then centred in (H, W, 1); a map too thin for that square gets the floats first and zeros
    behind. Published code: the square maps that divide, or hold, T exactly; here every map. With
    another number of spatial axes than two the square is a line, a cube, ....

    Args:
      m: (N, R, K, D), or any shape (N, ...) and dtype.
      *size: of the feature map, (H, W), or any number of axes, each at least 1.

    Returns:
      (N, *size, channels), dtype of `m`: dropping the padding gives back every float of `m`
      exactly once.
    """
    n, total, area = m.shape[0], math.prod(m.shape[1:]), math.prod(size)
    flat = m.reshape(n, total)
    side = _root(total, len(size))
    if total < area and min(size) >= side:
        volume = side ** len(size)
        front = (volume - total) // 2
        square = jnp.pad(flat, ((0, 0), (front, volume - total - front)))
        around = (((n - side) // 2, n - side - (n - side) // 2) for n in size)
        square = square.reshape(n, *(side for _ in size), 1)
        return jnp.pad(square, ((0, 0), *around, (0, 0)))
    channels = -(-total // area)
    tail = jnp.pad(flat, ((0, 0), (0, channels * area - total)))
    return tail.reshape(n, *size, channels)


def resize(m: jax.Array, *size: int) -> jax.Array:
    """Interpolates a memory to the spatial size of a feature map, so that its positions are places.

    Bilinear (linear along each axis), and averaging where the map is the smaller, as
    `jax.image.resize` with antialiasing.

    Args:
      m: (N, R, K, D), floats; as many sizes as the map has.
      *size: of the feature map.

    Returns:
      (N, *size, D), dtype of `m`.

    Raises:
      UsageError: a memory with other spatial axes than the map.
    """
    if m.ndim != len(size) + 2:
        raise UsageError(
            f"fit 'resize' takes a memory with the spatial axes of the map, {len(size)}, but this"
            f" one is {m.shape[1:]}: give it such a shape, or use fit 'reshape'"
        )
    # With float literals, which strict promotion would refuse beside other floats.
    with jax.numpy_dtype_promotion("standard"):
        shape = (m.shape[0], *size, m.shape[-1])
        return jax.image.resize(m, shape, "linear").astype(m.dtype)


def _root(total: int, axes: int) -> int:
    """Returns the smallest integer whose power `axes` is at least `total`."""
    root = max(1, round(total ** (1 / axes)))
    while root**axes < total:
        root += 1
    while root > 1 and (root - 1) ** axes >= total:
        root -= 1
    return root


def computed_dtype(
    x: jax.Array, dtype: jnp.dtype | None, param_dtype: jnp.dtype = jnp.float32
) -> jnp.dtype:
    """Returns the dtype in which a Linen layer of these dtypes computes on an input `x`."""
    if dtype is not None:
        return jnp.dtype(dtype)
    # Under strict promotion a layer that mixes dtypes refuses them itself.
    with jax.numpy_dtype_promotion("standard"):
        found = jnp.result_type(x, param_dtype)
        return found if jnp.issubdtype(found, jnp.inexact) else jnp.result_type(found, jnp.float32)


def kernel_of(size: int | Sequence[int], axes: int = 2) -> tuple[int, ...]:
    """Returns a kernel size with one number for each spatial axis."""
    kernel = tuple(size) if isinstance(size, Sequence) else (size,) * axes
    if len(kernel) != axes or not _positive(kernel):
        number = {1: "one", 2: "two", 3: "three"}.get(axes, str(axes))
        raise UsageError(f"a kernel size is a positive int or {number} of them, not {size!r}")
    return kernel


def _positive(sizes: Sequence[int]) -> bool:
    return all(isinstance(size, Integral) and size >= 1 for size in sizes)
