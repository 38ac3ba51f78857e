"""The parts of AiM: the memory parameter, reshape-and-pad, and the update block.

Source: J. Lunkad, "AiM: Memory for Artificial Intelligence" (March 2021), the article and the
notebook published with it. Shapes: images and feature maps are (B, H, W, C); a convolutional
memory is (1 or B, R, K, D), that is R rows, K columns and D channels; a dense memory is
(1 or B, D).
"""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice

MEMORY_KINDS = ("conv", "dense", "direct", "noise", "zero")
UPDATE_MODES = ("replace", "residual", "gated")
POOLS = ("mean", "causal")
_GATE_BIAS = -2.0  # a new gate is open by sigmoid(-2), 12 %


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
      shape: (R, K, D) for `conv`, (D,) for `dense`, either for the others.
      kind: "conv" (a convolution D -> D, SAME, with bias), "dense" (D -> D with bias), "direct",
        "noise" or "zero".
      kernel_size: of the convolution, an int or (rows, columns). Published: 1; the author
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
        ones = jnp.ones((1, *shape), self.param_dtype)
        if self.kind == "dense":
            return nn.Dense(**options, name="dense")(ones)
        return nn.Conv(kernel_size=pair(self.kernel_size), **options, name="conv")(ones)


def check_memory(shape: Sequence[int], kind: str) -> tuple[int, ...]:
    """Returns `shape` as a tuple, or raises UsageError when it is none for this kind of memory."""
    check_choice("the memory's kind", kind, MEMORY_KINDS)
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    ranks = {"conv": (3,), "dense": (1,)}.get(kind, (1, 3))
    if len(shape) not in ranks or not _positive(shape):
        forms = " or ".join({1: "(D,)", 3: "(R, K, D)"}[rank] for rank in ranks)
        raise UsageError(f"a {kind} memory has shape {forms}, each at least 1, not {shape}")
    return shape


def distinct_values(shape: Sequence[int], kind: str, kernel_size: int | Sequence[int] = 1) -> int:
    """Returns how many of the memory's floats can differ from each other.

    A convolution on ones tells two positions apart only by the part of its kernel that falls
    outside the map, so at most the border differs from the inside.
    """
    shape = check_memory(shape, kind)
    if kind == "zero":
        return 1
    if kind != "conv":
        return math.prod(shape)
    kernel = pair(kernel_size)
    distinct = shape[-1]
    for size, k in zip(shape[:2], kernel, strict=True):
        before, after = (k - 1) // 2, k // 2
        distinct *= len({(min(i, before), min(size - 1 - i, after)) for i in range(size)})
    return distinct


def fixed_key(path: Sequence[str]) -> jax.Array:
    """Returns a key that depends on a module's path alone, for evaluation that can be repeated."""
    return jax.random.fold_in(
        jax.random.key(0), np.uint32(zlib.crc32("/".join(path).encode("utf-8")))
    )


