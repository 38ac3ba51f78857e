"""The size of a network, without computing or allocating anything."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from aim_flax.instead import KINDS, At, Instead
from aim_flax.latch import AiM, Place, parts_of
from aim_flax.memory import distinct_values
from aim_flax.models.build import build_model, check_logits, plain, trained


def describe(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """Describes a config's network, in as few traces as that takes: they are most of the time.

    Returns:
      The size of the network and its memory, and where that is read and written, or what is in its
      place, in lines; and the shapes and dtypes of its variables.
    """
    shape = (1, *config.data.image_shape)
    model = build_model(config)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    places: dict[tuple[str, ...], Place | At] = {}
    if isinstance(model, AiM | Instead):
        # As their `places` do it.
        seeing = model.clone(watch=lambda place: places.setdefault(_identity(place), place))
        output, variables = jax.eval_shape(seeing.init_with_output, key, image)
        backbone = jax.eval_shape(build_model(plain(config)).init, key, image)
    else:
        output, variables = jax.eval_shape(model.init_with_output, key, image)
        backbone = variables
    check_logits(output, config.model.name, config.model.num_classes)

    rows = _table(variables, backbone)
    width = max(len(name) for name, *_ in rows)
    lines = [f"{config.name}:{config.arm}, images {'x'.join(map(str, shape[1:]))}"]
    lines.append(f"{'':{width}}  {'parameters':>12}  {'running statistics':>18}")
    lines += [f"{name:{width}}  {params:12,}  {stats:18,}" for name, params, stats in rows]
    params, stats = (sum(row[i] for row in rows) for i in (1, 2))
    lines.append(f"{'total':{width}}  {params:12,}  {stats:18,}")
    lines.append(f"parameters + running statistics: {params + stats:,}")
    if config.memory is None:
        lines.append("memory floats: 0")
    else:
        memory, count = config.memory, len(parts_of(config.memory.get("per", ())))
        distinct = distinct_values(memory.shape, memory.kind, memory.get("kernel_size", 1), count)
        lines.append(f"memory floats: {memory_floats(config):,}, of which {distinct:,} can differ")
    # Checked above, where it was initialised.
    checked = trained(model)
    jaxpr = jax.make_jaxpr(lambda v, x: checked.apply(v, x, train=False))(variables, image)
    lines.append(f"multiply-adds of one image's forward pass: {multiply_adds(jaxpr.jaxpr):,}")
    if places:
        what = config.instead.kind if isinstance(model, Instead) else ""
        lines += ["places, in the order of the calls:", *_places(list(places.values()), what)]
    return "\n".join(lines), variables


def memory_floats(config: ConfigDict) -> int:
    """Returns how many floats the memories of a config's network have, for one example."""
    memory = config.memory
    if memory is None:
        return 0
    return math.prod(memory.shape) * len(parts_of(memory.get("per", ())))


def _identity(place: Place | At) -> tuple[str, ...]:
    return place[:3] if isinstance(place, Place) else (place.path,)


def _places(places: Sequence[Place | At], kind: str) -> list[str]:
    """Returns a line for each place: the module, and what it reads or writes there, or what `kind`
    of thing is latched on to it."""
    width = max(len(place.path) for place in places)
    phrases = {"read": "reads {memory} into", "update": "writes {memory} from"}
    lines = []
    for place in places:
        what = f"{kind} at"
        if isinstance(place, Place):
            what = phrases[place.what].format(memory=place.memory)
        lines.append(f"  {place.path:{width}}  {what} {'x'.join(map(str, place.shape[1:]))}")
    return lines


def _table(variables: Mapping[str, Any], backbone: Mapping[str, Any]) -> list[tuple]:
    """Returns (part, parameters, running statistics): the backbone, then what was latched on.

    A `concat` read has no parameters of its own: its row counts the layer's larger kernel.
    """
    plain = {
        collection: {path: leaf.size for path, leaf in flatten_dict(tree).items()}
        for collection, tree in backbone.items()
    }
    counts: dict[str, list[int]] = {"backbone": [0, 0]}
    for column, collection in enumerate(("params", "batch_stats")):
        for path, leaf in flatten_dict(variables.get(collection, {})).items():
            size = plain.get(collection, {}).get(path, 0)
            counts["backbone"][column] += size
            if leaf.size > size:
                row = counts.setdefault(_part(path), [0, 0])
                row[column] += leaf.size - size
    order = ("backbone", "memory", "memory_initial", "read", "update", *KINDS)
    names = sorted(counts, key=lambda name: (order.index(name.partition(" ")[0]), name))
    return [(name, *counts[name]) for name in names]


def _part(path: tuple[str, ...]) -> str:
    """Returns the row of a parameter that the plain backbone lacks, or has at a smaller size."""
    if path[0] in ("memory", "memory_initial"):
        return path[0]
    latched_on = (("memory_read", "read"), ("memory_update", "update"))
    for name, part in (*latched_on, *zip(KINDS, KINDS, strict=True)):
        if name in path:
            return f"{part} {'/'.join(path[: path.index(name)])}"
    return f"read {'/'.join(path[:-1])}"


def multiply_adds(jaxpr: Jaxpr) -> int:
    """Returns the multiply-adds of all matrix products and convolutions in a jaxpr.

    Padding counts as well; the body of a scan counts once per turn. Where platforms differ in how
    something is computed, it counts as on those that have no way of their own.
    """
    total, platforms = 0, set()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        out = equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += out.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += out.size * kernel.size // features
        elif name == "platform_index":
            platforms.add(equation.outvars[0])
        elif name == "cond" and equation.invars[0] in platforms:
            total += multiply_adds(params["branches"][-1].jaxpr)  # the default
        else:
            inner = sum(multiply_adds(sub) for sub in _inner(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def intermediate_bytes(jaxpr: Jaxpr) -> int:
    """Returns the bytes of everything that a jaxpr's operations compute, one after the other.

    What a training step holds at once is less: XLA fuses operations, and frees what is used up. Of
    ways that differ by platform the last one counts, which is the default.
    """
    total = 0
    for equation in jaxpr.eqns:
        if inner := _inner(equation.params):
            branches = inner[-1:] if equation.primitive.name == "cond" else inner
            total += sum(map(intermediate_bytes, branches))
        else:
            total += sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
    return total


def _inner(params: Mapping[str, Any]) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()))
    inner = [leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves]
    return [leaf for leaf in inner if isinstance(leaf, Jaxpr)]
