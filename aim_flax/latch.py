"""Latches a memory on to any Linen network, from outside.

`flax.linen.intercept_methods` shows `AiM` every submodule call of the backbone: where a module's
path matches a read pattern, the memory is read into that call; where it matches an update
pattern, an update block rewrites the memory after it. The backbone is unchanged and knows nothing
of memory. What holds of the result is written down, and tested, in docs/latch.md.

What is latched on to a module lies beside that module's own parameters, under `memory_read` and
`memory_update`; the memories themselves lie at the top, as `memory` and `memory_initial`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from jax.extend.core import get_opaque_trace_state

from aim_flax import batch_axis
from aim_flax.backbone import Latched, check_backbone, trace_init
from aim_flax.errors import UsageError, check_choice, nearest
from aim_flax.memory import FITS, Memory, check_memory
from aim_flax.modes import resolve
from aim_flax.patterns import Patterns, compile_patterns, select, selectors
from aim_flax.reads import (
    READ_MODES,
    READABLE,
    Call,
    Form,
    UnreadableError,
    check_batch,
    check_readable,
    is_plain_call,
    kind_of,
    no_reads_within,
    read,
    record,
    warn_of_keys,
)
from aim_flax.scopes import is_in_backbone, push_latched_on, transformations, with_backbone
from aim_flax.updates import MemoryUpdate

CARRIES = ("weights", "state")

# (memory as it stands, memory of the weights alone, batch size, path) -> memory that is read.
Alteration = Callable[[jax.Array, jax.Array, int, str], jax.Array]


class Place(NamedTuple):
    """A module where a memory is read or written.

    Attributes:
      what: "read" or "update".
      path: of the module.
      memory: the name of the memory; of one of several by `per`, "memory/stage1".
      shape: of the layer's input, or of the output from which the memory is updated.
    """

    what: str
    path: str
    memory: str
    shape: tuple[int, ...]


class AiM(Latched):
    """A Linen network with a memory that its layers read and that update blocks rewrite.

    Patterns are regular expressions that must match a whole module path, such as
    r"stage\\d_block1/conv1"; several may be given, none is "" or (). Paths are those of the
    parameters: `AiM` takes the backbone's place, so they stay what they are without it.

    A network gets several memories by an AiM inside an AiM, each `called` something else: the
    inner one is the backbone of the outer, with the paths of the network inside.

    Attributes:
      memory: the notebook at the start of each forward pass.
      read: modules that read the memory: nn.Conv and nn.ConvTranspose, nn.Dense, and
        nn.DenseGeneral over its last axis. Other modules that a pattern matches are left alone,
        but it must match one that can read.
      update_after: modules after whose call the memory is rewritten from their output. A mapping
        {pattern: selector} says which part of it, an index or name, or several within each other:
        {"encoder/block0": 0}.
      read_initial: those reads that see a second memory instead (`memory_initial`: same shape
        and kind, its own weights), which is never updated. The published network needs it.
      read_mode: "concat" appends the memory to the layer's input channels, as published;
        "add" leaves the layer alone and adds a bias-free layer of the memory to its output,
        which is the same function by linearity. In a grouped convolution every group reads the
        whole memory. "scale" multiplies the layer's output, bias included, by 1 + that layer of
        the memory: the scaling half of FiLM (E. Perez et al., "FiLM: Visual Reasoning with a
        General Conditioning Layer", 2018). "attend" is "add" of what each position of the layer's
        input finds in the memory by attention, with a linear query of the input and the memory's
        positions as keys and values (M.-H. Guo et al., "Beyond Self-attention: External Attention
        using Two Linear Layers for Visual Tasks", 2021, with keys and values the memory's own).
      fit: how a convolutional memory takes a map's size: "reshape", as published, see
        `memory.fit`; "resize", see `memory.resize`: then weights fit images of any size, and each
        position of the memory is a place in the image.
      zero_init: not with "concat"; start the read kernels at zero: the first output is the
        backbone's.
      update: options of the update blocks; each place gets a block of its own.
      carry: what the next batch finds. "weights": what backpropagation made of the memory, as
        published. "state": that, plus what updates have written, which is kept in the variable
        `carried` of collection "memory": carried <- (1 - rate)·carried + rate·(written - weights),
        with `written` the last memory of the pass averaged over batch and devices, `weights`
        the memory before it, and no gradient.
      carry_rate: that rate, in (0, 1].
      mode: the name of the backbone's argument that tells training from evaluation, such as
        "train" or "deterministic" (see `modes.MODES`), or "none"; None: found in its signature.
      check_batch: whether the backbone is traced, abstractly, at another batch size, to see that
        the first axis is the batch wherever a written memory is read or updated. False takes it
        for granted, and compares sizes only.
      called: the memory's name, from which come those of all variables: `memory`,
        `memory_initial`, `memory_read`, `memory_update`.
      per: not one memory for the whole network, but one for each of these: for modules whose path
        begins with it, such as ("stage1", "stage2"); of several that fit, the longest. Each has
        this shape, its own content and its own place among the variables, `memory/stage1`, where
        "." stands for a slash; what a stage reads, only that stage has written.
      capture: whether `intermediates` gets the memory as a pass finds it, as `memory_at_start`, as
        it is read at each place, as `memory_as_read` there, and as it is after each update, as
        `memory_as_written`.
      watch: called with the `Place` of each read and update, in the order of the calls.
      alter_read, no_write: for evaluation only, and set by `evaluate.interventions.intervene`:
        pairs of a pattern and what it does to the memory that matching reads find, applied in this
        order; and patterns of places whose update blocks don't write.

    Raises:
      UsageError: a pattern that matches no module, a module that cannot be read into or updated
        after, or options that do not go together.
    """

    memory: Memory
    read: Patterns
    update_after: Patterns = ()
    read_initial: Patterns = ()
    read_mode: str = "concat"
    zero_init: bool = False
    update: MemoryUpdate = MemoryUpdate()
    carry: str = "weights"
    carry_rate: float = 0.1
    mode: str | None = None
    check_batch: bool = True
    fit: str = "reshape"
    called: str = "memory"
    per: Sequence[str] = ()
    capture: bool = False
    watch: Callable[[Place], None] | None = None
    alter_read: Sequence[tuple[str, Alteration]] = ()
    no_write: Sequence[str] = ()

    @nn.compact
    def call(
        self,
        method: str,
        /,
        *args: Any,
        train: bool | None = None,
        memory_mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls a method of the backbone and returns what it returns.

        `init` and `apply` take the backbone's methods too, `aim.apply(variables, x,
        method="encode")`; within a larger network it is `aim.call("encode", x)`. Each call is a
        pass of its own: the memory starts anew.

        Args:
          method: its name.
          *args, **kwargs: passed on as they are. The first axis of the arrays is the batch.
          train: whether update blocks use batch statistics and a carried memory is written; passed
            on in the backbone's own words, as what its mode argument is called. None: what the
            backbone is told by that argument, or its default; else evaluation.
          memory_mask: which positions of a sequence count when a memory is updated from it, (B, T):
            see `MemoryUpdate`. Not passed on.
        """
        check_backbone(self)
        net, mode = self.network, self.declared_mode
        train, kwargs = resolve(net, mode, train, args, kwargs, method)
        self._check_options(train, memory_mask)
        # Flax binds attributes one level down and takes their names. The backbone belongs in this
        # module's own place, where no name is taken but the memories'.
        scope = self.scope.rewound()
        latch = _Latch(self, scope, train, memory_mask)
        inner = {"train": train}
        if len(self.chain) > 1:
            inner["memory_mask"] = memory_mask
        outputs = self._run(scope, latch.intercept, method, args, kwargs, **inner)
        # Another method need not call all modules; but what initialises must.
        if method == "__call__" or self.is_initializing():
            latch.check_patterns()
        latch.check_axes(net, method, args, kwargs)
        latch.make_caches()
        latch.carry_on()
        return outputs

    @nn.nowrap
    def places(self, *args: Any, **kwargs: Any) -> list[Place]:
        """Returns where memories are read and written, in the order of the first calls.

        Args:
          *args, **kwargs: what the network is called with; arrays may be given as their shapes and
            dtypes. Nothing is computed.
        """
        found: dict[tuple[str, str, str], Place] = {}

        def see(place: Place) -> None:
            found.setdefault(place[:3], place)

        trace_init(self.watched(see), args, kwargs)
        return list(found.values())

    @nn.nowrap
    def watched(self, see: Callable[[Place], None]) -> "AiM":
        """Returns it with `watch` in its place, in itself and in those directly inside of it."""
        inner = self.backbone
        inner = inner.watched(see) if isinstance(inner, AiM) else inner
        return self.clone(backbone=inner, watch=see)

    @property
    def chain(self) -> "tuple[AiM, ...]":
        """This AiM and those directly inside of it, outermost first."""
        inner = self.backbone
        return (self, *inner.chain) if isinstance(inner, AiM) else (self,)

    def _check_options(self, train: bool, mask: jax.Array | None) -> None:
        check_choice("read_mode", self.read_mode, READ_MODES)
        check_choice("carry", self.carry, CARRIES)
        check_choice("fit", self.fit, FITS)
        parts_of(self.per)
        if self.called in [aim.called for aim in self.chain[1:]]:
            raise UsageError(
                f"two memories are called {self.called!r}: give each AiM a name of its own, such as"
                " called='notes'"
            )
        if self.zero_init and self.read_mode == "concat":
            raise UsageError(
                "zero_init needs read_mode 'add', 'scale' or 'attend': in 'concat' the memory has"
                " no kernel of its own"
            )
        if self.carry == "state" and self.update.pool == "causal":
            raise UsageError(
                "carry 'state' keeps one memory for the next batch, but pool 'causal' writes one"
                " for each position: use carry 'weights'"
            )
        if self.carry == "state" and not compile_patterns(self.update_after):
            raise UsageError("carry 'state' needs update_after: nothing writes to this memory")
        if mask is not None and not any(compile_patterns(a.update_after) for a in self.chain):
            raise UsageError("memory_mask is of updates, but update_after is empty")
        if not 0 < self.carry_rate <= 1:
            raise UsageError(f"carry_rate is {self.carry_rate}, expected a number in (0, 1]")
        if train and (self.alter_read or self.no_write):
            raise UsageError("interventions are for evaluation: call the network with train=False")


@dataclasses.dataclass
class _Frame:
    """A call of the backbone that has not returned yet.

    Calls of one path lie within each other where a subclass calls `super()`, and where modules
    share a scope: one place, which reads where the layer itself is called, and writes at the end.
    """

    path: str
    module: nn.Module
    has_read: bool = False


class _Latch:
    """One forward pass: the memory as it stands, and what has been seen of the backbone."""

    def __init__(self, aim: AiM, scope: Scope, train: bool, mask: jax.Array | None):
        self.aim, self.scope, self.train, self.mask = aim, scope, train, mask
        scope.flags = with_backbone(scope.flags, self)
        # Where this pass is: these change within a transformation that knows of it.
        self.place, self.trace = scope, get_opaque_trace_state(convention="flax")
        self.read = compile_patterns(aim.read)
        self.selectors = selectors(aim.update_after)
        self.update_after = tuple(self.selectors)
        self.read_initial = compile_patterns(aim.read_initial)
        self.alter_read = compile_patterns([at for at, _ in aim.alter_read])
        self.no_write = compile_patterns(aim.no_write)
        self.matched: set[tuple[str, re.Pattern]] = set()
        self.seen: dict[str, nn.Module] = {}
        self.has_read: dict[str, None] = {}
        self.read_by: set[re.Pattern] = set()
        self.unreadable: dict[re.Pattern, UnreadableError] = {}
        self.unnamed: dict[str, None] = {}
        self.frames: list[_Frame] = []
        self.pushed: set[tuple[str, str]] = set()
        self.updates: dict[str, MemoryUpdate] = {}
        self.updated_from: dict[str, jax.Array] = {}
        # Of memories, each by the name of its part; "" where one is for all.
        self.parts = parts_of(aim.per)
        self.weights = self._memories(aim.called)
        self.current = self.weights
        axes = len(check_memory(aim.memory.shape, aim.memory.kind)) - 1
        self.form = Form(aim.read_mode, aim.zero_init, aim.fit, axes)
        if aim.carry == "state":
            self.carried = {part: self._carried(part) for part in self.weights}
            self.current = {
                part: weights + self.carried[part].value for part, weights in self.weights.items()
            }
        if self.read_initial:
            self.initial = self._memories(f"{aim.called}_initial")
        if aim.capture and self._measures(aim):
            self._sow_start(aim.called, self.current)
            if self.read_initial:
                self._sow_start(f"{aim.called}_initial", self.initial)

    @contextmanager
    def within(self, module: nn.Module, memories: dict[str, jax.Array]) -> Iterator[None]:
        """For a Flax transformation of a module that takes `current` in and gives it back: within
        it, the pass goes on inside the transformation."""
        before = self.place, self.trace, self.updates, self.current
        self.place, self.trace = module.scope, get_opaque_trace_state(convention="flax")
        self.updates, self.current = {}, memories
        try:
            yield
        finally:
            self.place, self.trace, self.updates, self.current = before

    def _memories(self, name: str) -> dict[str, jax.Array]:
        scope, found = push_latched_on(self.scope, name), {}
        for part in self.parts.values():
            own = push_latched_on(scope, part) if part else scope
            found[part] = self.aim.memory.clone(parent=own, name=None)(self.train)
        return found

    def _carried(self, part: str) -> nn.Variable:
        name = "carried" if self.aim.called == "memory" else f"{self.aim.called}_carried"
        name = f"{name}_{part}" if part else name
        return self.aim.variable("memory", name, jnp.zeros_like, self.weights[part][0])

    def _sow_start(self, name: str, memories: dict[str, jax.Array]) -> None:
        at_start = memories if self.aim.per else memories[""]
        self.aim.sow("intermediates", f"{name}_at_start", at_start)

    def _part(self, path: str) -> str:
        """Returns the name of the part whose memory a module reads or writes."""
        beginnings = [beginning for beginning in self.parts if path.startswith(beginning)]
        if not beginnings:
            raise UsageError(
                f"{path!r} reads or writes the memory, but begins with none of per:"
                f" {', '.join(self.parts)}"
            )
        return self.parts[max(beginnings, key=len)]

    def _name(self, part: str, initial: bool = False) -> str:
        name = f"{self.aim.called}_initial" if initial else self.aim.called
        return f"{name}/{part}" if part else name

    def _push(self, module: nn.Module, what: str) -> Scope:
        """Returns the scope of what is latched on to a module: in the module's own, for a name at
        the top could be taken by the backbone."""
        path, name = self._path(module), f"{self.aim.called}_{what}"
        if module.scope.name_reserved(name) and (path, name) not in self.pushed:
            raise UsageError(
                f"{path!r} has a submodule or parameter called {name!r}, as is what the latch puts"
                " there: give it another name"
            )
        self.pushed.add((path, name))
        return push_latched_on(module.scope, name)

    def _path(self, module: nn.Module) -> str:
        return "/".join(module.path[len(self.scope.path) :])

    def intercept(
        self, next_fun: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not is_in_backbone(module, self):
            return next_fun(*args, **kwargs)
        path = self._path(module)
        if not path:  # The backbone itself, or what shares its scope.
            if not isinstance(module, Latched):
                self.unnamed.setdefault(type(module).__name__)
            return next_fun(*args, **kwargs)
        if path in (self.aim.called, f"{self.aim.called}_initial"):
            raise UsageError(
                f"the backbone has a module {path!r}, as is the memory: name the memory otherwise,"
                " such as called='notes'"
            )
        outer = [frame for frame in self.frames if frame.path == path]
        frame = _Frame(path, module)
        self.frames.append(frame)
        try:
            y = self._call(next_fun, args, kwargs, context, outer)
        finally:
            self.frames.pop()
        if outer:
            outer[-1].has_read |= frame.has_read
        elif self._match("update_after", path):
            silent = self._match("no_write", path)
            # At initialisation it writes all the same, so that its parameters are made.
            if not silent or self.aim.is_initializing():
                self._update(y, module, path)
        return y

    def _call(
        self,
        next_fun: Callable,
        args: tuple,
        kwargs: dict,
        context: nn.module.InterceptorContext,
        outer: list[_Frame],
    ) -> Any:
        """Returns what a module's call gives, with the memory read into it where it matches."""
        module, frame = context.module, self.frames[-1]
        path = frame.path
        if not outer or kind_of(module) is not None:
            self.seen[path] = module
        if any("jit(" in name for name in transformations(module, self.place)):
            raise UsageError(
                f"{path!r} runs inside nn.jit, which calls what it compiled before and so would"
                " read an old memory: remove nn.jit and compile the whole step with jax.jit"
            )
        patterns = self._match("read", path)
        if not patterns:
            if self._match("read_initial", path):
                raise UsageError(f"read_initial matches {path!r}, which read does not match")
            return next_fun(*args, **kwargs)
        call = Call(module, path, next_fun, context.orig_method.func, args, kwargs)
        plain = is_plain_call(module, call.function)
        if not plain:
            y = next_fun(*args, **kwargs)
            if outer or frame.has_read:
                return y
            # No plain layer was called within.
            call = dataclasses.replace(call, run=lambda *args, **kwargs: y)
        frame.has_read = True
        try:
            y = self._read(call, plain)
        except UnreadableError as refusal:
            for pattern in patterns:
                self.unreadable.setdefault(pattern, refusal)
            return call.run(*args, **kwargs)
        self.read_by.update(patterns)
        self.has_read[path] = None
        for what in ("read_initial", "alter_read"):  # Only now: they are of what can read.
            self._match(what, path)
        return y

    def _match(self, what: str, path: str) -> list[re.Pattern]:
        matching = [pattern for pattern in getattr(self, what) if pattern.fullmatch(path)]
        self.matched.update((what, pattern) for pattern in matching)
        return matching

    def _read(self, call: Call, plain: bool) -> jax.Array:
        aim, module, path = self.aim, call.module, call.path
        check_readable(module, path, aim.read_mode)
        if aim.read_mode == "concat" and not plain:
            raise UnreadableError(
                f"read matches {path!r}, but its class {type(module).__name__} multiplies by a"
                " kernel in a way of its own, so the memory cannot be given a part of it: use"
                " read_mode 'add' or 'scale'"
            )
        if around := no_reads_within(transformations(module, self.place)):
            raise UnreadableError(
                f"read matches {path!r}, which runs inside {around}: read in a layer outside"
            )
        part = self._part(path)
        if initial := any(pattern.fullmatch(path) for pattern in self.read_initial):
            m = weights = self.initial[part]
        else:
            m, weights = self.current[part], self.weights[part]
        for pattern, (_, alter) in zip(self.alter_read, aim.alter_read, strict=True):
            if pattern.fullmatch(path):
                m = alter(m, weights, call.x.shape[0], path)
        measure = self._measures(module)
        y = read(call, m, self.form, self._push, measure, aim.called)
        warn_of_keys(module, path, aim.read_mode)
        if aim.watch is not None:
            aim.watch(Place("read", path, self._name(part, initial), call.x.shape))
        if measure and aim.capture:
            module.sow("intermediates", f"{aim.called}_as_read", m)
        return y

    def _measures(self, module: nn.Module) -> bool:
        return module.is_mutable_collection("intermediates") and not module.is_initializing()

    def _update(self, y: Any, module: nn.Module, path: str) -> None:
        moved = get_opaque_trace_state(convention="flax") != self.trace
        if moved or transformations(module, self.place):
            raise UsageError(
                f"update_after matches {path!r}, which runs inside a Flax transformation (nn.remat,"
                " nn.scan, nn.vmap, nn.cond, ...): what is written there cannot leave it; update"
                " after a module around the transformed one, or behind it"
            )
        pattern = next(p for p in self.update_after if p.fullmatch(path))
        y = select(y, self.selectors[pattern], path)
        if not isinstance(y, jax.Array | np.ndarray):
            raise UsageError(
                f"update_after matches {path!r}, whose output is a {type(y).__name__}: say which"
                f" part of it is the array, such as update_after={{{path!r}: 0}} for the first"
            )
        part = self._part(path)
        before = self.current[part]
        if self.aim.update.pool == "causal" and self.form.axes:
            raise UsageError(
                "pool 'causal' makes one memory for each position of a dense memory, shape (D,),"
                f" not {before.shape[1:]}"
            )
        if y.ndim:
            check_batch(before, y, path)
        if path not in self.updates:
            scope = self._push(module, "update")
            self.updates[path] = self.aim.update.clone(parent=scope, name=None)
        if self.aim.watch is not None:
            self.aim.watch(Place("update", path, self._name(part), y.shape))
        update = self.updates[path]
        self.updated_from[path] = y
        try:
            after = update(y, before, self.train, self.mask, self._decodes(), fitted=self.aim.fit)
        except UsageError as error:
            raise UsageError(f"update_after matches {path!r}: {error}") from None
        self.current = {**self.current, part: after}
        if self._measures(module):
            change = after.astype(jnp.float32) - before.astype(jnp.float32)
            record(module, change, before, f"{self.aim.called}_update_use")
            if self.aim.capture:
                module.sow("intermediates", f"{self.aim.called}_as_written", after)

    def _decodes(self) -> bool:
        """Whether this pass goes on from the last: the network has a cache, and may write it."""
        cached = self.scope.is_mutable_collection("cache")
        has_cache = bool(self.scope.variables().get("cache"))
        return cached and has_cache and not self.aim.is_initializing()

    def check_patterns(self) -> None:
        """Raises UsageError for a pattern that matched nothing, or nothing that can read."""
        for pattern, refusal in self.unreadable.items():
            if pattern not in self.read_by:
                raise refusal
        readable = [path for path, module in self.seen.items() if isinstance(module, READABLE)]
        updates = [path for path in self.seen if self._match("update_after", path)]
        places = {
            "read": ("read", "module", readable),
            "update_after": ("update_after", "module", list(self.seen)),
            "read_initial": ("read_initial", "module", readable),
            "alter_read": ("at", "read", list(self.has_read)),
            "no_write": ("at", "update", updates),
        }
        for what, (name, noun, paths) in places.items():
            for pattern in getattr(self, what):
                if (what, pattern) in self.matched:
                    continue
                network = type(self.aim.network).__name__
                advice = ""
                if sharing := [name for name in self.unnamed if name != network]:
                    advice = (
                        f"; {', '.join(sharing)} shares the scope of {network}, so it has no path:"
                        f" put {network} into a module"
                    )
                raise UsageError(
                    f"{name} pattern {pattern.pattern!r} matches no {noun} of"
                    f" {network}{nearest(pattern.pattern, paths)};"
                    f" there are: {', '.join(paths) or 'none'}{advice}"
                )

        parts_read = {self._part(path) for path in self.has_read}
        for beginning, part in self.parts.items():
            if part and part not in parts_read:
                raise UsageError(
                    f"per has {beginning!r}, but no module whose path begins with it reads the"
                    f" memory; it is read in: {', '.join(self.has_read)}"
                )

    def check_axes(self, net: nn.Module, method: str, args: tuple, kwargs: dict) -> None:
        """Raises UsageError where the first axis is not the batch, but a memory per example is."""
        if not self.update_after or not self.aim.check_batch:
            return
        written = {self._part(path) for path in self.updates}
        # Of which there is one for the whole batch, at the end too.
        unwritten = [path for path in self.has_read if self._part(path) not in written]
        ignored = (*self.read_initial, *compile_patterns([re.escape(path) for path in unwritten]))
        places = (self.read, ignored, self.selectors)
        for axis in (0, 1) if self.aim.update.pool == "causal" else (0,):
            batch_axis.check(net, method, args, kwargs, *places, axis)

    def make_caches(self) -> None:
        """At initialisation of a network that decodes step by step, makes what updates keep of the
        steps before, so that the cache has its structure from the start."""
        is_causal = self.aim.update.pool == "causal"
        if is_causal and self.aim.is_initializing() and self.scope.variables().get("cache"):
            for path, update in self.updates.items():
                update.make_cache(self.updated_from[path])

    def carry_on(self) -> None:
        """Keeps what was written for the next batch, when the carry is `state`."""
        aim = self.aim
        if aim.carry != "state" or not self.train or aim.is_initializing():
            return
        for part, weights in self.weights.items():
            written = self.current[part].astype(weights.dtype).mean(axis=0)
            if aim.update.axis_name is not None:
                written = jax.lax.pmean(written, aim.update.axis_name)
            change = jax.lax.stop_gradient(written - weights[0])
            carried = self.carried[part]
            carried.value = (1 - aim.carry_rate) * carried.value + aim.carry_rate * change


def parts_of(per: Sequence[str]) -> dict[str, str]:
    """Returns the name of the part of a network that each of `AiM.per` stands for; {"": ""} if
    there are none.

    Raises:
      UsageError: an empty one, or two of one name.
    """
    beginnings = (per,) if isinstance(per, str) else tuple(per)
    if not beginnings:
        return {"": ""}
    parts = {beginning: beginning.strip("/").replace("/", ".") for beginning in beginnings}
    if not all(parts.values()):
        raise UsageError(f"per is {beginnings}, expected beginnings of module paths")
    if len(set(parts.values())) < len(beginnings):
        raise UsageError(f"per is {beginnings}: two of them are the same")
    return parts
