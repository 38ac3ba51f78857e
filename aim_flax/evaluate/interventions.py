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

from aim_flax.backbone import trace_init
from aim_flax.errors import UsageError, check_choice
from aim_flax.latch import AiM, Alteration
from aim_flax.memory import fixed_key
from aim_flax.patterns import compile_patterns


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


def intervene(model: nn.Module, kind: str, at: str = ".*", memory: str | None = None) -> AiM:
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
      memory: the name of the memory that is altered, where there are several; None: the outermost.

    Raises:
      UsageError: a network without memory, or without that one, an unknown kind, or a bad `at`;
        when the network is applied, an `at` that matches nothing, or train=True.
    """
    if not isinstance(model, AiM):
        raise UsageError(f"the network, {type(model).__name__}, has no memory to alter")
    if memory not in (None, model.called):
        check_choice("the memory", memory, [aim.called for aim in model.chain])
        return model.clone(backbone=intervene(model.backbone, kind, at, memory))
    check_choice("the intervention", kind, KINDS)
    if not compile_patterns(at):
        raise UsageError("at is empty, expected a regular expression that matches module paths")
    if kind == "no_write":
        return model.clone(no_write=(*model.no_write, at))
    return model.clone(alter_read=(*model.alter_read, (at, _ALTERATIONS[kind])))


def layers(model: AiM, *args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    """Returns the paths of the layers that read and of the modules with an update block.

    Both in the order of their first call, and of the outermost memory where there are several;
    `model.backbone` has those of the next.

    Args:
      *args, **kwargs: what the network is called with; arrays may be given as their shapes and
        dtypes. Nothing is computed.
    """
    names = (model.called, f"{model.called}_initial")
    places = model.places(*args, **kwargs)
    found = [place for place in places if place.memory.partition("/")[0] in names]
    return tuple([p.path for p in found if p.what == what] for what in ("read", "update"))


def matching(model: nn.Module, at: str, *args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
    """Returns which of the paths that `layers` lists `at` matches.

    Raises:
      UsageError: as `intervene` does, also where `at` matches neither a read nor an update.
    """
    keep = intervene(model, "keep", at)
    every = layers(model, *args, **kwargs)
    found = tuple([p for p in paths if re.fullmatch(at, p)] for paths in every)
    if not any(found):
        layers(keep, *args, **kwargs)  # raises, naming the reads
    return found


def reads_per_example(model: AiM, *args: Any, **kwargs: Any) -> set[str]:
    """Returns the paths of the layers that find a different memory for each example.

    The others find the same memory for the whole batch. There "mean" and "shuffle" change nothing,
    and "reset" only takes away what was carried.

    Args:
      *args, **kwargs: as for `layers`, with at least two examples.
    """
    found = set()

    def look(m: jax.Array, weights: jax.Array, batch_size: int, path: str) -> jax.Array:
        if m.shape[0] > 1:
            found.add(path)
        return m

    trace_init(_altering(model, look), args, kwargs)
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
