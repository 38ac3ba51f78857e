"""In what dtype many numbers are summed."""

import jax.numpy as jnp


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns a floating dtype, or float32 in place of a shorter one."""
    # Not jnp.promote_types, which strict promotion refuses.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
