"""Gradients that XLA on CPU computes once.

It fuses what is cheap into each of its users, so an array that three of them need is computed three
times. A batch norm needs the change of its output in three places, and behind a depthwise
convolution that change is a sum over the kernel's taps, all of which XLA takes for cheap. A
division is not cheap to it.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
    """Returns x, floats of any shape, whose gradient is kept in memory on CPU.

    It can be differentiated in reverse only.
    """
    return x


def _forward(x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _backward(_: None, change: jax.Array) -> tuple[jax.Array]:
    def kept(change: jax.Array) -> jax.Array:
        # By ones that XLA does not know: what it knows to be one number it would multiply by.
        one = jnp.ones((), change.dtype)
        return change / jax.lax.clamp(one, change, one)

    return (jax.lax.platform_dependent(change, default=lambda change: change, cpu=kept),)


gradient_once.defvjp(_forward, _backward)
