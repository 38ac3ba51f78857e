"""Where the first axis is the batch: found by tracing a network at twice the batch size.

A memory that was written holds one content per example, so whoever reads or writes it must have
the examples on its first axis. Sizes alone cannot tell that: in time-major code, or within a vmap
over examples, another axis may be as long as the batch. The axis that grows with it is the batch.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import core
from flax import linen as nn
from flax.core import Scope
from flax.linen import module as linen_module

from aim_flax.errors import UsageError
from aim_flax.patterns import Selector, select
from aim_flax.scopes import is_in_backbone, with_backbone

AXES = {0: "batch", 1: "sequence"}
# What was found for a network and shapes. Bounded: cleared when full.
_FOUND: dict[Any, str | None] = {}
_MOST_FOUND = 512

Places = tuple[
    tuple[re.Pattern, ...], tuple[re.Pattern, ...], tuple[tuple[re.Pattern, Selector], ...]
]
Finds = list[tuple[str, str, tuple[int, ...]]]  # (what, path, shape) in the order of the calls


def check(
    backbone: nn.Module,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reads: Sequence[re.Pattern],
    ignored: Sequence[re.Pattern],
    updates: Mapping[re.Pattern, Selector],
    axis: int = 0,
) -> None:
    """Raises UsageError for a read of a written memory, or an update, off the batch axis.

    The plain network is traced, abstractly, at twice the size of its inputs' first axis; no more
    than once for the same network and shapes. Inputs are taken together that have as many examples
    as the first of them; where such an input could as well grow alone, and a place depends on
    which of them does, nobody can tell whether they hold the same examples.

    Args:
      backbone: the network, unbound.
      method: the name of what is called.
      args, kwargs: of its call; arrays may be traced.
      reads: patterns of the layers that read the memory.
      ignored: patterns of those among them that read another one, which is never written.
      updates: patterns of the modules after which it is written, and what of their output counts.
      axis: 0, or 1 to ask the same of the second axis, the sequence.

    Raises:
      UsageError: such a place, or a network that cannot be traced at another batch size.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    described = tuple((leaf.shape, str(leaf.dtype)) if _is_array(leaf) else leaf for leaf in leaves)
    places = (tuple(reads), tuple(ignored), tuple(updates.items()))
    key = (backbone, method, tree, described, places, axis)
    try:
        known = key in _FOUND
    except TypeError:  # Something in it has no hash: traced each time.
        known, key = False, None
    if known:
        problem = _FOUND[key]
    else:
        problem = _problem(backbone, method, leaves, tree, places, axis)
        if key is not None:
            if len(_FOUND) >= _MOST_FOUND:
                _FOUND.clear()
            _FOUND[key] = problem
    if problem is not None:
        raise UsageError(problem)


