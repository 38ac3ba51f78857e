"""Latches a memory on to any Linen network, from outside.

`flax.linen.intercept_methods` shows `AiM` every submodule call of the backbone: where a module's
path matches a read pattern, the memory is read into that call; where it matches an update
pattern, an update block rewrites the memory after it. The backbone is unchanged and knows nothing
of memory. What holds of the result is written down, and tested, in docs/latch.md.

What is latched on to a module lies beside that module's own parameters, under `memory_read` and
`memory_update`; the memories themselves lie at the top, as `memory` and `memory_initial`.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope

from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.memory import Memory, MemoryUpdate, fit

READ_MODES = ("concat", "add", "scale")
CARRIES = ("weights", "state")
READABLE = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
OWN_NAMES = ("memory", "memory_initial", "memory_read", "memory_update")

# Part of JAX's cache keys. Without it nn.jit could take its init from a plain network's cache, and
# the latch, which sees only what is traced, would not even know that there is an nn.jit to refuse.
_init_context = jax.make_user_context(default_value=False)

Patterns = str | Sequence[str]
# (memory as it stands, memory of the weights alone, batch size, path) -> memory that is read.
Alteration = Callable[[jax.Array, jax.Array, int, str], jax.Array]


class AiM(nn.Module):
    """A Linen network with a memory that its layers read and that update blocks rewrite.

    Patterns are regular expressions that must match a whole module path, such as
    r"stage\\d_block1/conv1"; several may be given, none is "" or (). Paths are those of the
    parameters: `AiM` takes the backbone's place, so they stay what they are without it.

    Attributes:
      backbone: any Linen module that is used by `__call__`.
      memory: the notebook at the start of each forward pass.
      read: modules that read the memory: nn.Conv and nn.ConvTranspose over two spatial axes,
        nn.Dense, and nn.DenseGeneral over its last axis.
      update_after: modules after whose call the memory is rewritten from their output.
      read_initial: those reads that see a second memory instead (`memory_initial`: same shape
        and kind, its own weights), which is never updated. The published network needs it.
      read_mode: "concat" appends the memory to the layer's input channels, as published;
        "add" leaves the layer alone and adds a bias-free layer of the memory to its output,
        which is the same function by linearity. In a grouped convolution every group reads the
        whole memory. "scale" multiplies the layer's output, bias included, by 1 + that layer of
        the memory: the scaling half of FiLM (E. Perez et al., "FiLM: Visual Reasoning with a
        General Conditioning Layer", 2018).
      zero_init: with "add" and "scale", start the read kernels at zero: the first output is the
        backbone's.
      update: options of the update blocks; each place gets a block of its own.
      carry: what the next batch finds. "weights": what backpropagation made of the memory, as
        published. "state": that, plus what updates have written, which is kept in the variable
        `carried` of collection "memory": carried <- (1 - rate)·carried + rate·(written - weights),
        with `written` the last memory of the pass averaged over batch and devices, `weights`
        the memory before it, and no gradient.
      carry_rate: that rate, in (0, 1].
      alter_read, no_write: for evaluation only, and set by `evaluate.interventions.intervene`:
        pairs of a pattern and what it does to the memory that matching reads find, applied in this
        order; and patterns of places whose update blocks don't write.

    Raises:
      UsageError: a pattern that matches no module, a module that cannot be read into or updated
        after, or options that do not go together.
    """

    backbone: nn.Module
    memory: Memory
    read: Patterns
    update_after: Patterns = ()
    read_initial: Patterns = ()
    read_mode: str = "concat"
    zero_init: bool = False
    update: MemoryUpdate = MemoryUpdate()
    carry: str = "weights"
    carry_rate: float = 0.1
    alter_read: Sequence[tuple[str, Alteration]] = ()
    no_write: Sequence[str] = ()

    @nn.compact
    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Calls the backbone with these arguments and returns what it returns.

        Args:
          *args, **kwargs: passed on as they are.
          train: whether update blocks use batch statistics and a carried memory is written;
            passed on where the backbone's `__call__` has a parameter of that name.
        """
        self._check_options(train)
        if "train" in inspect.signature(type(self.backbone).__call__).parameters:
            kwargs["train"] = train
        # Flax binds attributes one level down and takes their names. The backbone belongs in this
        # module's own place, where no name is taken but the memories'.
        scope = self.scope.rewound()
        latch = _Latch(self, scope, train)
        backbone = self.backbone.unbind()[0].clone(parent=scope)
        with _init_context(self.is_initializing()), nn.intercept_methods(latch.intercept):
            outputs = backbone(*args, **kwargs)
        latch.check_patterns()
        latch.carry_on()
        return outputs

    def _check_options(self, train: bool) -> None:
        check_choice("read_mode", self.read_mode, READ_MODES)
        check_choice("carry", self.carry, CARRIES)
        if self.zero_init and self.read_mode == "concat":
            raise UsageError(
                "zero_init needs read_mode 'add' or 'scale': in 'concat' the memory has no kernel"
                " of its own"
            )
        if self.carry == "state" and not compile_patterns(self.update_after):
            raise UsageError("carry 'state' needs update_after: nothing writes to this memory")
        if not 0 < self.carry_rate <= 1:
            raise UsageError(f"carry_rate is {self.carry_rate}, expected a number in (0, 1]")
        if train and (self.alter_read or self.no_write):
            raise UsageError("interventions are for evaluation: call the network with train=False")


class _Latch:
    """One forward pass: the memory as it stands, and what has been seen of the backbone."""

    def __init__(self, aim: AiM, scope: Scope, train: bool):
        self.aim, self.scope, self.train = aim, scope, train
        self.read = compile_patterns(aim.read)
        self.update_after = compile_patterns(aim.update_after)
        self.read_initial = compile_patterns(aim.read_initial)
        self.alter_read = compile_patterns([at for at, _ in aim.alter_read])
        self.no_write = compile_patterns(aim.no_write)
        self.matched: set[tuple[str, re.Pattern]] = set()
        self.seen: dict[str, nn.Module] = {}
        self.updates: dict[str, MemoryUpdate] = {}
        self.weights = self._memory("memory")
        self.current = self.weights
        if aim.carry == "state":
            content = self.weights[0]
            self.carried = aim.variable("memory", "carried", jnp.zeros_like, content)
            self.current = self.weights + self.carried.value
        if self.read_initial:
            self.initial = self._memory("memory_initial")

    def _memory(self, name: str) -> jax.Array:
        return self.aim.memory.clone(parent=self.scope.push(name), name=None)(self.train)

    def intercept(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        names = module.path[len(self.scope.path) :]
        if context.method_name != "__call__" or not names or set(names) & set(OWN_NAMES):
            return next_fun(*args, **kwargs)
        path = "/".join(names)
        self.seen[path] = module
        if any("jit(" in transformation for transformation in self._transformations(module)):
            raise UsageError(
                f"{path!r} runs inside nn.jit, which calls what it compiled before and so would"
                " read an old memory: remove nn.jit and compile the whole step with jax.jit"
            )
        if self._match("read", path):
            y = self._read(next_fun, args, kwargs, module, path)
        elif self._match("read_initial", path):
            raise UsageError(f"read_initial matches {path!r}, which read does not match")
        else:
            y = next_fun(*args, **kwargs)
        if self._match("update_after", path):
            silent = self._match("no_write", path)
            # At initialisation it writes all the same, so that its parameters are made.
            if not silent or self.aim.is_initializing():
                self._update(y, module, path)
        return y

    def _transformations(self, module: nn.Module) -> list[str]:
        """Returns the Flax transformations within the backbone that this call runs inside."""
        outer = self.scope.debug_path + module.path[len(self.scope.path) :]
        inner = module.scope.debug_path
        return [name for name, plain in zip(inner, outer, strict=False) if name != plain]

    def _match(self, what: str, path: str) -> list[re.Pattern]:
        matching = [pattern for pattern in getattr(self, what) if pattern.fullmatch(path)]
        self.matched.update((what, pattern) for pattern in matching)
        return matching

    def _read(
        self, next_fun: Callable, args: tuple, kwargs: dict, module: nn.Module, path: str
    ) -> jax.Array:
        x = args[0] if args else kwargs["inputs"]
        if self._match("read_initial", path):
            m = weights = self.initial
        else:
            m, weights = self.current, self.weights
        matching = self._match("alter_read", path)
        for pattern, (_, alter) in zip(self.alter_read, self.aim.alter_read, strict=True):
            if pattern in matching:
                m = alter(m, weights, x.shape[0], path)
        m = _as_input(m, x, module, path)
        measure = module.is_mutable_collection("intermediates") and not module.is_initializing()
        if self.aim.read_mode != "concat":
            y = next_fun(x)
            share = _read_layer(module, self.aim.zero_init)(m)
            if self.aim.read_mode == "scale":
                share = y * share
            if measure:
                _record(module, share, y)
            return y + share
        y = next_fun(_append(x, m, module))
        if measure:
            # Through an unbound twin, for a bound module cannot be called within its own call.
            twin = module.clone(parent=None, name=None)
            own = twin.apply(module.variables, _append(x, jnp.zeros_like(m), module))
            _record(module, y - own, own)
        return y

    def _update(self, y: Any, module: nn.Module, path: str) -> None:
        if self._transformations(module):
            raise UsageError(
                f"update_after matches {path!r}, which runs inside a Flax transformation (nn.remat,"
                " nn.scan, nn.vmap, ...): what is written there cannot leave it; update after a"
                " module around the transformed one, or behind it"
            )
        ranks = "(B, H, W, C)" if self.current.ndim == 4 else "(B, ..., C)"
        least, most = (4, 4) if self.current.ndim == 4 else (2, 99)
        if not isinstance(y, jax.Array) or not least <= y.ndim <= most:
            what = (
                f"has shape {y.shape}" if isinstance(y, jax.Array) else f"is a {type(y).__name__}"
            )
            raise UsageError(
                f"update_after matches {path!r}, whose output {what}: a memory of shape"
                f" {self.current.shape[1:]} is updated from an array {ranks}"
            )
        _check_batch(self.current, y, path)
        if path not in self.updates:
            # In the module's own scope: a name at the top could be taken by the backbone.
            scope = module.scope.push("memory_update", reuse=True)
            self.updates[path] = self.aim.update.clone(parent=scope, name=None)
        before = self.current
        self.current = self.updates[path](y, before, train=self.train)
        if module.is_mutable_collection("intermediates") and not module.is_initializing():
            change = self.current.astype(jnp.float32) - before.astype(jnp.float32)
            _record(module, change, before, "memory_update_use")

    def check_patterns(self) -> None:
        """Raises UsageError for a pattern that matched nothing in this pass."""
        readable = [path for path, module in self.seen.items() if isinstance(module, READABLE)]
        reads, updates = (
            [path for path in self.seen if self._match(what, path)]
            for what in ("read", "update_after")
        )
        places = {
            "read": ("read", "module", readable),
            "update_after": ("update_after", "module", list(self.seen)),
            "read_initial": ("read_initial", "module", readable),
            "alter_read": ("at", "read", reads),
            "no_write": ("at", "update", updates),
        }
        for what, (name, noun, paths) in places.items():
            for pattern in getattr(self, what):
                if (what, pattern) in self.matched:
                    continue
                raise UsageError(
                    f"{name} pattern {pattern.pattern!r} matches no {noun} of"
                    f" {type(self.aim.backbone).__name__}{nearest(pattern.pattern, paths)};"
                    f" there are: {', '.join(paths) or 'none'}"
                )

    def carry_on(self) -> None:
        """Keeps what was written for the next batch, when the carry is `state`."""
        aim = self.aim
        if aim.carry != "state" or not self.train or aim.is_initializing():
            return
        written = self.current.astype(self.weights.dtype).mean(axis=0)
        if aim.update.axis_name is not None:
            written = jax.lax.pmean(written, aim.update.axis_name)
        change = jax.lax.stop_gradient(written - self.weights[0])
        self.carried.value = (1 - aim.carry_rate) * self.carried.value + aim.carry_rate * change


def compile_patterns(patterns: Patterns) -> tuple[re.Pattern, ...]:
    """Returns them compiled, without empty ones; UsageError for what is no regular expression."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    try:
        return tuple(re.compile(pattern) for pattern in patterns if pattern)
    except re.error as error:
        raise UsageError(f"{error.pattern!r} is no regular expression: {error}") from None


def _as_input(m: jax.Array, x: jax.Array, module: nn.Module, path: str) -> jax.Array:
    """Returns the memory in the form in which a layer with input `x` reads it.

    For convolutions (1 or B, H, W, channels), see `fit`; for dense layers (1 or B, 1, ..., D),
    of a convolutional memory the mean over rows and columns. In x's dtype.
    """
    refusal = f"read matches {path!r}, but "
    if isinstance(module, nn.Conv | nn.ConvTranspose):
        kernel = module.kernel_size
        if isinstance(kernel, int) or len(kernel) != 2 or x.ndim != 4:
            raise UsageError(f"{refusal}only convolutions over images (B, H, W, C) can read")
        if m.ndim != 4:
            raise UsageError(
                f"{refusal}a convolution reads a memory of shape (R, K, D), not {m.shape[1:]}"
            )
        if module.mask is not None:
            raise UsageError(f"{refusal}its mask says nothing about the memory's channels")
        _check_batch(m, x, path)
        return fit(m, x.shape[1], x.shape[2]).astype(x.dtype)
    if not isinstance(module, READABLE):
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in READABLE)
        raise UsageError(
            f"{refusal}a {type(module).__name__} cannot read a memory; these can: {kinds}"
        )
    if isinstance(module, nn.DenseGeneral) and (
        module.axis not in (-1, (-1,)) or tuple(module.batch_dims)
    ):
        raise UsageError(f"{refusal}an nn.DenseGeneral can read only over its last axis")
    if x.ndim < 2:
        raise UsageError(f"{refusal}its input has no batch axis: {x.shape}")
    _check_batch(m, x, path)
    if m.ndim == 4:
        m = m.mean(axis=(1, 2))
    return m.reshape(m.shape[0], *(1,) * (x.ndim - 2), m.shape[-1]).astype(x.dtype)


def _check_batch(m: jax.Array, x: jax.Array, path: str) -> None:
    if m.shape[0] not in (1, x.shape[0]):
        raise UsageError(
            f"the memory was written for a batch of {m.shape[0]}, but {path!r} sees {x.shape[0]}:"
            " the backbone folds something into its batch axis after the update"
        )


def _append(x: jax.Array, m: jax.Array, module: nn.Module) -> jax.Array:
    """Returns [x, m] along the channels: in a grouped convolution, m once in every group."""
    groups = getattr(module, "feature_group_count", 1)
    m = jnp.broadcast_to(m, (*x.shape[:-1], m.shape[-1]))
    if groups == 1:
        return jnp.concatenate([x, m], axis=-1)
    x = x.reshape(*x.shape[:-1], groups, -1)
    m = jnp.broadcast_to(m[..., None, :], (*x.shape[:-1], m.shape[-1]))
    joint = jnp.concatenate([x, m], axis=-1)
    return joint.reshape(*joint.shape[:-2], -1)


def _read_layer(module: nn.Module, zero_init: bool) -> nn.Module:
    """Returns the layer that reads the memory for `module`: its twin, without bias and groups."""
    changes: dict[str, Any] = {"use_bias": False, "name": None}
    if zero_init:
        changes["kernel_init"] = nn.initializers.zeros
    if isinstance(module, nn.Conv):
        changes["feature_group_count"] = 1
    # Its scope is taken after the module's call, so the module's own initial values stay.
    return module.clone(parent=module.scope.push("memory_read", reuse=True), **changes)


def _record(module: nn.Module, share: jax.Array, own: jax.Array, name: str = "memory_use") -> None:
    """Records L2 norms per example, averaged over the batch, in `intermediates`."""

    # A share that is the same for all examples, or all positions, counts in each of them.
    share = jnp.broadcast_to(share, jnp.broadcast_shapes(share.shape, own.shape))

    def norm(y: jax.Array) -> jax.Array:
        squares = jnp.square(y.astype(jnp.float32)).sum(axis=tuple(range(1, y.ndim)))
        return jnp.sqrt(squares).mean()

    module.sow("intermediates", name, {"share": norm(share), "own": norm(own)})
