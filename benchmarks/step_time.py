"""Time and memory of a training step, variants side by side in one process.

    python benchmarks/step_time.py --arms published,control,control_stride1 \\
        --set data.image_shape=(112,112,3) --set train.batch_size=4 \\
        --vary model.pointwise=einsum,conv --csv results/step_time.csv

Each round takes one step of every variant in turn, so that whatever else the machine does meets
them alike; ratios are to the first variant. `first_seconds` is what the first step took: tracing,
compiling, or loading from the folder of JAX_COMPILATION_CACHE_DIR, and computing. With --largest
the batch is doubled, each variant by itself, until it no longer fits the accelerator's memory.
"""

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from aim_flax import allocator, build_model
from aim_flax import config as configs
from aim_flax.console import reporting_errors
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import UsageError
from aim_flax.files import write_csv
from aim_flax.train.optimizer import build_optimizer
from aim_flax.train.remat import check_remat
from aim_flax.train.step import create_state, train_step

COLUMNS = ("variant", "batch_size", "seconds", "images_per_second", "ratio", "mebibytes", "device")
COLUMNS += ("first_seconds",)


class Variant:
    """A compiled training step on random images, and its timings.

    Attributes:
      bytes: of each device that the program asks for.
    """

    def __init__(self, name: str, config: configs.ConfigDict, count: int = 1):
        """Compiles a step for the first `count` devices, which share the batch as in training."""
        if config.model.num_classes is None:
            raise UsageError(
                f"{config.name} leaves the number of classes to its images, and here are none:"
                " --set model.num_classes=N says how many"
            )
        self.name, self.config = name, config
        self.batch_size = config.train.batch_size
        if self.batch_size % count:
            raise UsageError(f"{count} devices can't share a batch of {self.batch_size}")
        start = time.perf_counter()
        devices = Devices("shard_map", count)
        model = build_model(config, axis_name=AXIS)
        optimizer = build_optimizer(config, optax.constant_schedule(1e-3))
        image_shape = tuple(config.data.image_shape)
        train = config.train
        check_remat(model, image_shape, train.remat)

        def step(state, images, labels):
            return train_step(
                model,
                optimizer,
                state,
                images,
                labels,
                seed=0,
                axis_name=AXIS,
                freeze=train.freeze,
                remat=train.remat,
                accumulate=train.accumulate,
                unroll=jax.default_backend() == "cpu",
                ema_decay=train.ema_decay,
            )

        # The values of the weights make no difference, and drawing them takes long to compile.
        alone, averaged = build_model(config), train.ema_decay is not None
        shapes = jax.eval_shape(lambda: create_state(alone, optimizer, 0, image_shape, averaged))
        values = jax.tree.map(lambda leaf: np.full(leaf.shape, 1e-2, leaf.dtype), shapes)
        self.state = devices.replicate(values)
        rng = np.random.default_rng(0)
        images = rng.uniform(0, 255, (self.batch_size, *image_shape)).astype(np.float32)
        labels = rng.integers(0, config.model.num_classes, self.batch_size).astype(np.int32)
        self.batch = devices.shard((images, labels))
        mapped = devices.map(step, donate=(0,), sharded=(1, 2))
        self.step = mapped.lower(self.state, *self.batch).compile()
        memory = self.step.memory_analysis()
        self.bytes = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        self.seconds: list[float] = []
        self._run()
        self.first_seconds = time.perf_counter() - start

    def _run(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, *self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def measure(self) -> None:
        self.seconds.append(self._run())

    def row(self, first: "Variant") -> dict:
        seconds = statistics.median(self.seconds)
        per_image = seconds / self.batch_size
        reference = statistics.median(first.seconds) / first.batch_size
        return {
            "variant": self.name,
            "batch_size": self.batch_size,
            "seconds": f"{seconds:.4f}",
            "images_per_second": f"{1 / per_image:.2f}",
            "ratio": f"{per_image / reference:.3f}",
            "mebibytes": round(self.bytes / 2**20),
            "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
            "first_seconds": f"{self.first_seconds:.1f}",
        }


def add_variants(parser: argparse.ArgumentParser, arms: str) -> None:
    """Adds the options that say which networks, for `variants`; the default of --arms is given."""
    parser.add_argument("--config", default="configs/stanford_dogs_resnet50.py")
    parser.add_argument("--arms", default=arms)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE")


def variants(args: argparse.Namespace) -> dict[str, configs.ConfigDict]:
    """Returns the configs of all arms with all combinations of the varied keys, by name."""
    combinations: list[list[str]] = [[]]
    for assignment in args.vary:
        key, _, values = assignment.partition("=")
        combinations = [[*c, f"{key}={v}"] for c in combinations for v in split(values)]
    found = {}
    for arm in args.arms.split(","):
        for combination in combinations:
            config = configs.load(f"{args.config}:{arm}")
            pairs = (c.partition("=") for c in combination)
            named = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs]
            name = " ".join([arm, *named])
            found[name] = configs.override(config, [*args.set, *combination])
    return found


def split(values: str) -> list[str]:
    """Returns values that commas part, (2,2,64) among them."""
    return re.split(r",(?![^()]*\))", values)


def largest(name: str, config: configs.ConfigDict, rounds: int) -> Variant:
    """Returns the variant with the largest power of two as batch size that fits."""
    fits, size = None, 16
    while True:
        try:
            variant = Variant(name, configs.override(config, [f"train.batch_size={size}"]))
            for _ in range(rounds):
                variant.measure()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if fits is None:
                raise UsageError(f"{name}: not even a batch of {size} fits") from None
            return fits
        # Only its timings are needed from here on: free what it holds on the device.
        variant.state = variant.batch = variant.step = None
        fits, size = variant, 2 * size


@reporting_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_variants(parser, arms="published,control,control_stride1")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--largest", action="store_true", help="the largest batch that fits")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    if args.largest and jax.default_backend() == "cpu":
        raise UsageError("--largest needs an accelerator: a CPU would start to swap")
    allocator.keep_memory()  # as commands do
    chosen = variants(args)
    if args.largest:
        measured = [largest(name, config, args.rounds) for name, config in chosen.items()]
    else:
        measured = [Variant(name, config) for name, config in chosen.items()]
        for _ in range(args.rounds):
            for variant in measured:
                variant.measure()
    rows = [variant.row(measured[0]) for variant in measured]
    for row in rows:
        print("  ".join(f"{key} {row[key]}" for key in COLUMNS))
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
