"""Evaluation of a whole split, in training and in eval.py."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from aim_flax.data.dataset import EvalBatches
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import NotFiniteError

# 95 % of a normal distribution lie within so many standard deviations of its mean.
_NORMAL_95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network's results on a split.

    Attributes:
      loss: mean cross-entropy.
      confusion: (classes, classes) int, examples of each true (row) and predicted class (column).
      is_correct: (images,) bool, in the split's order, whether an image's class was predicted;
        False for images that were left out.
      skipped: number of images that can't be read and were left out.
      labels: (images,) int32, the true classes; of images that were left out, any.
      predicted: (images,) int32, the predicted class; -1 for images that were left out.
      probability: (images,) float32, what the network gave that class.
    """

    loss: float
    confusion: np.ndarray
    is_correct: np.ndarray
    skipped: int = 0
    labels: np.ndarray | None = None
    predicted: np.ndarray | None = None
    probability: np.ndarray | None = None

    def check_finite(self, what: str) -> None:
        """Raises NotFiniteError unless the loss is a number; `what` was evaluated, for the
        message."""
        if not math.isfinite(self.loss):
            raise NotFiniteError(
                f"the loss of {what} is {self.loss}, so its accuracy, {self.accuracy:.2%}, is no"
                " result: its weights, or the images, hold numbers that are not finite or too large"
            )

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def balanced_accuracy(self) -> float:
        """The mean share of a class that was predicted correctly, over the classes that have
        images, as scikit-learn's `balanced_accuracy_score`."""
        of_class = self.confusion.sum(axis=1)
        there = of_class > 0
        return float((np.diag(self.confusion)[there] / of_class[there]).mean())

    @property
    def macro_f1(self) -> float:
        """The mean F1 score of the classes that have images or were predicted, as scikit-learn's
        `f1_score(average="macro")`."""
        total = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        there = total > 0
        return float((2 * np.diag(self.confusion)[there] / total[there]).mean())

    def accuracy_interval(self) -> tuple[float, float]:
        """Returns the 95 % Wilson score interval of the accuracy (E. B. Wilson, "Probable
        Inference", Journal of the American Statistical Association 22, 1927)."""
        # Bit for bit what scipy.stats.binomtest computes, which takes half a second to import.
        n, p, z = self.count, self.accuracy, _NORMAL_95
        whole = 2 * (n + z**2)
        centre = (2 * n * p + z**2) / whole
        half = z / whole * math.sqrt(4 * n * p * (1 - p) + z**2)
        return centre - half if p > 0 else 0.0, centre + half if p < 1 else 1.0


def build_evaluate(
    model: nn.Module,
    devices: Devices,
    batches: EvalBatches,
    num_classes: int,
    together: bool = False,
) -> Callable[[Any, Any], Any]:
    """Returns (variables, seed) -> Evaluation of all batches of a split, a compiled call per batch.

    The seed is that of the run, for what is drawn at random (`EvalBatches.roll`).

    Args:
      model: `model.apply(variables, images, train=False)` gives logits; of a Linen module or
        `interventions.Choosable`.
      together: whether variables have a leading axis, of networks that are evaluated at once; then
        there is a seed for each, and a list with an Evaluation of each.

    The evaluation raises RuntimeError if any example was neither counted once nor left out.
    """

    def on_device(sums, variables, data, seed):
        images, labels, counted, left_out = batches.on_device(data, seed)
        logits = model.apply(variables, images, train=False)
        new, of_images = _score(logits, labels, counted, num_classes)
        new["skipped"] = left_out.sum(dtype=jnp.int32)
        sums = jax.tree.map(jnp.add, sums, jax.lax.psum(new, AXIS))
        # Each device has consecutive rows, so this is the order of the batch.
        return sums, jax.lax.all_gather(of_images, AXIS, tiled=True)

    # Not a loop within one program: XLA on CPU computes convolutions in loops several times slower.
    sharded = (2,) if batches.sharded else ()
    one = jax.vmap(on_device, in_axes=(0, 0, None, 0)) if together else on_device
    add_batch = devices.map(one, donate=(0,), sharded=sharded)

    def evaluate(variables: Any, seed: int | np.ndarray) -> Evaluation | list[Evaluation]:
        seed = devices.replicate(np.asarray(seed, np.uint32))
        axes = devices.fetch(jax.tree.leaves(variables)[0]).shape[:1] if together else ()
        sums, of_images = devices.replicate(_zero(axes, num_classes)), []
        for data in batches:
            sums, of_batch = add_batch(sums, variables, data, seed)
            of_images.append(of_batch)
        sums, of_images = devices.fetch((sums, of_images))
        of_images = {
            name: np.concatenate([of_batch[name] for of_batch in of_images], axis=-1)
            for name in of_images[0]
        }
        found = sums, {name: rows[..., : batches.examples] for name, rows in of_images.items()}
        if not together:
            return _evaluation(*found)
        return [_evaluation(*jax.tree.map(lambda x, i=i: x[i], found)) for i in range(axes[0])]

    return evaluate


def _zero(axes: tuple[int, ...], num_classes: int) -> dict[str, np.ndarray]:
    """Returns the sums of `_score` and of left-out images before any batch, with leading axes."""
    return {
        "loss": np.zeros(axes, np.float32),
        "confusion": np.zeros((*axes, num_classes, num_classes), np.int32),
        "skipped": np.zeros(axes, np.int32),
    }


def _evaluation(sums: dict[str, np.ndarray], of_images: dict[str, np.ndarray]) -> Evaluation:
    """Returns the Evaluation of one network, after a check that each image was counted once."""
    skipped, examples = int(sums["skipped"]), len(of_images["is_correct"])
    count = int(sums["confusion"].sum())
    if count + skipped != examples:
        raise RuntimeError(f"{count} of {examples} examples were evaluated")
    loss = float(sums["loss"]) / count
    return Evaluation(loss, sums["confusion"], skipped=skipped, **of_images)


def _score(
    logits: jax.Array, labels: jax.Array, counted: jax.Array, num_classes: int
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns sums over the examples of a batch that count, and what was predicted for each.

    Args:
      logits: (B, num_classes) float32.
      labels: (B,) int32.
      counted: (B,) bool, False for padding.

    Returns:
      loss: () float32, summed cross-entropy; confusion: (classes, classes) int32.
      is_correct, labels, predicted, probability: (B,) each, see `Evaluation`.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = logits.argmax(-1)
    confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
    sums = {
        "loss": jnp.where(counted, losses, 0.0).sum(),
        "confusion": confusion.at[labels, predicted].add(counted.astype(jnp.int32)),
    }
    of_images = {
        "is_correct": (predicted == labels) & counted,
        "labels": labels.astype(jnp.int32),
        "predicted": jnp.where(counted, predicted, -1).astype(jnp.int32),
        "probability": jax.nn.softmax(logits).max(-1).astype(jnp.float32),
    }
    return sums, of_images
