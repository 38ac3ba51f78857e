"""How a memory is rewritten: the update blocks, and how they pool."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice
from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.convolution import convolution
from aim_flax.layers.of_two import ConvOfTwo, DenseOfTwo
from aim_flax.memory import computed_dtype, fit, kernel_of, resize
from aim_flax.windows import window_means

UPDATE_FORMS = ("published", "erase_add", "attend")
UPDATE_MODES = ("replace", "residual", "gated")
POOLS = ("mean", "causal")
_GATE_BIAS = -2.0  # a new gate is open by sigmoid(-2), 12 %


class MemoryUpdate(nn.Module):
    """Rewrites the memory from a feature map and the memory as it was.

    Form `published`, of a convolutional memory (the article's memory update block): [x, fit(m)] ->
    3 x (convolution -> batch norm -> sigmoid) -> average pool to (R, K) -> 1x1 convolution to D
    channels. Of a dense one: [x, m] -> 3 x (Dense -> batch norm -> sigmoid) -> Dense to D.

    The other forms write by slots, which are the positions of a convolutional memory, or the one
    of a dense memory. `erase_add` (A. Graves, G. Wayne, I. Danihelka, "Neural Turing Machines",
    2014): from the hidden layers of the dense form, fed the mean of the slots, come an erase vector
    e in (0, 1), an add vector a, and a weight w for each slot, softmax over the slots of a Dense
    layer plus the products of slots and a query; slot <- slot·(1 - w·e) + w·a. `attend`: each slot
    is a query over the positions of x (as in J. Lee et al., "Set Transformer", 2019, and A. Jaegle
    et al., "Perceiver", 2021), and what it finds is the x of a dense form of its own, with one set
    of weights for all slots. Slots with the same content, such as those of a 1x1 convolution, find
    the same.

    A dense memory that is updated from more than one position, (B, T, C) or (B, H, W, C), has to
    be told how: `pool` "mean" averages x over all positions, so that whoever reads the memory sees
    all of them, later ones included. "causal", for (B, T, C), averages at position t those up to
    t: the memory is then (B, T, D), and position t of a layer reads its own. There layer norm (J.
    L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016) takes the place of batch norm,
    whose statistics in training are over all positions. The same holds of `erase_add`, and of a
    memory (K, D), which is pooled to its K positions. `attend` sees all positions by itself.

    The output takes the memory's place in mode `replace`, as published. With batch norm in front
    of it, nothing of the old memory is sure to get through; the other two modes keep what they
    don't change. `residual` adds the output to the memory, from a last layer that starts at zero,
    so that a new block changes nothing; of `erase_add` it adds without erasing, m + w·a. `gated`
    moves the memory towards the output, each float by its own gate between 0 and 1, the sigmoid of
    a second last layer: the update of a GRU (K. Cho et al., "Learning Phrase Representations using
    RNN Encoder-Decoder", 2014), with gates that start almost closed as in highway networks (R. K.
    Srivastava, K. Greff, J. Schmidhuber, "Training Very Deep Networks", 2015).

    Those with batch norms or convolutions can be differentiated in reverse only: by `jax.grad`, not
    by `jax.jvp` or `jax.hessian`.

    Attributes:
      features: widths of the convolutions or Dense layers. Published: 16, 16, 32.
      kernel_size: of the convolutions.
      momentum, epsilon: of the batch norms. Published (Keras defaults): 0.99, 1e-3.
      axis_name: device axis over which batch statistics are averaged in training, or None.
      dtype: of the computation; None takes the inputs' and parameters' own.
      mode: "replace", "residual" (m + output) or "gated" (m + gate·(output - m)).
      pool: "mean", "causal", or None where x has one position, (B, C), or a map's size is pooled
        to the memory's.
      form: "published", "erase_add" or "attend".

    Raises:
      UsageError: on an unknown form, mode or pool, a bad kernel size, an x or a mask that don't fit
        them.
    """

    features: Sequence[int] = (16, 16, 32)
    kernel_size: int | Sequence[int] = 3
    momentum: float = 0.99
    epsilon: float = 1e-3
    axis_name: str | None = None
    dtype: jnp.dtype | None = None
    mode: str = "replace"
    pool: str | None = None
    form: str = "published"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        m: jax.Array,
        train: bool = False,
        mask: jax.Array | None = None,
        decode: bool = False,
        fitted: str = "reshape",
    ) -> jax.Array:
        """Returns the new memory, one per example, or with `causal` one per example and position.

        Args:
          x: (B, H, W, C) for a convolutional memory of form `published`, with as many spatial axes
            as it has; (B, C) or, with a pool, (B, ..., C) for a dense one and for `erase_add`;
            (B, ..., C) for `attend`; any dtype.
          m: (1 or B, R, K, D); (1 or B, D); with `causal` (1, D) or (B, T, D).
          train: whether batch norm uses (and records) the statistics of this batch.
          mask: of positions that are pooled or attended to, booleans or numbers (B, ...), the
            leading axes of x: False (0) leaves a position out. Without one all count; an x (B, C)
            has no positions.
          decode: with `causal`, whether x goes on where the last call ended; what came before is
            kept in the collection "cache", and must be mutable.
          fitted: how a convolutional memory takes the map's size, see `AiM.fit`.

        Returns:
          The shape of `m` with all B examples, with `causal` (B, T, D); in m's dtype, but with
          `replace` of the forms `published` and `attend` in that of the computation.
        """
        check_choice("the update block's form", self.form, UPDATE_FORMS)
        check_choice("the update block's mode", self.mode, UPDATE_MODES)
        self._check(x, m, mask, decode)
        if self.form == "erase_add":
            return self._erase_and_add(x, m, train, mask, decode)
        if self.form == "attend":
            h = self._hidden(self._found(x, m, mask), m, train)
        elif self._over_maps(m):
            size = x.shape[1:-1]
            m_fitted = resize(m, *size) if fitted == "resize" else fit(m, *size)
            h = self._hidden(x, m_fitted, train, maps=True)
            h = average_pool_to(h, *m.shape[1:-1])
        else:
            h = self._hidden(self._pool(x, mask, decode), self._per_position(m), train)
        layer = nn.Conv if self.form == "published" and self._over_maps(m) else nn.Dense
        options = {"kernel_size": (1,) * (m.ndim - 2)} if layer is nn.Conv else {}
        output = partial(layer, features=m.shape[-1], dtype=self.dtype, **options)
        glorot, zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros
        kernel_init = zeros if self.mode == "residual" else glorot
        new = output(kernel_init=kernel_init, name="output")(h)
        if self.mode == "replace":
            return new
        # In the memory's own dtype, in which small changes add up.
        new = new.astype(m.dtype)
        before = self._per_position(m)
        if self.mode == "residual":
            return before + new
        return self._move(before, new, output, h)

    def _move(self, before: jax.Array, new: jax.Array, layer: partial, h: jax.Array) -> jax.Array:
        """Returns the memory moved towards another, each float by a gate that depends on h."""
        bias_init = nn.initializers.constant(_GATE_BIAS)
        glorot = nn.initializers.glorot_uniform()
        gate = nn.sigmoid(layer(kernel_init=glorot, bias_init=bias_init, name="gate")(h))
        return before + gate.astype(before.dtype) * (new - before)

    def _over_maps(self, m: jax.Array) -> bool:
        """Whether the memory has spatial axes; of a causal one the second axis is the sequence."""
        return m.ndim > 2 and self.pool != "causal"

    def _per_position(self, m: jax.Array) -> jax.Array:
        """Returns a memory (1, D), not written yet, as (1, 1, D) where it will be causal."""
        return m[:, None] if self.pool == "causal" and m.ndim == 2 else m

    def _hidden(self, x: jax.Array, m: jax.Array, train: bool, maps: bool = False) -> jax.Array:
        """Returns [x, m] after the hidden layers, (*x.shape[:-1], features[-1])."""
        # In what the layers compute in: numbers of the memory are lost in an integer's.
        dtype = computed_dtype(x, self.dtype)
        x, m = x.astype(dtype), m.astype(dtype)
        if not self.features:
            m = jnp.broadcast_to(m, (*x.shape[:-1], m.shape[-1]))
            return jnp.concatenate([x, m], axis=-1)
        kind, of_two, layer = "dense", DenseOfTwo, nn.Dense
        if maps:
            size = kernel_of(self.kernel_size, x.ndim - 2)
            options = {"kernel_size": size, "conv_general_dilated": convolution}
            kind, of_two, layer = "conv", *(partial(k, **options) for k in (ConvOfTwo, nn.Conv))
        inputs = (x, m)
        for i, features in enumerate(self.features, start=1):
            h = (of_two if i == 1 else layer)(
                features=features,
                kernel_init=nn.initializers.he_normal(),
                dtype=self.dtype,
                name=f"{kind}{i}",
            )(*inputs)
            inputs = (nn.sigmoid(self._norm(f"norm{i}", train)(h)),)
        return inputs[0]

    def _found(self, x: jax.Array, m: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns what each slot's query finds in x, (B, *m.shape[1:])."""
        channels = m.shape[-1]
        m = m.astype(computed_dtype(m, self.dtype))
        x, counted = masked(x, mask)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        counted = counted.reshape(x.shape[0], 1, -1)
        layer = partial(nn.Dense, features=channels, use_bias=False, dtype=self.dtype)
        q = layer(name="query")(m.reshape(m.shape[0], -1, channels))
        k, v = layer(name="key")(x), layer(name="value")(x)
        q = jnp.broadcast_to(q, (k.shape[0], *q.shape[1:])) * channels**-0.5
        scores = jnp.einsum("bsd,btd->bst", q, k)
        scores = jnp.where(counted > 0, scores, jnp.finfo(scores.dtype).min)
        # Where no position counts, nothing is found.
        weights = nn.softmax(scores) * counted.astype(scores.dtype)
        return jnp.einsum("bst,btd->bsd", weights, v).reshape(v.shape[0], *m.shape[1:])

    def _erase_and_add(
        self, x: jax.Array, m: jax.Array, train: bool, mask: jax.Array | None, decode: bool
    ) -> jax.Array:
        """Returns the memory with each slot erased and added to by its weight."""
        x = self._pool(x, mask, decode)
        before = self._per_position(m)
        # (1 or B, slots, D), and with `causal` (1 or B, 1 or T, 1, D).
        one_each = before.ndim == x.ndim
        slots = before[..., None, :] if one_each else m.reshape(m.shape[0], -1, m.shape[-1])
        h = self._hidden(x, slots.mean(axis=-2), train)
        layer = partial(nn.Dense, dtype=self.dtype)
        number, channels = slots.shape[-2:]
        query = layer(channels, name="query")(h).astype(m.dtype)
        places = layer(number, name="place")(h).astype(m.dtype)
        agreement = (slots * query[..., None, :]).sum(axis=-1) * channels**-0.5
        weight = nn.softmax(places + agreement)[..., None]
        residual = self.mode == "residual"
        init = nn.initializers.zeros if residual else nn.initializers.glorot_uniform()
        add = layer(channels, kernel_init=init, name="add")(h).astype(m.dtype)[..., None, :]
        if residual:
            new = slots + weight * add
        else:
            erase = nn.sigmoid(layer(channels, name="erase")(h)).astype(m.dtype)[..., None, :]
            new = slots * (1 - weight * erase) + weight * add
        if self.mode == "gated":
            new = self._move(slots, new, partial(layer, channels), h[..., None, :])
        return new[..., 0, :] if one_each else new.reshape(new.shape[0], *m.shape[1:])

    def _norm(self, name: str, train: bool) -> nn.Module:
        if self.pool == "causal":
            return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=name)
        return BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name=name,
        )

    def _check(self, x: jax.Array, m: jax.Array, mask: jax.Array | None, decode: bool) -> None:
        if self.pool is not None:
            check_choice("the update block's pool", self.pool, POOLS)
        if self.form == "published" and self._over_maps(m):
            return self._check_map(x, m, mask, decode)
        if x.ndim < 2:
            raise UsageError(_updated_from(m, "(B, ..., C)", x))
        if self.form == "attend" and self.pool is not None:
            raise UsageError(
                f"form 'attend' attends to all positions by itself: leave out pool={self.pool!r}"
            )
        if self.pool is None and x.ndim > 2 and self.form != "attend":
            raise UsageError(
                f"a memory {m.shape[1:]} is updated from an array {x.shape}, so it would hold the"
                " mean over all its positions, later ones included: ask for that with"
                " MemoryUpdate(pool='mean'), or for one memory per position, of those up to it,"
                " with pool='causal'"
            )
        if self.pool == "causal":
            if x.ndim != 3:
                raise UsageError(f"pool 'causal' is for arrays (B, T, C), not {x.shape}")
            if m.ndim > 3 or (m.ndim == 3 and m.shape[1] != x.shape[1]):
                raise UsageError(
                    f"pool 'causal' is for a dense memory (D,), of which it makes one for each of"
                    f" {x.shape[1]} positions, not for {m.shape[1:]}"
                )
        elif decode and x.ndim > 2:
            raise UsageError(_no_decoding(self))
        if mask is None or x.ndim == 2:
            return
        if not 2 <= mask.ndim < x.ndim or mask.shape != x.shape[: mask.ndim]:
            raise UsageError(
                f"memory_mask has shape {mask.shape}, expected the leading axes of the array"
                f" {x.shape} that the memory is updated from, at least (B, T)"
            )

    def _check_map(self, x: jax.Array, m: jax.Array, mask: jax.Array | None, decode: bool) -> None:
        """Raises UsageError where a map can't be pooled to the memory's positions."""
        axes = m.ndim - 2
        if x.ndim != m.ndim:
            forms = {1: "(B, T, C)", 2: "(B, H, W, C)", 3: "(B, P, H, W, C)"}
            raise UsageError(_updated_from(m, forms.get(axes, f"of {axes + 2} axes"), x))
        if mask is not None or (self.pool is not None and axes > 1):
            raise UsageError(
                "pool and memory_mask are of dense memories: a convolutional one is pooled to its"
                " own positions"
            )
        if axes == 1 and self.pool is None:
            raise UsageError(
                f"a memory {m.shape[1:]} is updated from a sequence {x.shape}, so its positions"
                " would hold means over tokens, later ones included: ask for that with"
                " MemoryUpdate(pool='mean')"
            )
        if axes == 1 and decode:
            raise UsageError(_no_decoding(self))

    def _pool(self, x: jax.Array, mask: jax.Array | None, decode: bool) -> jax.Array:
        """Returns the mean over all positions, (B, C), or with `causal` over those up to t."""
        return self._pool_causally(x, mask, decode) if self.pool == "causal" else pool_mean(x, mask)

    @nn.nowrap
    def make_cache(self, x: jax.Array) -> None:
        """Makes, as zeros, what a bound block with `causal` keeps in "cache" of an x (B, T, C)."""
        x, counted = masked(x, None)
        for name, of_step in (("total", x[:, 0]), ("count", counted[:, 0])):
            self.scope.variable("cache", name, jnp.zeros_like, of_step)

    def _pool_causally(self, x: jax.Array, mask: jax.Array | None, decode: bool) -> jax.Array:
        """Returns at each position t the mean of x (B, T, C) over positions 0 to t, (B, T, C)."""
        x, counted = masked(x, mask)
        total, count = jnp.cumsum(x, axis=1), jnp.cumsum(counted, axis=1)
        if decode:
            past = self.variable("cache", "total", jnp.zeros_like, x[:, 0])
            number = self.variable("cache", "count", jnp.zeros_like, counted[:, 0])
            total, count = total + past.value[:, None], count + number.value[:, None]
            if not self.is_initializing():
                past.value, number.value = total[:, -1], count[:, -1]
        return total / jnp.maximum(count, 1)


