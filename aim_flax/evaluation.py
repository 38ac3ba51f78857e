"""Evaluation of a whole split, used alike in training and by eval.py."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from scipy.stats import binomtest

from aim_flax.parallel import AXIS, Devices
from aim_flax.steps import eval_step

if TYPE_CHECKING:
    from aim_flax.data import in_memory, streamed


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network made of a split.

    Attributes:
      loss: mean cross-entropy.
      confusion: (classes, classes) int, examples of each true (row) and predicted class (column).
      skipped: number of images that can't be read and were left out.
    """

    loss: float
    confusion: np.ndarray
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
        interval = binomtest(self.correct, self.count).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def build_evaluate(
    model: nn.Module,
    devices: Devices,
    batches: "in_memory.EvalBatches | streamed.EvalBatches",
    num_classes: int,
) -> Callable[[Any], Evaluation]:
    """Returns variables -> Evaluation of all batches of a split, a compiled call per batch.

    The evaluation raises RuntimeError if any example was neither counted once nor left out.
    """

    def on_device(sums, variables, data):
        images, labels, counted, left_out = batches.on_device(data)
        new = eval_step(model, variables, images, labels, counted, num_classes)
        new["skipped"] = left_out.sum(dtype=jnp.int32)
        return jax.tree.map(jnp.add, sums, jax.lax.psum(new, AXIS))

    # Not a loop within one program: XLA on CPU computes convolutions in loops several times slower.
    sharded = (2,) if batches.sharded else ()
    add_batch = devices.map(on_device, donate=(0,), sharded=sharded)
    zero = {
        "loss": np.zeros((), np.float32),
        "confusion": np.zeros((num_classes, num_classes), np.int32),
        "count": np.zeros((), np.int32),
        "skipped": np.zeros((), np.int32),
    }

    def evaluate(variables: Any) -> Evaluation:
        sums = devices.replicate(zero)
        for data in batches:
            sums = add_batch(sums, variables, data)
        sums = devices.fetch(sums)
        count, skipped = int(sums["count"]), int(sums["skipped"])
        if not (count == sums["confusion"].sum() and count + skipped == batches.examples):
            raise RuntimeError(f"{count} of {batches.examples} examples were evaluated")
        return Evaluation(float(sums["loss"]) / count, sums["confusion"], skipped)

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
