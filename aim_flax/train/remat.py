"""Modules whose activations are not kept for the backward pass, but computed again in it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from aim_flax.backbone import trace_init
from aim_flax.errors import UsageError, nearest
from aim_flax.scopes import latches
from aim_flax.train.freeze import compiled


@contextlib.contextmanager
def recomputing(pattern: str) -> Iterator[None]:
    """Within it, modules are recomputed in the backward pass whose whole path a pattern matches.

    Of a matching module only its inputs, its variables and the memory as it finds it are kept,
    whatever lies within: modules inside of it that match, too, make no difference. This is
    `flax.linen.remat` (T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016), put
    around modules from outside as the latch is. What a batch norm or an update of the memory within
    writes is taken once, and random draws are the same in both passes.
    """
    if not pattern:
        yield
        return
    matching, inside = re.compile(pattern), False

    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        path = "/".join(module.path)
        matches = path and context.method_name == "__call__" and matching.fullmatch(path)
        if not matches or inside or module.is_initializing():
            return call(*args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        # The rest are flags such as train, which the module's code asks for.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
        passes = latches(module)

        def recomputed(module: nn.Module, arrays: list[Any], memories: list[Any]) -> Any:
            nonlocal inside
            given = list(leaves)
            for i, array in zip(places, arrays, strict=True):
                given[i] = array
            args, kwargs = jax.tree.unflatten(tree, given)
            with contextlib.ExitStack() as stack:
                for one, memory in zip(passes, memories, strict=True):
                    stack.enter_context(one.within(module, memory))
                inside = True
                try:
                    y = module(*args, **kwargs)
                finally:
                    inside = False
                return y, [one.current for one in passes]

        memories = [one.current for one in passes]
        y, memories = nn.remat(recomputed)(module, [leaves[i] for i in places], memories)
        for one, memory in zip(passes, memories, strict=True):
            one.current = memory
        return y

    with nn.intercept_methods(intercept):
        yield


def check_remat(model: nn.Module, image_shape: tuple[int, ...], pattern: str) -> None:
    """Raises UsageError for a pattern that is no regular expression or matches no module.

    Args:
      model: the network, of images (B, *image_shape).
    """
    if not pattern:
        return
    matching = compiled("train.remat", pattern)
    paths: dict[str, None] = {}

    def see(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if context.method_name == "__call__" and context.module.path:
            paths.setdefault("/".join(context.module.path))
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    with nn.intercept_methods(see):
        trace_init(model, (images,), {"train": False})
    if not any(map(matching.fullmatch, paths)):
        raise UsageError(
            f"train.remat {pattern!r} matches no module of the network, such as"
            f" {next(iter(paths))}{nearest(pattern, paths)}"
        )
