"""The keys of a run's random draws: each is folded from the run's seed and the step alone."""

import jax

# What keys are folded from the run's seed for; changing a number changes every result.
_INIT, _DATA, _DROPOUT, _AUGMENT, _MEMORY, _ROLL = range(6)

Seed = jax.Array | int


def init_key(seed: Seed) -> jax.Array:
    """Returns the key of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), _INIT)


def data_key(seed: Seed) -> jax.Array:
    """Returns the key that the order of examples in each epoch is folded from."""
    return jax.random.fold_in(jax.random.key(seed), _DATA)


def augment_key(seed: Seed, step: jax.Array | int) -> jax.Array:
    """Returns the key of a step's augmentation."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _AUGMENT), step)


def roll_key(seed: Seed) -> jax.Array:
    """Returns the key that the offset of each image in evaluation is folded from."""
    return jax.random.fold_in(jax.random.key(seed), _ROLL)


def dropout_key(seed: Seed, step: jax.Array | int, axis_name: str | None = None) -> jax.Array:
    """Returns the key of a step's dropout, another one on each device of the axis."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT), step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def memory_key(seed: Seed, step: jax.Array | int) -> jax.Array:
    """Returns the key of a step's memory noise, the same on all devices: they share a memory."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _MEMORY), step)
