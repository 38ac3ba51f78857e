"""The keys of a run's random draws: each is folded from the run's seed and the step."""

import jax

# What keys are folded from the run's seed for.
_INIT, _DATA, _DROPOUT, _AUGMENT, _MEMORY = range(5)


def data_key(seed: jax.Array | int) -> jax.Array:
    """Returns the key that the order of examples in each epoch is folded from."""
    return jax.random.fold_in(jax.random.key(seed), _DATA)


def augment_key(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """Returns the key of a step's augmentation."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _AUGMENT), step)
