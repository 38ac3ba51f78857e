"""jax.pmap of functions that are forgotten once nobody holds them.

JAX 0.10 to 0.12 keep in a cache what pmap has made of a function. The cache refers to the function
weakly, and what it keeps refers to it strongly, so that neither is ever freed, nor is anything that
the function closes over: a network, a dataset, a compiled program.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax


class Pmapped:
    """A function mapped by `jax.pmap`; it, and its programs, are freed with this object."""

    def __init__(self, fn: Callable, axis: str, devices: Sequence[jax.Device], **options: Any):
        """Maps `fn` over an axis of devices; `options` are those of `jax.pmap`."""
        self._fn, held = fn, weakref.ref(fn)

        def call(*args: Any) -> Any:
            return held()(*args)

        self._mapped = jax.pmap(call, axis, devices=devices, **options)
        weakref.finalize(self, _forget, call)

    def __call__(self, *args: Any) -> Any:
        return self._mapped(*args)


def _forget(call: Callable) -> None:
    """Takes a function out of JAX's cache; the compiled programs stay if that can't be reached."""
    try:
        from jax._src.pmap import _cached_shard_map

        _cached_shard_map.evict_function(call)
    except (ImportError, AttributeError):
        pass