def fit(m: jax.Array, height: int, width: int) -> jax.Array:
    """Reshapes and pads a memory to the spatial size of a feature map, losing nothing.

    The T = R·K·D floats of each example are laid out in row, column, channel order. With
    T >= H·W they fill (H, W, ceil(T / (H·W))), zeros at the tail. With fewer they form the
    smallest square that holds them, S = ceil(sqrt(T)), zero-padded to S² in front and behind and
    then centred in (H, W, 1); a map too thin for that square gets the floats first and zeros
    behind. Published code: the square maps that divide, or hold, T exactly; here every map.

    Args:
      m: (N, R, K, D), any dtype.
      height, width: of the feature map, at least 1.

    Returns:
      (N, height, width, channels), dtype of `m`: dropping the padding gives back every float
      of `m` exactly once.
    """
    n, total, area = m.shape[0], math.prod(m.shape[1:]), height * width
    flat = m.reshape(n, total)
    side = math.isqrt(total - 1) + 1
    if total < area and height >= side and width >= side:
        front = (side**2 - total) // 2
        square = jnp.pad(flat, ((0, 0), (front, side**2 - total - front)))
        top, left = (height - side) // 2, (width - side) // 2
        return jnp.pad(
            square.reshape(n, side, side, 1),
            ((0, 0), (top, height - side - top), (left, width - side - left), (0, 0)),
        )
    channels = -(-total // area)
    tail = jnp.pad(flat, ((0, 0), (0, channels * area - total)))
    return tail.reshape(n, height, width, channels)


class MemoryUpdate(nn.Module):
    """Rewrites the memory from a feature map and the memory as it was.

    Convolutional form (the article's memory update block): [x, fit(m)] -> 3 x (convolution ->
    batch norm -> sigmoid) -> average pool to (R, K) -> 1x1 convolution to D channels. Dense
    form: [x, m] -> 3 x (Dense -> batch norm -> sigmoid) -> Dense to D.

    A dense memory that is updated from more than one position, (B, T, C) or (B, H, W, C), has to
    be told how: `pool` "mean" averages x over all positions, so that whoever reads the memory sees
    all of them, later ones included. "causal", for (B, T, C), averages at position t those up to
    t: the memory is then (B, T, D), and position t of a layer reads its own. There layer norm (J.
    L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016) takes the place of batch norm,
    whose statistics in training are over all positions.

    That output takes the memory's place in mode `replace`, as published. With batch norm in front
    of it, nothing of the old memory is sure to get through; the other two modes keep what they
    don't change. `residual` adds the output to the memory, from a last layer that starts at zero,
    so that a new block changes nothing. `gated` moves the memory towards the output, each float by
    its own gate between 0 and 1, the sigmoid of a second last layer: the update of a GRU (K. Cho et
    al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014), with gates that start
    almost closed as in highway networks (R. K. Srivastava, K. Greff, J. Schmidhuber, "Training Very
    Deep Networks", 2015).

    Attributes:
      features: widths of the convolutions or Dense layers. Published: 16, 16, 32.
      kernel_size: of the convolutions.
      momentum, epsilon: of the batch norms. Published (Keras defaults): 0.99, 1e-3.
      axis_name: device axis over which batch statistics are averaged in training, or None.
      dtype: of the computation; None takes the inputs' and parameters' own.
      mode: "replace", "residual" (m + output) or "gated" (m + gate·(output - m)).
      pool: of a dense memory: "mean", "causal", or None where x has one position, (B, C).

    Raises:
      UsageError: on an unknown mode or pool, a bad kernel size, an x or a mask that don't fit them.
    """

    features: Sequence[int] = (16, 16, 32)
    kernel_size: int | Sequence[int] = 3
    momentum: float = 0.99
    epsilon: float = 1e-3
    axis_name: str | None = None
    dtype: jnp.dtype | None = None
    mode: str = "replace"
    pool: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        m: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        decode: bool = False,
    ) -> jax.Array:
        """Returns the new memory, one per example, or with `causal` one per example and position.

        Args:
          x: (B, H, W, C) for a convolutional memory, (B, C) or, with a pool, (B, ..., C) for a
            dense one; any dtype.
          m: (1 or B, R, K, D); (1 or B, D); with `causal` (1, D) or (B, T, D).
          train: whether batch norm uses (and records) the statistics of this batch.
          mask: of a pool, booleans or numbers (B, ...), the leading axes of x: False (0) leaves a
            position out. Without one all count; an x (B, C) has no positions.
          decode: with `causal`, whether x goes on where the last call ended; what came before is
            kept in the collection "cache", and must be mutable.

        Returns:
          (B, R, K, D), (B, D) or (B, T, D), in the dtype of the computation with `replace`, else in
          m's.
        """
        check_choice("the update block's mode", self.mode, UPDATE_MODES)
        before = m
        convolutional = m.ndim == 4
        self._check_pool(x, m, mask, decode)
        if convolutional:
            rows, columns, channels = m.shape[1:]
            m = fit(m, x.shape[1], x.shape[2])
        else:
            channels = m.shape[-1]
            if self.pool == "causal":
                x = self._pool_causally(x, mask, decode)
                m = m if m.ndim == 3 else m[:, None]
            else:
                x = pool_mean(x, mask)
        # In what the layers compute in: numbers of the memory are lost in an integer's.
        dtype = computed_dtype(x, self.dtype)
        m = jnp.broadcast_to(m, (*x.shape[:-1], m.shape[-1]))
        h = jnp.concatenate([x.astype(dtype), m.astype(dtype)], axis=-1)
        if convolutional:
            kind, layer = "conv", partial(nn.Conv, kernel_size=pair(self.kernel_size))
            output = partial(nn.Conv, kernel_size=(1, 1))
        else:
            kind, layer, output = "dense", nn.Dense, nn.Dense
        for i, features in enumerate(self.features, start=1):
            h = layer(
                features=features,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"{kind}{i}",
            )(h)
            h = nn.sigmoid(self._norm(f"norm{i}", train)(h))
        if convolutional:
            h = average_pool_to(h, rows, columns)
        output = partial(output, features=channels, dtype=self.dtype)
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
        kernel_init = zeros if self.mode == "residual" else glorot
        new = output(kernel_init=kernel_init, name="output")(h)
        if self.mode == "replace":
            return new
        # In the memory's own dtype, in which small changes add up.
        new = new.astype(before.dtype)
        if new.ndim > before.ndim:
            before = before[:, None]
        if self.mode == "residual":
            return before + new
        bias_init = nn.initializers.constant(_GATE_BIAS)
        gate = nn.sigmoid(output(kernel_init=glorot, bias_init=bias_init, name="gate")(h))
        return before + gate.astype(before.dtype) * (new - before)

    def _norm(self, name: str, train: bool) -> nn.Module:
        if self.pool == "causal":
            return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name=name,
        )

    def _check_pool(self, x: jax.Array, m: jax.Array, mask: jax.Array | None, decode: bool) -> None:
        if self.pool is not None:
            check_choice("the update block's pool", self.pool, POOLS)
        if m.ndim == 4:
            if self.pool is not None or mask is not None:
                raise UsageError(
                    "pool and memory_mask are of dense memories: a convolutional one is pooled to"
                    " its rows and columns"
                )
            return
        if self.pool is None and x.ndim > 2:
            raise UsageError(
                f"a dense memory is updated from an array {x.shape}, so it would hold the mean over"
                " all its positions, later ones included: ask for that with"
                " MemoryUpdate(pool='mean'), or for one memory per position, of those up to it,"
                " with pool='causal'"
            )
        if self.pool == "causal" and x.ndim != 3:
            raise UsageError(f"pool 'causal' is for arrays (B, T, C), not {x.shape}")
        if self.pool == "mean" and decode and x.ndim > 2:
            raise UsageError(
                "the network decodes step by step (collection 'cache'), where pool 'mean' sees"
                " other positions than in a full pass: use pool='causal', or decode by full passes"
            )
        if mask is None or x.ndim == 2:
            return
        if not 2 <= mask.ndim < x.ndim or mask.shape != x.shape[: mask.ndim]:
            raise UsageError(
                f"memory_mask has shape {mask.shape}, expected the leading axes of the array"
                f" {x.shape} that the memory is updated from, at least (B, T)"
            )

    def _pool_causally(self, x: jax.Array, mask: jax.Array | None, decode: bool) -> jax.Array:
        """Returns at each position t the mean of x (B, T, C) over positions 0 to t, (B, T, C)."""
        x, counted = _masked(x, mask)
        total, count = jnp.cumsum(x, axis=1), jnp.cumsum(counted, axis=1)
        if decode:
            past = self.variable("cache", "total", jnp.zeros_like, x[:, 0])
            number = self.variable("cache", "count", jnp.zeros_like, counted[:, 0])
            total, count = total + past.value[:, None], count + number.value[:, None]
            if not self.is_initializing():
                past.value, number.value = total[:, -1], count[:, -1]
        return total / jnp.maximum(count, 1)