def _updated_from(m: jax.Array, form: str, x: jax.Array) -> str:
    return f"a memory of shape {m.shape[1:]} is updated from an array {form}, not {x.shape}"


def _no_decoding(update: MemoryUpdate) -> str:
    what = "form 'attend'" if update.form == "attend" else "pool 'mean'"
    return (
        f"the network decodes step by step (collection 'cache'), where {what} sees other positions"
        " than in a full pass: use pool='causal', or decode by full passes"
    )


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
    x, counted = masked(x, mask)
    return x.sum(axis=axes) / jnp.maximum(counted.sum(axis=axes), 1)


def masked(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns x, as floats, with zeros where it does not count, and 1 or 0 for each position.

    Args:
      x: (B, ..., C), any dtype.
      mask: (B, ...), leading axes of x, or None; an x (B, C) has no positions to leave out.

    Returns:
      The shape of x, and (B, ..., 1).
    """
    x = x.astype(computed_dtype(x, None))
    if mask is None or x.ndim == 2:
        return x, jnp.ones((*x.shape[:-1], 1), x.dtype)
    keep = jnp.asarray(mask, bool).reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
    keep = jnp.broadcast_to(keep, (*x.shape[:-1], 1))
    # Not a product, which keeps NaNs.
    return jnp.where(keep, x, jnp.zeros((), x.dtype)), keep.astype(x.dtype)


def average_pool_to(x: jax.Array, *sizes: int) -> jax.Array:
    """Average-pools maps to a given size, whatever theirs.

    Windows of (H // rows, W // columns), as published, where they give exactly that size;
    else adaptive pooling: cell i averages the map's rows floor(i·H / rows) to
    ceil((i + 1)·H / rows), so that windows overlap, and repeat where the map is the smaller.

    Args:
      x: (B, H, W, C), or with any number of spatial axes.
      *sizes: rows and columns, or one size for each of them.

    Returns:
      (B, *sizes, C).
    """
    both = list(zip(x.shape[1:-1], sizes, strict=True))
    if all(size >= out and size // (size // out) == out for size, out in both):
        windows = [size // out for size, out in both]
        kept = (slice(w * out) for w, out in zip(windows, sizes, strict=True))
        x = x[:, *kept]
        # Not nn.avg_pool, which divides by a NumPy integer: strict dtype promotion refuses that.
        cells = [n for pair in zip(sizes, windows, strict=True) for n in pair]
        x = x.reshape(x.shape[0], *cells, x.shape[-1])
        return x.mean(axis=tuple(range(2, 2 * len(sizes) + 1, 2)))
    first, *others = (jnp.asarray(window_means(*pair), x.dtype) for pair in both)
    over, to = "hwp"[: len(sizes)], "rkq"[: len(sizes)]
    pooled, *rest = (a + b for a, b in zip(to, over, strict=True))
    equation = ",".join([pooled, f"b{over}c", *rest])
    return jnp.einsum(f"{equation}->b{to}c", first, x, *others)
