"""The order in which training visits the examples."""

import jax


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches; each epoch leaves out other examples."""
    return num_examples // batch_size


def epoch_order(key: jax.Array, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """Returns the order, (num_examples,) int32, in which an epoch visits the training split."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
