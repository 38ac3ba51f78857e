"""Evaluation with an altered memory, to learn what a trained network uses its memory for.

A memory that changes in training need not be used. Taking it away from some layers, or giving an
example another example's memory, shows how much the accuracy depends on it. That is causal
evidence; the norms that a read records are only a correlation.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice
from aim_flax.latch import OWN_NAMES, AiM, Alteration, compile_patterns
from aim_flax.memory import fixed_key


def _noise(m: jax.Array, weights: jax.Array, batch_size: int, path: str) -> jax.Array:
    floats = tuple(range(1, m.ndim))
    mean, deviation = m.mean(floats, keepdims=True), m.std(floats, keepdims=True)
    shape = (batch_size, *m.shape[1:])
    return mean + deviation * jax.random.normal(fixed_key(path.split("/")), shape, m.dtype)


_ALTERATIONS: dict[str, Alteration] = {
    "keep": lambda m, *_: m,
    "zero": lambda m, *_: jnp.zeros_like(m),
    "mean": lambda m, *_: m.mean(axis=0, keepdims=True),
    "shuffle": lambda m, *_: jnp.roll(m, -1, axis=0),
    "noise": _noise,
    "reset": lambda m, weights, *_: weights,
}
READ_KINDS = tuple(_ALTERATIONS)
KINDS = (*READ_KINDS, "no_write")


def intervene(model: nn.Module, kind: str, at: str = ".*") -> AiM:
    """Returns a network with the same variables that computes with an altered memory.

    Only what layers read is altered. Update blocks, and so all later memories, still start from the
    true memory, so that an effect belongs to the reads that `at` names. (What an altered read
    changes in its layer's output does reach later updates, like everything after that layer.)
    Interventions on an altered network are applied in the order in which they were made.

    Args:
      model: a latched network, as `build_model` returns it for a config with a memory.
      kind: "keep" changes nothing. With the others the reads find:
        "zero": zeros;
        "mean": the mean of the memory over the examples of the batch;
        "shuffle": for each example the memory of the next one, for the last that of the first;
        "noise": normal noise with the mean and standard deviation of the example's own memory,
          from a fixed key for each layer, so that evaluation can be repeated;
        "reset": the memory of the learned weights alone, without what updates wrote or what was
          carried.
        With "no_write" the update blocks leave the memory as it was. Until something is written,
        all examples of a batch share one memory, so that "mean" and "shuffle" change nothing.
        A batch is that of one device, including the rows that only fill it up.
      at: a regular expression that must match the whole path of a reading layer, or with
        "no_write" of a module with an update block; `layers` lists both.

    Raises:
      UsageError: a network without memory, an unknown kind, or a bad `at`; when the network is
        applied, an `at` that matches nothing, or train=True.
    """
    if not isinstance(model, AiM):
        raise UsageError(f"there is no memory to alter: the network is a {type(model).__name__}")
    check_choice("the intervention", kind, KINDS)
    if not compile_patterns(at):
        raise UsageError("at is empty, expected a regular expression that matches module paths")
    if kind == "no_write":
        return model.clone(no_write=(*model.no_write, at))
    return model.clone(alter_read=(*model.alter_read, (at, _ALTERATIONS[kind])))


def layers(model: AiM, *args: jax.Array | jax.ShapeDtypeStruct) -> tuple[list[str], list[str]]:
    """Returns the paths of the layers that read and of the modules with an update block.

    Both in the order of their first call.

    Args:
      *args: what the network is called with, or its shape and dtype; nothing is computed.
    """
    called: dict[str, tuple[str, ...]] = {}

    def see(next_fun, given, options, context):
        names = context.module.path
        if context.method_name == "__call__" and names:
            called["/".join(names)] = names
        return next_fun(*given, **options)

    with nn.intercept_methods(see):
        jax.eval_shape(model.init, jax.random.key(0), *args)
    patterns = compile_patterns(model.read)
    reads = [
        path
        for path, names in called.items()
        if not set(names) & set(OWN_NAMES) and any(p.fullmatch(path) for p in patterns)
    ]
    updates = ["/".join(n[:-1]) for n in called.values() if n[-1] == "memory_update"]
    return reads, updates


def matching(
    model: nn.Module, at: str, *args: jax.Array | jax.ShapeDtypeStruct
) -> tuple[list[str], list[str]]:
    """Returns which of the paths that `layers` lists `at` matches.

    Raises:
      UsageError: as `intervene` does, also where `at` matches neither a read nor an update.
    """
    keep = intervene(model, "keep", at)
    found = tuple([p for p in paths if re.fullmatch(at, p)] for paths in layers(model, *args))
    if not any(found):
        layers(keep, *args)  # raises, naming the reads
    return found


def reads_per_example(model: AiM, *args: jax.Array | jax.ShapeDtypeStruct) -> set[str]:
    """Returns the paths of the layers that find a different memory for each example.

    The others find the same memory for the whole batch. There "mean" and "shuffle" change nothing,
    and "reset" only takes away what was carried.

    Args:
      *args: as for `layers`, with at least two examples.
    """
    found = set()

    def look(m: jax.Array, weights: jax.Array, batch_size: int, path: str) -> jax.Array:
        if m.shape[0] > 1:
            found.add(path)
        return m

    jax.eval_shape(_altering(model, look).init, jax.random.key(0), *args)
    return found


@dataclasses.dataclass(frozen=True)
class Choosable:
    """A network whose reads are altered as its variables say: one program for all interventions.

    Attributes:
      model: a latched network.
      reads: the paths of its layers that read, see `layers`.
    """

    model: AiM
    reads: tuple[str, ...]

    def choose(self, kind: str, paths: set[str]) -> dict[str, np.ndarray]:
        """Returns the variables with which the reads `paths` find `kind`, one of READ_KINDS."""
        kinds = [kind if path in paths else "keep" for path in self.reads]
        return {"interventions": np.array([READ_KINDS.index(k) for k in kinds], np.int32)}

    def apply(self, variables: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Applies the network to its own variables and those of `choose`."""
        own = {name: value for name, value in variables.items() if name != "interventions"}

        def alter(m: jax.Array, weights: jax.Array, batch_size: int, path: str) -> jax.Array:
            def altered(alteration, m, weights):
                found = alteration(m, weights, batch_size, path)
                # All branches must have one shape; noise has a row for each example.
                return jnp.broadcast_to(found, (batch_size, *m.shape[1:]))

            index = variables["interventions"][self.reads.index(path)]
            branches = [partial(altered, alteration) for alteration in _ALTERATIONS.values()]
            return jax.lax.switch(index, branches, m, weights)

        return _altering(self.model, alter).apply(own, *args, **kwargs)


def _altering(model: AiM, alteration: Alteration) -> AiM:
    return model.clone(alter_read=(*model.alter_read, (".*", alteration)))
