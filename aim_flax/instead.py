"""What could explain the gain of a memory without one: latched on to layers in its place.

A memory that is read but never written brings a layer the same values for all images: values that
differ from place to place, so the layer can tell where it is; and one that images write brings a
summary of the whole image to every place. And in a network whose own weights are kept, whatever is
learned beside them is a change to it. Each of the three is known by itself, and simpler: `Instead`
puts it where a memory would be read, so that the two can be compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from flax.errors import ScopeParamShapeError

from aim_flax.backbone import Latched, check_backbone, trace_init
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.latch import AiM
from aim_flax.layers.of_two import twin
from aim_flax.memory import computed_dtype
from aim_flax.modes import resolve
from aim_flax.patterns import Patterns, compile_patterns
from aim_flax.reads import READABLE, Call, check_input, is_plain_call, kind_of, no_reads_within
from aim_flax.scopes import is_in_backbone, push_latched_on, transformations, with_backbone

# Channels for each hidden unit of a gate, as in the paper.
_REDUCTION = 16


class At(NamedTuple):
    """A layer that something is latched on to.

    Attributes:
      path: of the layer.
      shape: of its input, (B, ..., C).
      channels: of its output.
    """

    path: str
    shape: tuple[int, ...]
    channels: int


class Instead(Latched):
    """A Linen network with something other than a memory latched on to some of its layers.

    It takes the backbone's place, from outside, as `AiM` does: the backbone's parameters keep their
    paths, shapes and, for a given key, initial values. What is latched on to a layer lies beside
    that layer's own parameters, under the name of its kind.

    Attributes:
      backbone: any Linen module but an `AiM`, of which it can be the backbone.
      kind: what it is.
        "coords": the layer sees, after its input's channels, one for each spatial axis (row and
        column), which rises from -1 to 1 along it; 0 where there is one position (R. Liu et al.,
        "An Intriguing Failing of Convolutional Neural Networks and the CoordConv Solution", 2018).
        By linearity that is a bias-free layer of these channels, added to the output; its kernel,
        `coords/kernel`, is the rest of the layer's wider kernel, and starts as that would.
        "position_bias": `position_bias/bias`, one number for each position and channel of the
        output, is added to it. Weights fit maps of one size only.
        "squeeze_excite": the output's channels are multiplied by sigmoid(W2·relu(W1·z)), where z is
        their mean over the positions; of a layer of vectors the output itself. W1 and W2, without
        biases, are `squeeze_excite/squeeze` and `squeeze_excite/excite` (J. Hu et al.,
        "Squeeze-and-Excitation Networks", 2018, equations 2 to 4).
        "low_rank": what is added to the output changes the layer's kernel by a product of two small
        ones (E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, without its
        factor alpha over r). `low_rank/down` is the layer, without bias and with few features;
        `low_rank/up`, from these to the output's channels, starts at zero, so the network starts
        equal to its backbone. A grouped convolution is changed by one without groups.
      at: the layers, as in `AiM.read`: nn.Conv and nn.ConvTranspose, nn.Dense, and nn.DenseGeneral
        over its last axis. Other modules that a pattern matches are left alone.
      hidden: of "squeeze_excite", the size of z after W1, and of "low_rank" the features in the
        middle: for each layer in the order of the first calls, or one for all; (): a 16th of the
        layer's channels, at least 1.
      mode: the name of the backbone's mode argument, as in `AiM`.
      watch: called with the `At` of each layer, in the order of the calls.
      stddev: of "position_bias", the standard deviation of its initial values, which are normal;
        0: it starts at zero.
      zero_init: of "squeeze_excite", whether W2 starts at zero and gates are twice the sigmoid, so
        that the network starts equal to its backbone, as one with trained weights needs it.

    Raises:
      UsageError: a pattern that matches no layer, a layer without positions (a Dense layer of
        vectors) for "coords" or "position_bias", or options that do not go together.
    """

    kind: str
    at: Patterns
    hidden: Sequence[int] = ()
    mode: str | None = None
    watch: Callable[[At], None] | None = None
    stddev: float = 0.0
    zero_init: bool = False

    @nn.compact
    def call(self, method: str, /, *args: Any, train: bool | None = None, **kwargs: Any) -> Any:
        """Calls a method of the backbone and returns what it returns; see `AiM.call`.

        Args:
          method: its name.
          *args, **kwargs: passed on as they are.
          train: passed on in the backbone's own words, as what its mode argument is called.

        Raises:
          UsageError: a network whose mode argument is not clear, see `modes.resolve`.
        """
        self._check_options()
        check_backbone(self)
        if isinstance(self.backbone, AiM):
            raise UsageError(
                "the backbone of an Instead is an AiM: latch the memory on to the Instead, as in"
                " AiM(Instead(network, ...), ...)"
            )
        train, kwargs = resolve(self.network, self.declared_mode, train, args, kwargs, method)
        # In this module's own place, as in `AiM.call`.
        scope = self.scope.rewound()
        latch = _Latch(self, scope)
        outputs = self._run(scope, latch.intercept, method, args, kwargs, train=train)
        # Another method need not call all layers; but what initialises must.
        if method == "__call__" or self.is_initializing():
            latch.check()
        return outputs

    @nn.nowrap
    def places(self, *args: Any, **kwargs: Any) -> list[At]:
        """Returns the layers, in the order of the first calls.

        Args:
          *args, **kwargs: what the network is called with; arrays may be given as their shapes and
            dtypes. Nothing is computed.
        """
        found: dict[str, At] = {}
        watched = self.clone(watch=lambda at: found.setdefault(at.path, at))
        trace_init(watched, args, kwargs)
        return list(found.values())

    def _check_options(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if not compile_patterns(self.at):
            raise UsageError(
                f"{self.kind} needs at, a pattern of the layers that it is latched on to"
            )
        if self.hidden and self.kind not in SIZED:
            raise UsageError(
                f"hidden is of {' and '.join(SIZED)}, but kind is {self.kind!r}: leave it ()"
            )
        if not all(isinstance(size, int) and size >= 1 for size in self.hidden):
            raise UsageError(f"hidden is {self.hidden!r}, expected sizes of at least 1")
        if self.stddev and self.kind != "position_bias":
            raise UsageError(f"stddev is of position_bias, but kind is {self.kind!r}: leave it 0")
        if self.zero_init and self.kind != "squeeze_excite":
            raise UsageError(
                f"zero_init is of squeeze_excite, but kind is {self.kind!r}: leave it False"
            )
        if not 0 <= self.stddev < math.inf:
            raise UsageError(f"stddev is {self.stddev}, expected a number of at least 0")


class _Latch:
    """One forward pass."""

    # For `train.remat`: there is no memory that modules pass on.
    current = None

    def __init__(self, instead: Instead, scope: Scope):
        self.instead, self.scope = instead, scope
        scope.flags = with_backbone(scope.flags, self)
        self.patterns = compile_patterns(instead.at)
        self.matched: dict[str, type[nn.Module]] = {}
        self.layers: dict[str, None] = {}  # All, for what a pattern may have meant.
        self.order: dict[str, int] = {}
        self.done: dict[str, bool] = {}  # Of the calls that have not returned yet.

    @contextmanager
    def within(self, module: nn.Module, memory: None) -> Iterator[None]:
        yield

    def intercept(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not is_in_backbone(module, self):
            return next_fun(*args, **kwargs)
        path = "/".join(module.path[len(self.scope.path) :])
        if path and kind_of(module) is not None:
            self.layers.setdefault(path)
        if not path or not any(pattern.fullmatch(path) for pattern in self.patterns):
            return next_fun(*args, **kwargs)
        self.matched.setdefault(path, type(module))
        if kind_of(module) is None:
            return next_fun(*args, **kwargs)
        call = Call(module, path, next_fun, context.orig_method.func, args, kwargs, what="at")
        # As reads: where the layer itself is called, within what a subclass puts around it.
        outermost = path not in self.done
        self.done.setdefault(path, False)
        try:
            y = next_fun(*args, **kwargs)
            if is_plain_call(module, call.function) or (outermost and not self.done[path]):
                y = self._latched_on(call, y)
                self.done[path] = True
        finally:
            if outermost:
                del self.done[path]
        return y

    def _latched_on(self, call: Call, y: Any) -> jax.Array:
        instead, module, path = self.instead, call.module, call.path
        self._check_place(call, y)
        x = call.x
        channels = math.prod(y.shape[x.ndim - 1 :])
        if instead.watch is not None:
            instead.watch(At(path, x.shape, channels))
        number = self.order.setdefault(path, len(self.order))
        # Taken after the module's call, so the module's own initial values stay.
        scope = push_latched_on(module.scope, instead.kind)
        if instead.kind == "coords":
            return _with_coords(call, y, scope)
        if instead.kind == "position_bias":
            return _with_bias(call, y, scope, instead.stddev)
        hidden = self._hidden(number, channels, scope)
        if instead.kind == "low_rank":
            return _with_low_rank(call, y, scope, hidden)
        return _gated(call, y, scope, hidden, instead.zero_init)

    def _check_place(self, call: Call, y: Any) -> None:
        module, path, kind = call.module, call.path, self.instead.kind
        around = transformations(module, self.scope)
        if any("jit(" in name for name in around):
            raise UsageError(
                f"{path!r} runs inside nn.jit, which may call what it compiled before without"
                f" {kind}: remove nn.jit and compile the whole step with jax.jit"
            )
        if within := no_reads_within(around):
            raise UsageError(f"at matches {path!r}, which runs inside {within}")
        check_input(call)
        if kind not in SIZED and call.x.ndim < 3:
            raise UsageError(
                f"at matches {path!r}, a layer of vectors, {call.x.shape}: they have no positions,"
                f" which {kind} is of; match layers of maps or sequences"
            )
        if not isinstance(y, jax.Array | np.ndarray) or y.ndim < call.x.ndim:
            what = getattr(y, "shape", type(y).__name__)
            raise UsageError(
                f"at matches {path!r}, whose class {type(module).__name__} makes {what} of"
                f" {call.x.shape}: match another layer"
            )
        if module.scope.name_reserved(kind) and path not in self.order:
            raise UsageError(
                f"{path!r} has a submodule or parameter called {kind!r}, as is what is latched on"
                " there: give it another name"
            )

    def _hidden(self, number: int, channels: int, scope: Scope) -> int:
        hidden = self.instead.hidden
        if len(hidden) < 2:
            return hidden[0] if hidden else max(1, channels // _REDUCTION)
        # Their order is that of the initialisation; another method may call other layers first.
        last = scope.variables().get("params", {}).get(SIZED[self.instead.kind])
        if last is not None:
            return jax.tree.leaves(last)[0].shape[0]
        # How many layers there are is known at the end.
        return hidden[min(number, len(hidden) - 1)]

    def check(self) -> None:
        """Raises UsageError for a pattern that matched no layer, or not as many as `hidden` has."""
        for pattern in self.patterns:
            found = [path for path in self.matched if pattern.fullmatch(path)]
            if any(path in self.order for path in found):
                continue
            if found:
                kinds = ", ".join(f"nn.{kind.__name__}" for kind in READABLE)
                raise UsageError(
                    f"at matches {found[0]!r}, but {self.matched[found[0]].__name__} is no layer"
                    f" that {self.instead.kind} can be latched on to; these are: {kinds}"
                )
            raise UsageError(
                f"at pattern {pattern.pattern!r} matches no layer of"
                f" {type(self.instead.backbone).__name__}{nearest(pattern.pattern, self.layers)};"
                f" there are: {', '.join(self.layers) or 'none'}"
            )
        sizes = len(self.instead.hidden)
        if sizes > 1 and sizes != len(self.order):
            raise UsageError(
                f"hidden has {sizes} sizes, expected one, or one for each of the {len(self.order)}"
                " layers that at matches"
            )


def coordinates(*size: int) -> jax.Array:
    """Returns the coordinates of a map's positions, (1, *size, axes) float32.

    Along its own axis each channel rises from -1 to 1; it is 0 where the axis has one position.
    """
    lines = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in size]
    grid = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1)
    return jnp.asarray(grid[None], jnp.float32)


def _with_coords(call: Call, y: jax.Array, scope: Scope) -> jax.Array:
    """Returns a layer's output with that of the coordinates' part of its wider kernel, (B, ...)."""
    module, x = call.module, call.x
    kind, changes = kind_of(module), {"use_bias": False}
    channels = x.shape[-1]
    if kind is nn.Conv:
        # As in reads, every group sees them.
        channels //= module.feature_group_count
        changes["feature_group_count"] = 1
    axis = -1 if getattr(module, "transpose_kernel", False) else -2
    changes["kernel_init"] = partial(_last_inputs, module.kernel_init, channels, axis)
    coords = coordinates(*x.shape[1:-1])
    coords = coords.astype(computed_dtype(x, module.dtype, module.param_dtype))
    share = twin(module, kind, scope, **changes)(coords)
    _check_share(call, y, share.shape[1:])
    return y + share


def _check_share(call: Call, y: jax.Array, shape: Sequence[int]) -> None:
    """Refuses a layer that makes something else than its kind would."""
    if shape != y.shape[1:]:
        raise UsageError(
            f"at matches {call.path!r}, whose class {type(call.module).__name__} makes {y.shape} of"
            f" {call.x.shape}, where nn.{kind_of(call.module).__name__} would make {shape} of each"
            " example: match another layer"
        )


def _last_inputs(
    initializer: Callable[..., Any],
    before: int,
    axis: int,
    key: jax.Array,
    shape: Sequence[int],
    *args: Any,
) -> Any:
    """Returns initial values of the last inputs of a kernel that has others `before` them."""
    whole = list(shape)
    whole[axis] += before
    kept = (Ellipsis, slice(before, None)) + (slice(None),) * (-1 - axis)
    # In the box, such as nn.Partitioned, in which the initialiser puts its array.
    return jax.tree.map(lambda kernel: kernel[kept], initializer(key, tuple(whole), *args))


class _Bias(nn.Module):
    """A number for each position and channel, (*shape,)."""

    shape: tuple[int, ...]
    stddev: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        # Nothing is drawn for zeros.
        init = nn.initializers.normal(self.stddev) if self.stddev else nn.initializers.zeros
        return self.param("bias", init, self.shape, self.param_dtype)


def _with_bias(call: Call, y: jax.Array, scope: Scope, stddev: float) -> jax.Array:
    try:
        bias = _Bias(y.shape[1:], stddev, call.module.param_dtype, parent=scope)()
    except ScopeParamShapeError as error:
        raise UsageError(
            f"at matches {call.path!r}, whose output has"
            f" {'x'.join(map(str, y.shape[1 : call.x.ndim - 1]))} positions, which is not the size"
            " of its initialisation: a bias per position fits maps of one size"
        ) from error
    return y + bias.astype(y.dtype)


def _gated(call: Call, y: jax.Array, scope: Scope, hidden: int, zero_init: bool) -> jax.Array:
    """Returns an output with its channels multiplied by a gate, of y's shape and dtype."""
    axes, dense = call.x.ndim - 2, _dense(call.module)
    shape = y.shape[:1] + (1,) * axes + y.shape[axes + 1 :]
    z = y.mean(axis=tuple(range(1, axes + 1))).reshape(len(y), -1)
    squeezed = nn.relu(dense(hidden, parent=scope.push("squeeze", reuse=True))(z))
    if zero_init:
        dense = partial(dense, kernel_init=nn.initializers.zeros)
    gate = nn.sigmoid(dense(z.shape[-1], parent=scope.push("excite", reuse=True))(squeezed))
    gate = 2 * gate if zero_init else gate
    return y * gate.reshape(shape).astype(y.dtype)


def _with_low_rank(call: Call, y: jax.Array, scope: Scope, rank: int) -> jax.Array:
    """Returns a layer's output with that of a change of its kernel of a rank, (B, ...)."""
    module, kind = call.module, kind_of(call.module)
    changes = {"features": rank, "use_bias": False}
    if kind is nn.Conv:
        changes |= {"feature_group_count": 1, "mask": None}
    few = twin(module, kind, scope.push("down", reuse=True), **changes)(call.x)
    features = y.shape[call.x.ndim - 1 :]
    _check_share(call, y, few.shape[1:-1] + features)
    up = _dense(module)(
        math.prod(features),
        kernel_init=nn.initializers.zeros,
        parent=scope.push("up", reuse=True),
    )
    return y + up(few).reshape(y.shape).astype(y.dtype)


def _dense(module: nn.Module) -> Callable[..., nn.Dense]:
    """Returns what makes Dense layers without biases, of a layer's dtypes."""
    return partial(nn.Dense, use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype)


# Those whose size is chosen by `hidden`, with the name of the last of their two layers; layers of
# vectors can have them, too.
SIZED = {"squeeze_excite": "excite", "low_rank": "up"}
KINDS = ("coords", "position_bias", *SIZED)
