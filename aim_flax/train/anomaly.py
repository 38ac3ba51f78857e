"""Which layer of a network computed the first number that is not finite, in a training step.

Every array of floats that goes into or comes out of a call of a module passes through an identity
with a second argument, a probe of zeros. The probe's gradient is how many of the array's numbers,
and how many of its gradient's, are not finite. So the counts come back through whatever
transformations a network is made of (remat, scan, vmap), as gradients do.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Probe:
    """A place where numbers are looked at.

    Attributes:
      path: of the module, "" for the whole network.
      side: "input" or "output" of its call.
    """

    path: str
    side: str

    def __str__(self) -> str:
        return f"the {self.side} of {self.path or 'the network'}"


@jax.custom_vjp
def _looked_at(x: jax.Array, probe: jax.Array) -> jax.Array:
    return x


def _forward(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, _not_finite(x)


def _backward(count: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.stack([count, _not_finite(gradient)])


_looked_at.defvjp(_forward, _backward)


def _not_finite(x: jax.Array) -> jax.Array:
    return (~jnp.isfinite(x)).sum().astype(jnp.float32)


def find_probes(run: Callable[..., Any], *args: Any) -> tuple[Probe, ...]:
    """Returns the places of a network's call, in the order in which it comes to them.

    Args:
      run: calls the network with the other arguments: arrays, or their shapes and dtypes. Nothing
        is computed.
    """
    found: list[Probe] = []
    with nn.intercept_methods(_interceptor(lambda x, probe: found.append(probe) or x)):
        # A new function: one that JAX has traced before would not be traced again.
        jax.eval_shape(lambda *args: run(*args), *args)
    return tuple(found)


@contextlib.contextmanager
def probing(places: Sequence[Probe], zeros: Sequence[jax.Array]) -> Iterator[None]:
    """Within it, a network's call looks at its numbers.

    Args:
      places: what `find_probes` returned for the same call.
      zeros: (2,) float32 for each place; its gradient counts what is not finite in an array, and
        in the array's gradient.
    """
    rest = iter(enumerate(places))

    def look(x: jax.Array, probe: Probe) -> jax.Array:
        i, expected = next(rest)
        assert probe == expected, f"{probe} comes where {expected} was found"
        return _looked_at(x, zeros[i])

    with nn.intercept_methods(_interceptor(look)):
        yield


def _interceptor(look: Callable[[jax.Array, Probe], jax.Array]) -> Callable:
    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        # A latch may initialise the network within its call, to see shapes.
        if context.method_name == "setup" or module.is_initializing():
            return call(*args, **kwargs)
        path = "/".join(module.path)

        def each(tree: Any, side: str) -> Any:
            return jax.tree.map(lambda x: look(x, Probe(path, side)) if _is_float(x) else x, tree)

        args, kwargs = each((args, kwargs), "input")
        return each(call(*args, **kwargs), "output")

    return intercept


def _is_float(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)


def first_anomaly(
    counts: Sequence[jax.Array], loss: jax.Array, gradients: Any, params: Any
) -> jax.Array:
    """Returns which of a step's numbers is the first that is not finite: () int32, an index of
    `anomaly_names`, or -1.

    Args:
      counts: the gradients of `probing`'s zeros.
      loss: () of the batch.
      gradients, params: of the parameters, and these after the step.
    """
    of_values, of_gradients = jnp.stack(counts).T
    bad = jnp.concatenate(
        [
            of_values,
            _not_finite(loss)[None],
            of_gradients[::-1],  # Backpropagation comes to the last place first.
            *(_not_finite(x)[None] for x in jax.tree.leaves((gradients, params))),
        ]
    )
    return jnp.where((bad > 0).any(), (bad > 0).argmax(), -1).astype(jnp.int32)


def anomaly_names(places: Sequence[Probe], params: Any) -> list[str]:
    """Returns what `first_anomaly` can find, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [
        *map(str, places),
        "the loss",
        *(f"the gradient of {place}" for place in reversed(places)),
        *(f"the gradient of the parameter {path}" for path in paths),
        *(f"the parameter {path} after the change" for path in paths),
    ]
