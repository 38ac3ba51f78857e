"""Training on classes of uneven size: weights of their losses, or as many images of each."""

import jax
import jax.numpy as jnp
import numpy as np

BALANCES = ("none", "weights", "sampling")


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns what the losses of each class are multiplied by, (classes,) float32.

    The number of images over that of classes and that of the class's images, as scikit-learn's
    "balanced": every class weighs the same, and the mean weight of an image is 1. A class without
    images counts nowhere, and has 0.

    Args:
      labels: (N,) int.
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return np.where(counts, len(labels) / (present * np.maximum(counts, 1)), 0).astype(np.float32)


class BalancedOrder:
    """Orders of as many examples as there are, in which classes come equally often, up to one.

    The images of a class take turns: none comes again before all others of its class have come. Of
    a class that has more images than turns, others are left out each time.
    """

    def __init__(self, labels: np.ndarray):
        by_class = np.argsort(labels, kind="stable").astype(np.int32)
        sizes = np.unique(labels, return_counts=True)[1]
        self._count, turns = len(labels), -(-len(labels) // len(sizes))
        pool, rounds, starts = [], [], []
        entries = number = 0
        for images in np.split(by_class, np.cumsum(sizes)[:-1]):
            times = -(-turns // len(images))
            pool.append(np.tile(images, times))
            rounds.append(np.repeat(np.arange(number, number + times, dtype=np.int32), len(images)))
            starts.append(entries)
            entries, number = entries + times * len(images), number + times
        # Sorting by round, and at random within it, gives each class's order in a block of its own.
        self._pool, self._rounds = np.concatenate(pool), np.concatenate(rounds)
        first = np.arange(turns - 1, dtype=np.int32)
        self._sure = (np.array(starts, np.int32)[:, None] + first).ravel()
        self._last = np.array(starts, np.int32) + (turns - 1)

    def __call__(self, key: jax.Array) -> jax.Array:
        """Returns the order of a key, (N,) int32."""
        within, last, whole = jax.random.split(key, 3)
        draws = jax.random.bits(within, self._pool.shape)
        _, _, ordered = jax.lax.sort((self._rounds, draws, self._pool), num_keys=2)
        # Not all classes have a last turn, if they can't share the examples equally.
        chosen = jax.random.permutation(last, ordered[self._last])[: self._count - len(self._sure)]
        return jax.random.permutation(whole, jnp.concatenate([ordered[self._sure], chosen]))