def pool_mean(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the mean over all axes between the first and the last.

    Args:
      x: (B, ..., C), any dtype.
      mask: (B, ...), leading axes of x: positions where it is False (0) don't count. (B, C) has
        none.

    Returns:
      (B, C), floats; zeros where no position counts.
    """
    axes = tuple(range(1, x.ndim - 1))
    if mask is None or not axes:
        return x.mean(axis=axes)
    x, counted = _masked(x, mask)
    return x.sum(axis=axes) / jnp.maximum(counted.sum(axis=axes), 1)


def _masked(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns x, as floats, with zeros where it does not count, and 1 or 0 for each position."""
    x = x.astype(computed_dtype(x, None))
    if mask is None:
        return x, jnp.ones((*x.shape[:-1], 1), x.dtype)
    keep = jnp.asarray(mask, bool).reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
    keep = jnp.broadcast_to(keep, (*x.shape[:-1], 1))
    # Not a product, which keeps NaNs.
    return jnp.where(keep, x, jnp.zeros((), x.dtype)), keep.astype(x.dtype)


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


def average_pool_to(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Average-pools maps to a given size, whatever theirs.

    Windows of (H // rows, W // columns), as published, where they give exactly that size;
    else adaptive pooling: cell i averages the map's rows floor(i·H / rows) to
    ceil((i + 1)·H / rows), so that windows overlap, and repeat where the map is the smaller.

    Args:
      x: (B, H, W, C).

    Returns:
      (B, rows, columns, C).
    """
    sizes = list(zip(x.shape[1:3], (rows, columns), strict=True))
    if all(size >= out and size // (size // out) == out for size, out in sizes):
        high, wide = x.shape[1] // rows, x.shape[2] // columns
        x = x[:, : rows * high, : columns * wide]
        # Not nn.avg_pool, which divides by a NumPy integer: strict dtype promotion refuses that.
        x = x.reshape(x.shape[0], rows, high, columns, wide, x.shape[3])
        return x.mean(axis=(2, 4))
    over_rows, over_columns = (jnp.asarray(_pooling(*s), x.dtype) for s in sizes)
    return jnp.einsum("rh,bhwc,kw->brkc", over_rows, x, over_columns)


def _pooling(size: int, out: int) -> np.ndarray:
    """Returns the (out, size) matrix that averages each adaptive window."""
    matrix = np.zeros((out, size))
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns a kernel size as (rows, columns)."""
    kernel = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(kernel) != 2 or not _positive(kernel):
        raise UsageError(f"a kernel size is a positive int or two of them, not {size!r}")
    return kernel


def _positive(sizes: Sequence[int]) -> bool:
    return all(isinstance(size, Integral) and size >= 1 for size in sizes)
