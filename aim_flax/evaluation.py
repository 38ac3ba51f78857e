"""Evaluation of a whole split, used alike in training and by eval.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from scipy.stats import binomtest

from aim_flax.data.in_memory import gather
from aim_flax.parallel import AXIS, Devices
from aim_flax.steps import eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network made of a split.

    Attributes:
      loss: mean cross-entropy.
      confusion: (classes, classes) int, examples of each true (row) and predicted class (column).
    """

    loss: float
    confusion: np.ndarray

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
        interval = binomtest(self.correct, self.count).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def build_evaluate(
    model: nn.Module,
    devices: Devices,
    split: tuple[Any, Any],
    batch_size: int,
    num_examples: int,
    num_classes: int,
    scale: float,
) -> Callable[[Any], Evaluation]:
    """Returns variables -> Evaluation of a split, a compiled call per batch.

    Args:
      split: images and labels as `devices.replicate` returns them.
      batch_size: over all devices; rounded up to a multiple of their number.

    The last batch is padded and masked. Raises RuntimeError if any example was not counted
    exactly once.
    """
    local = -(-batch_size // devices.count)
    batch_size = local * devices.count

    def on_device(sums, variables, split, start):
        indices = start + jax.lax.axis_index(AXIS) * local + jnp.arange(local)
        mask = indices < num_examples
        images, labels = gather(split, jnp.where(mask, indices, 0), scale)
        new = eval_step(model, variables, images, labels, mask, num_classes)
        return jax.tree.map(jnp.add, sums, jax.lax.psum(new, AXIS))

    # Not a loop within one program: XLA on CPU computes convolutions in loops several times slower.
    add_batch = devices.map(on_device, donate=(0,))
    starts = [devices.replicate(np.int32(i)) for i in range(0, num_examples, batch_size)]
    zero = {
        "loss": np.zeros((), np.float32),
        "confusion": np.zeros((num_classes, num_classes), np.int32),
        "count": np.zeros((), np.int32),
    }

    def evaluate(variables: Any) -> Evaluation:
        sums = devices.replicate(zero)
        for start in starts:
            sums = add_batch(sums, variables, split, start)
        sums = devices.fetch(sums)
        if not sums["count"] == sums["confusion"].sum() == num_examples:
            raise RuntimeError(f"{sums['count']} of {num_examples} examples were evaluated")
        return Evaluation(float(sums["loss"]) / num_examples, sums["confusion"])

    return evaluate


def memory_use(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, dict[str, Any]]:
    """Returns how much of each layer's output the memory makes up, on these images.

    Returns:
      {"read LAYER": {"share": ..., "own": ...}}, L2 norms per example of the memory's share and
      of the layer's own output, averaged over the batch; {"update BLOCK": ...} with the norms of
      the change and of the memory before it. A layer that is called several times is averaged.
      Empty for a plain network.
    """
    _, recorded = model.apply(variables, images, train=False, mutable=["intermediates"])
    kinds = {"memory_use": "read", "memory_update_use": "update"}
    uses = {}
    for path, calls in flatten_dict(recorded.get("intermediates", {})).items():
        if path[-1] in kinds:
            name = f"{kinds[path[-1]]} {'/'.join(path[:-1])}"
            uses[name] = jax.tree.map(lambda *norms: sum(norms) / len(norms), *calls)
    return uses
