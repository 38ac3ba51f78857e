"""Evaluation of a whole split, in training and in eval.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from aim_flax.data.dataset import EvalBatches
from aim_flax.devices import AXIS, Devices


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A network's results on a split.

    Attributes:
      loss: mean cross-entropy.
      confusion: (classes, classes) int, examples of each true (row) and predicted class (column).
      is_correct: (images,) bool, in the split's order, whether an image's class was predicted;
        False for images that were left out.
      skipped: number of images that can't be read and were left out.
    """

    loss: float
    confusion: np.ndarray
    is_correct: np.ndarray
    skipped: int = 0

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    def accuracy_interval(self) -> tuple[float, float]:
        """Returns the 95 % Wilson score interval of the accuracy."""
        # Imported here because it takes a second, which whoever only predicts doesn't need.
        from scipy.stats import binomtest

        interval = binomtest(self.correct, self.count).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def build_evaluate(
    model: nn.Module,
    devices: Devices,
    batches: EvalBatches,
    num_classes: int,
    together: bool = False,
) -> Callable[[Any], Any]:
    """Returns variables -> Evaluation of all batches of a split, a compiled call per batch.

    Args:
      model: `model.apply(variables, images, train=False)` gives logits; of a Linen module or
        `interventions.Choosable`.
      together: whether variables have a leading axis, of networks that are evaluated at once; then
        there is a list with an Evaluation of each.

    The evaluation raises RuntimeError if any example was neither counted once nor left out.
    """

    def on_device(sums, variables, data):
        images, labels, counted, left_out = batches.on_device(data)
        logits = model.apply(variables, images, train=False)
        new, is_correct = _score(logits, labels, counted, num_classes)
        new["skipped"] = left_out.sum(dtype=jnp.int32)
        sums = jax.tree.map(jnp.add, sums, jax.lax.psum(new, AXIS))
        # Each device has consecutive rows, so this is the order of the batch.
        return sums, jax.lax.all_gather(is_correct, AXIS, tiled=True)

    # Not a loop within one program: XLA on CPU computes convolutions in loops several times slower.
    sharded = (2,) if batches.sharded else ()
    one = jax.vmap(on_device, in_axes=(0, 0, None)) if together else on_device
    add_batch = devices.map(one, donate=(0,), sharded=sharded)

    def evaluate(variables: Any) -> Evaluation | list[Evaluation]:
        axes = jax.tree.leaves(devices.local(variables))[0].shape[:1] if together else ()
        sums, is_correct = devices.replicate(_zero(axes, num_classes)), []
        for data in batches:
            sums, of_batch = add_batch(sums, variables, data)
            is_correct.append(of_batch)
        sums, is_correct = devices.fetch((sums, is_correct))
        is_correct = np.concatenate(is_correct, axis=-1)[..., : batches.examples]
        if not together:
            return _evaluation(sums, is_correct)
        each = [jax.tree.map(lambda sum_of, i=i: sum_of[i], sums) for i in range(len(is_correct))]
        return [_evaluation(*of_one) for of_one in zip(each, is_correct, strict=True)]

    return evaluate


def _zero(axes: tuple[int, ...], num_classes: int) -> dict[str, np.ndarray]:
    """Returns the sums of `_score` and of left-out images before any batch, with leading axes."""
    return {
        "loss": np.zeros(axes, np.float32),
        "confusion": np.zeros((*axes, num_classes, num_classes), np.int32),
        "skipped": np.zeros(axes, np.int32),
    }


def _evaluation(sums: dict[str, np.ndarray], is_correct: np.ndarray) -> Evaluation:
    """Returns the Evaluation of one network, after a check that each image was counted once."""
    skipped, examples = int(sums["skipped"]), len(is_correct)
    count = int(sums["confusion"].sum())
    if count + skipped != examples:
        raise RuntimeError(f"{count} of {examples} examples were evaluated")
    return Evaluation(float(sums["loss"]) / count, sums["confusion"], is_correct, skipped)


def _score(
    logits: jax.Array, labels: jax.Array, counted: jax.Array, num_classes: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns sums over the examples of a batch that count, and which were predicted correctly.

    Args:
      logits: (B, num_classes) float32.
      labels: (B,) int32.
      counted: (B,) bool, False for padding.

    Returns:
      loss: () float32, summed cross-entropy; confusion: (classes, classes) int32.
      (B,) bool, False for padding.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = logits.argmax(-1)
    confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
    sums = {
        "loss": jnp.where(counted, losses, 0.0).sum(),
        "confusion": confusion.at[labels, predicted].add(counted.astype(jnp.int32)),
    }
    return sums, (predicted == labels) & counted
