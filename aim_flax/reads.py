"""How a layer reads a memory: which layers can, in what form, and what comes of it."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from flax.errors import ScopeParamShapeError

from aim_flax.errors import UsageError
from aim_flax.layers.of_two import SCOPE, halves, twin
from aim_flax.memory import computed_dtype, fit, resize

READ_MODES = ("concat", "add", "scale", "attend")
READABLE = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)

# Why there can be no read inside these transformations.
NO_READS = {
    "map_variables": (
        " (nn.WeightNorm, nn.SpectralNorm, ...), which would transform the variables that are"
        " latched on there with the layer's own"
    ),
    "custom_vjp": ", whose gradient is written by hand and knows nothing of the memory",
}


def no_reads_within(transformations: Sequence[str]) -> str | None:
    """Returns which of these, as `scopes.transformations` has them, allows no read, and why."""
    for name, reason in NO_READS.items():
        if any(transformation.startswith(f"{name}(") for transformation in transformations):
            return f"nn.{name}{reason}"
    return None


class UnreadableError(UsageError):
    """A module that cannot read: a mistake where a pattern matches no other."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a memory is read.

    Attributes:
      mode: one of READ_MODES.
      zero_init: whether what is added starts at zero.
      fit: one of `memory.FITS`.
      axes: spatial axes of the memory; one more axis is then a sequence's, see `MemoryUpdate`.
    """

    mode: str
    zero_init: bool
    fit: str
    axes: int


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer's call as the latch sees it.

    Attributes:
      module: the layer.
      path: of the layer in the backbone.
      run: what computes the layer, without looking again at the reads of its own call.
      function: the method that `run` calls, unbound.
      args, kwargs: of the call.
      what: the name of the pattern that matches, for messages.
    """

    module: nn.Module
    path: str
    run: Callable[..., Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    what: str = "read"

    @functools.cached_property
    def x(self) -> jax.Array:
        """The layer's input: the first argument of its call."""
        if self.args:
            return self.args[0]
        if self._first not in self.kwargs:
            raise UsageError(
                f"{self.what} matches {self.path!r}, which is called without its input"
                f" {self._first!r}: give it as the first argument"
            )
        return self.kwargs[self._first]

    @property
    def _first(self) -> str:
        return list(inspect.signature(self.function).parameters)[1]

    def on(self, x: jax.Array, run: Callable[..., Any] | None = None) -> Any:
        """Returns what the layer, or `run` in its place, makes of another input."""
        run = self.run if run is None else run
        if self.args:
            return run(x, *self.args[1:], **self.kwargs)
        return run(**{**self.kwargs, self._first: x})


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Returns the class of READABLE that a layer belongs to, or None."""
    return next((kind for kind in READABLE if isinstance(module, kind)), None)


def is_plain_call(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether a method is the `__call__` of the layer's class of READABLE itself.

    A subclass may wrap it, and call it with `super()`: that inner call is where the layer has its
    input as it is multiplied, and its output before anything else happens to it.
    """
    kind = kind_of(module)
    return kind is not None and function is inspect.unwrap(kind.__call__)


def check_readable(module: nn.Module, path: str, mode: str) -> None:
    """Raises UnreadableError for a layer that cannot read in this mode."""
    kind = kind_of(module)
    refusal = f"read matches {path!r}, but "
    if kind is None:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in READABLE)
        raise UnreadableError(
            f"{refusal}{type(module).__name__} cannot read a memory; these can: {kinds}"
        )
    if mode == "concat" and (changed := _overridden(type(module), kind)):
        raise UnreadableError(
            f"{refusal}its class {type(module).__name__} has a {changed} of its own, so the"
            " memory's part of the kernel would be transformed with the layer's: use read_mode"
            " 'add' or 'scale'"
        )


def _overridden(layer: type[nn.Module], kind: type[nn.Module]) -> str:
    """Returns a name of `kind`'s behaviour, `__call__` aside, that the layer overrides, or ""."""
    fields = {field.name for field in dataclasses.fields(layer)}
    for base in layer.__mro__[: layer.__mro__.index(kind)]:
        for name, value in vars(base).items():
            method = callable(value) and not name.startswith("__") and name not in fields
            if method and hasattr(kind, name):
                return name
    return ""


