"""Checks that the backend computes correctly, for one release of jaxlib does not."""

import jax
import jax.numpy as jnp


def computes_correctly() -> bool:
    """Returns whether a vmapped product followed by a reduction is right under jit.

    jaxlib 0.10.2 gets it wrong on CPU without a word (github.com/jax-ml/jax/issues/39103).
    """
    n = 32_769
    i = jnp.arange(n, dtype=jnp.float32)
    rows = jnp.stack([i, jnp.zeros_like(i), jnp.zeros_like(i)], axis=1)
    identity = jnp.eye(3)
    sums = jax.jit(jax.vmap(lambda row: jnp.square(identity @ row).sum()))(rows)
    return float(sums[-1]) == float((n - 1) ** 2)


def warning() -> str | None:
    """Returns a line that warns of a CPU backend with wrong results, or None."""
    if jax.default_backend() != "cpu" or computes_correctly():
        return None
    return (
        f"warning: jaxlib {jax.lib.__version__} computes wrong results on this CPU"
        " (github.com/jax-ml/jax/issues/39103): install the versions of constraints.txt, or set"
        " XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce"
    )
