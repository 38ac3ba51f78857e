"""How fast data comes, alone and in training: python -m aim_flax.cli.bench --config FILE[:ARM].

Prints how many images per second get ready for training while nothing else is computed, and how
many training takes, with the share of its time that it waits for data.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax import config as configs
from aim_flax.console import CommandParser, parse_with_overrides, run_reporting_errors
from aim_flax.errors import UsageError
from aim_flax.train.experiment import Experiment


def measure_data(experiment: Experiment, steps: int) -> float:
    """Returns the images per second of the training batches alone, augmented, on the devices."""
    batches = experiment.train_batches
    most = batches.steps_per_call or 50
    length = min(most, steps, experiment.epoch_steps)

    def on_device(data, seed, step):
        batch = batches.on_device(data, seed, step)

        def body(_, i):
            # Carried, so that each batch is written to memory, as for a training step.
            return batch(step + i), None

        (images, labels), _ = jax.lax.scan(body, batch(step), jnp.arange(1, length))
        return jax.lax.pmean(images.sum() + labels.sum(), "batch")

    call = experiment.devices.map(on_device, sharded=(0,) if batches.sharded else ())
    seed = experiment.devices.replicate(np.uint32(experiment.config.seed))

    def step(data: Any, start: int) -> None:
        jax.block_until_ready(call(data, seed, experiment.devices.replicate(np.int32(start))))

    return _measure(experiment, step, length, steps)[0]


def measure_training(experiment: Experiment, steps: int) -> tuple[float, float]:
    """Returns the images per second of training, and its share of time waiting for data."""
    length = min(experiment.steps_per_call, steps, experiment.epoch_steps)
    call = experiment.train_call(length)
    seed = experiment.devices.replicate(np.uint32(experiment.config.seed))
    state = experiment.devices.replicate(experiment.initial_state())

    def step(data: Any, start: int) -> None:
        nonlocal state
        state, metrics = call(state, data, seed)
        jax.block_until_ready(metrics)

    return _measure(experiment, step, length, steps)


def _measure(
    experiment: Experiment, call: Callable[[Any, int], None], length: int, steps: int
) -> tuple[float, float]:
    """Returns images per second and the share of waiting, after a first call that compiles."""
    # As in training, each call is within an epoch; the rest of the epoch is left out.
    in_epoch = range(0, experiment.epoch_steps - length + 1, length)
    calls = -(-steps // length)
    starts = [
        (i // len(in_epoch)) * experiment.epoch_steps + in_epoch[i % len(in_epoch)]
        for i in range(calls + 1)
    ]
    feed = experiment.train_batches.feed(experiment.config.seed, 0, starts[-1] + 1)
    waited = 0.0
    with contextlib.closing(feed):
        call(feed.at(starts[0]), starts[0])
        begun = time.perf_counter()
        for start in starts[1:]:
            before = time.perf_counter()
            data = feed.at(start)
            waited += time.perf_counter() - before
            call(data, start)
        seconds = time.perf_counter() - begun
    return calls * length * experiment.config.train.batch_size / seconds, waited / seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.bench",
        description=__doc__.partition(":")[0],
        epilog="Any key of the config is a flag: --config.data.threads=2",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARM]")
    parser.add_argument("--steps", type=int, default=200, help="to measure; default: 200")
    parser.add_argument("--devices", type=int, help="how many to use; default: all")
    parser.add_argument("--data-only", action="store_true", help="leave training out")
    args, assignments = parse_with_overrides(parser, argv)

    def work() -> None:
        if args.steps < 1:
            raise UsageError(f"--steps is {args.steps}, expected at least 1")
        config = configs.override(configs.load(args.config), assignments)
        experiment = Experiment(config, args.devices)
        streamed = experiment.train_batches.sharded
        kind = f"streamed by {config.data.threads} threads" if streamed else "in memory"
        shape = "x".join(map(str, config.data.image_shape))
        print(f"{config.data.name}, {shape}, batches of {config.train.batch_size}, {kind}")
        print(f"data alone: {measure_data(experiment, args.steps):,.0f} images/s")
        if not args.data_only:
            rate, waiting = measure_training(experiment, args.steps)
            print(f"training: {rate:,.0f} images/s, {waiting:.1%} of its time waiting for data")

    run_reporting_errors(work)


if __name__ == "__main__":
    main()