def read(
    call: Call,
    m: jax.Array,
    form: Form,
    push: Callable[[nn.Module, str], Scope],
    measure: bool,
    called: str,
) -> jax.Array:
    """Returns the layer's output with the memory read into it.

    Args:
      call: of a layer that `check_readable` accepts.
      m: the memory, (1 or B, R, K, D), (1 or B, D), or (B, T, D) with one for each position.
      form: how it is read.
      push: returns the scope of what is latched on to a module as its "read".
      measure: whether to record how much of the output is the memory's.
      called: the memory's name.

    Raises:
      UnreadableError: a layer that cannot read this memory.
      UsageError: a memory and an input of different sizes.
    """
    module, x = call.module, call.x
    check_input(call)
    check_batch(m, x, call.path)
    if form.mode == "concat":
        with jax.named_scope(SCOPE):
            m = _as_input(call, m, form)
        return _concat(call, m, measure, called)
    if form.mode == "attend":
        read_m = functools.partial(_attended, call, m, form)
    else:
        with jax.named_scope(SCOPE):
            m = _as_input(call, m, form)
        read_m = functools.partial(_added, call, m, form)
    y = call.run(*call.args, **call.kwargs)
    # Its scope is taken after the module's call, so the module's own initial values stay.
    with jax.named_scope(SCOPE):
        share = read_m(push(module, "read"))
    # Of a layer that pads or strides by itself the output may be of another size.
    if not isinstance(y, jax.Array | np.ndarray) or not _fits(share, y):
        what = getattr(y, "shape", type(y).__name__)
        raise UsageError(
            f"read matches {call.path!r}, whose class {type(module).__name__} makes {what} of"
            f" {x.shape}, where nn.{kind_of(module).__name__} would make {share.shape[1:]} of each"
            " example: read in another layer"
        )
    if form.mode == "scale":
        share = y * share
    if measure:
        record(module, share, y, f"{called}_use")
    return y + share


def _added(call: Call, m: jax.Array, form: Form, scope: Scope) -> jax.Array:
    """Returns a layer of the memory, (1 or B, ..., features)."""
    with _of_one_map_size(call, m):
        return _read_layer(call.module, form.zero_init, scope)(m)


def _attended(call: Call, m: jax.Array, form: Form, scope: Scope) -> jax.Array:
    """Returns a layer of what each position's query finds in the memory, (B, ..., features).

    Attention with one head, in which the slots are keys and values; projections of them are left
    out, for those of the query and of the output can do the same.
    """
    x, module = call.x, call.module
    if form.axes == 0:
        raise UsageError(
            f"read matches {call.path!r}, but read_mode 'attend' chooses among the positions of a"
            f" memory, and one of shape {m.shape[-1:]} has one: give it slots, shape (S, D)"
        )
    dtype = computed_dtype(x, module.dtype, module.param_dtype)
    channels = m.shape[-1]
    slots = m.reshape(m.shape[0], -1, channels).astype(dtype)
    query = nn.Dense(
        channels, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype,
        parent=scope.push("query", reuse=True),
    )  # fmt: skip
    q = query(x).reshape(x.shape[0], -1, channels) * channels**-0.5
    found = nn.softmax(q @ slots.swapaxes(1, 2)) @ slots
    found = found.reshape(*x.shape[:-1], channels)
    return _read_layer(module, form.zero_init, scope.push("output", reuse=True))(found)


def _fits(share: jax.Array, y: jax.Array) -> bool:
    sizes = zip(share.shape, y.shape, strict=True) if share.ndim == y.ndim else [(0, 1)]
    return all(a in (1, b) for a, b in sizes)


def _concat(call: Call, m: jax.Array, measure: bool, called: str) -> jax.Array:
    module = call.module
    # Cast as the layer would, so that both can be one array.
    x = call.x.astype(m.dtype)
    with _of_one_map_size(call, m):
        if isinstance(module, nn.Conv | nn.Dense):
            own, share = halves(module, x, m)
            y = own + share
        else:
            y = call.on(_append(x, m))
            if measure:
                # Through an unbound twin: a bound module cannot be called within its own call.
                apply = twin(module, kind_of(module)).apply
                own = apply(module.variables, _append(x, jnp.zeros_like(m)))
                share = y - own
    if measure:
        record(module, share, own, f"{called}_use")
    return y


def _append(x: jax.Array, m: jax.Array) -> jax.Array:
    """Returns [x, m] along the channels."""
    return jnp.concatenate([x, jnp.broadcast_to(m, (*x.shape[:-1], m.shape[-1]))], axis=-1)


def check_input(call: Call) -> None:
    """Raises UnreadableError for a layer, or an input, that no memory can be read into."""
    module, x = call.module, call.x
    refusal = f"{call.what} matches {call.path!r}, but "
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        axes = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
        if x.ndim != axes + 2:
            raise UnreadableError(
                f"{refusal}a convolution over {axes} axes reads only into inputs of {axes + 2},"
                f" (B, ..., C), not {x.shape}"
            )
        if module.mask is not None:
            raise UnreadableError(f"{refusal}its mask says nothing about the memory's channels")
    elif isinstance(module, nn.DenseGeneral) and (
        module.axis not in (-1, (-1,)) or tuple(module.batch_dims)
    ):
        raise UnreadableError(f"{refusal}an nn.DenseGeneral can read only over its last axis")
    if x.ndim < 2:
        raise UnreadableError(f"{refusal}its input has no batch axis: {x.shape}")