def _problem(
    backbone: nn.Module,
    method: str,
    leaves: list[Any],
    tree: Any,
    places: Places,
    axis: int,
) -> str | None:
    """Returns what is wrong with a place, or None."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if _is_array(leaf) and len(leaf.shape) > axis and leaf.shape[axis] > 0:
            groups.setdefault(leaf.shape[: axis + 1], []).append(i)
    failure = problem = None

    def trace(grown: list[int], size: int) -> Finds | None:
        nonlocal failure
        try:
            return _trace(backbone, method, leaves, tree, grown, axis, size, places)
        except Exception as error:  # Whatever a network may raise at a size that it doesn't know.
            failure = failure or error
            return None

    for shape, together in groups.items():
        first = together[:1]
        for size in (2 * shape[axis], max(1, shape[axis] // 2)):
            found = trace(together, size)
            alone = trace(first, size) if len(together) > 1 and shape[axis] > 1 else None
            joint = found if found is not None else alone
            if joint is None or size == shape[axis]:
                continue
            off = _off_axis(joint, size, axis)
            if off is None and found is not None and alone is not None:
                off = _off_axis(alone, size, axis)
                if off is not None:
                    return (
                        f"{off[0]} matches {off[1]!r}, which sees another input than the network's"
                        f" first, with as many rows: if row i of both is the same example, say so"
                        " with AiM(..., check_batch=False); else read and update elsewhere"
                    )
            if off is None:
                return None
            what, path, seen = off
            problem = problem or (
                f"{what} matches {path!r}, which has an array {seen} for a {AXES[axis]} of {size}:"
                f" its {('first', 'second')[axis]} axis is not the {AXES[axis]}, so examples would"
                " find each other's memory; read and update where it is, or read before the first"
                " update"
            )
            if axis == 0:
                return problem
            break  # The sequence may be that of another input, as of a decoder's.
    if problem is not None or failure is None:
        return problem
    reason = str(failure).strip().partition("\n")[0]
    return (
        f"{type(backbone).__name__} cannot be traced at another {AXES[axis]} size"
        f" ({type(failure).__name__}: {reason}), which is how its {AXES[axis]} axis is found; with"
        f" AiM(..., check_batch=False) the {('first', 'second')[axis]} axis is taken for it"
    )


def _off_axis(found: Finds, size: int, axis: int) -> tuple[str, str, tuple[int, ...]] | None:
    """Returns the first place that needs the axis and has it not, reads before any update aside."""
    written = False
    for what, path, shape in found:
        written = written or what == "update_after"
        if written and (len(shape) <= axis or shape[axis] != size):
            return what, path, shape
    return None


def _trace(
    backbone: nn.Module,
    method: str,
    leaves: list[Any],
    tree: Any,
    grown: list[int],
    axis: int,
    size: int,
    places: Places,
) -> Finds:
    """Returns the places that a plain network calls, with its inputs `grown` of that size."""
    found: Finds = []
    token = object()

    reads, ignored, updates = places

    def see(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name != "__call__" or not is_in_backbone(context.module, token):
            return next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if _matches(reads, path) and not _matches(ignored, path):
            inputs = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _is_array(leaf)]
            found.extend(("read", path, x.shape) for x in inputs[:1])
        y = next_fun(*args, **kwargs)
        selected = [selector for pattern, selector in updates if pattern.fullmatch(path)]
        for part in [select(y, selector, path) for selector in selected[:1]]:
            found.extend([("update_after", path, part.shape)] * _is_array(part))
        return y

    def run(scope: Scope, *arrays: jax.Array) -> Any:
        given = list(leaves)
        for i, array in zip(grown, arrays, strict=True):
            given[i] = array
        args, kwargs = jax.tree.unflatten(tree, given)
        return getattr(backbone.clone(parent=scope), method)(*args, **kwargs)

    init = core.init(run, core.DenyList("intermediates"), with_backbone({}, token))

    shapes = []
    for i in grown:
        shape = list(leaves[i].shape)
        shape[axis] = size
        shapes.append(jax.ShapeDtypeStruct(tuple(shape), leaves[i].dtype))
    # Variables may be of other dtypes than those that are made here, so none has to fit an input's.
    standard = jax.numpy_dtype_promotion("standard")
    with _unseen(), standard, nn.intercept_methods(see):
        # The key is made within, so that nothing of this is left in what JAX traces around it.
        jax.eval_shape(lambda *arrays: init(jax.random.key(0), *arrays), *shapes)
    return found


@contextmanager
def _unseen() -> Iterator[None]:
    """Keeps the calls of a trace out of nn.tabulate's table and of captured intermediates."""
    context = linen_module._context
    stacks = [context.capture_stack, context.call_info_stack]
    kept = [list(stack) for stack in stacks]
    for stack in stacks:
        stack.clear()
    try:
        yield
    finally:
        for stack, calls in zip(stacks, kept, strict=True):
            stack[:] = calls


def _matches(patterns: Sequence[re.Pattern], path: str) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
