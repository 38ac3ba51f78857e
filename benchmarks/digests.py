"""What the digests of checkpoints cost: python benchmarks/digests.py.

The time in which the digests of a checkpoint are computed, in the background, against what is
trained between two checkpoints: a whole run of digits, which has one at its end, and ten minutes
of any run (`train.checkpoint_minutes`) for the published ResNet50. Writing the same checkpoint,
digests included, is timed beside it. Rounds alternate.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aim_flax import config as configs
from aim_flax.models.build import build_model
from aim_flax.train import loop
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.digest import digests
from aim_flax.train.experiment import abstract_state
from aim_flax.train.step import TrainState, variables_of

ROUNDS = 5
RESNET = "stanford_dogs_resnet50:published"


def random_state(name: str, *changes: str) -> TrainState:
    """Returns a training state of a config, of random numbers: zeros would be written faster."""
    config = configs.override(configs.load(name), changes)
    rng = np.random.default_rng(0)

    def leaf(like: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.asarray(rng.standard_normal(like.shape)).astype(like.dtype)

    return jax.tree.map(leaf, abstract_state(config, build_model(config)))


def seconds(work: Callable[[], Any]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def measure(state: TrainState) -> tuple[float, float, float]:
    """Returns the MB of a checkpoint, and the seconds of its digests and of writing it."""
    items = {"state": state, "best": variables_of(state)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) / 1e6

    def write() -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(Checkpoints(Path(folder) / "c")) as checkpoints,
        ):
            checkpoints.save(1, {"best_step": None}, **items)

    hashing, writing = [], []
    for _ in range(ROUNDS):
        hashing.append(seconds(lambda: digests(items)))
        writing.append(seconds(write))
    return size, statistics.median(hashing), statistics.median(writing)


def main() -> None:
    digits = configs.load("digits_mlp")
    with tempfile.TemporaryDirectory() as folder:
        trained = loop.run(digits, Path(folder) / "run", 1, quiet=True)["train_seconds"]
    for what, state, between in (
        ("digits_mlp, a whole run", random_state("digits_mlp"), trained),
        (f"{RESNET}, ten minutes", random_state(RESNET, "model.num_classes=120"), 600.0),
    ):
        size, hashing, writing = measure(state)
        print(
            f"{what} ({between:.1f} s): checkpoint of {size:,.1f} MB, digests {hashing:.4f} s"
            f" = {hashing / between:.3%}; written in {writing:.3f} s"
        )


if __name__ == "__main__":
    main()