def _as_input(call: Call, m: jax.Array, form: Form) -> jax.Array:
    """Returns the memory in the form in which a layer reads it.

    For convolutions (1 or B, H, W, channels), see `fit` and `resize`; for dense layers
    (1 or B, 1, ..., D), of a convolutional memory the mean over its positions, and of one with a
    memory for each of T positions (B, T, 1, ..., D). In the dtype in which the layer computes.
    """
    module, x = call.module, call.x
    dtype = computed_dtype(x, module.dtype, module.param_dtype)
    of_positions = m.ndim - 2 > form.axes
    if of_positions and x.shape[1:-1][:1] != m.shape[1:2]:
        raise UsageError(
            f"read matches {call.path!r}, but the memory has one content for each of {m.shape[1]}"
            f" positions, and its input {x.shape} has not as many: read where inputs are"
            " (B, T, ...)"
        )
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        if of_positions and x.ndim == 3:
            return m.astype(dtype)
        if form.axes == 0:
            raise UnreadableError(
                f"read matches {call.path!r}, but a convolution reads a memory of shape (R, K, D),"
                f" not {m.shape[1:]}"
            )
        fitted = resize if form.fit == "resize" else fit
        return fitted(m, *x.shape[1:-1]).astype(dtype)
    if not of_positions and m.ndim > 2:
        m = m.mean(axis=tuple(range(1, m.ndim - 1)))
    ones = (1,) * (x.ndim - m.ndim)
    return m.reshape(*m.shape[:-1], *ones, m.shape[-1]).astype(dtype)


def check_batch(m: jax.Array, x: jax.Array, path: str) -> None:
    """Raises UsageError where a memory per example meets another number of examples."""
    if m.shape[0] not in (1, x.shape[0]):
        raise UsageError(
            f"the memory was written for a batch of {m.shape[0]}, but {path!r} sees {x.shape[0]}:"
            " the backbone folds something into its batch axis after the update"
        )


def _read_layer(module: nn.Module, zero_init: bool, scope: Scope) -> nn.Module:
    """Returns the layer that reads the memory for `module`: as it, without bias and groups.

    Not its twin: a subclass that standardises or scales its kernel would do so to this one too.
    """
    changes: dict[str, Any] = {"use_bias": False}
    if zero_init:
        changes["kernel_init"] = functools.partial(_zeros_like, module.kernel_init)
    if isinstance(module, nn.Conv):
        changes["feature_group_count"] = 1
    return twin(module, kind_of(module), scope, **changes)


def _zeros_like(initializer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns zeros in the box, such as nn.Partitioned, in which the initialiser puts its array."""
    return jax.tree.map(jnp.zeros_like, initializer(*args, **kwargs))


@contextmanager
def _of_one_map_size(call: Call, m: jax.Array) -> Iterator[None]:
    """Explains a kernel that was made for another number of the memory's channels."""
    try:
        yield
    except ScopeParamShapeError as error:
        size = "x".join(map(str, call.x.shape[1:-1])) or "vectors"
        raise UsageError(
            f"read matches {call.path!r}, whose kernel does not fit an input of {size} with"
            f" {m.shape[-1]} channels of memory: how many channels a memory has depends on the"
            " map's size, so a layer can read at one size only, that of its initialisation; with"
            " fit 'resize' it has as many at every size"
        ) from error


def warn_of_keys(module: nn.Module, path: str, mode: str) -> None:
    """Warns of a read that softmax ignores: the same vector added to all keys of an attention."""
    attention = module.parent
    if (
        module.name == "key"
        and mode in ("concat", "add")
        and isinstance(attention, nn.MultiHeadDotProductAttention)
        and attention.attention_fn is nn.dot_product_attention
        and not getattr(attention, "normalize_qk", False)
    ):
        warnings.warn(
            f"read matches {path!r}, where it does nothing: what is added to all keys alike,"
            " softmax takes away; leave the attention's 'key' out of the pattern, or read with"
            " read_mode 'scale'",
            stacklevel=2,
        )


def record(module: nn.Module, share: jax.Array, own: jax.Array, name: str) -> None:
    """Records L2 norms per example, averaged over the batch, in `intermediates`."""

    # A share that is the same for all examples, or all positions, counts in each of them.
    share = jnp.broadcast_to(share, jnp.broadcast_shapes(share.shape, own.shape))

    def norm(y: jax.Array) -> jax.Array:
        squares = jnp.square(y.astype(jnp.float32)).sum(axis=tuple(range(1, y.ndim)))
        return jnp.sqrt(squares).mean()

    module.sow("intermediates", name, {"share": norm(share), "own": norm(own)})
