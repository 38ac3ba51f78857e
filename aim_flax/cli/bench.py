"""How fast data comes, alone and in training: python -m aim_flax.cli.bench --config FILE[:ARM].

Prints how many images per second get ready for training while nothing else is computed, and how
many training takes, with the share of its time that it waits for data.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aim_flax import allocator, compile_cache
from aim_flax import config as configs
from aim_flax.console import CommandParser, as_command, parse_with_overrides
from aim_flax.errors import UsageError
from aim_flax.train.experiment import Experiment


def data_call(experiment: Experiment, length: int) -> Callable[[Any, int], Any]:
    """Returns (data, step) -> a number that depends on the batches of `length` steps, augmented."""
    batches, devices = experiment.train_batches, experiment.devices

    def on_device(data, seed, step):
        batch = batches.on_device(data, seed, step)

        def body(_, i):
            # Carried, so that each batch is written to memory, as for a training step.
            return batch(step + i), None

        (images, labels), _ = jax.lax.scan(body, batch(step), jnp.arange(1, length))
        return jax.lax.pmean(images.sum() + labels.sum(), "batch")

    call = devices.map(on_device, sharded=(0,) if batches.sharded else ())
    seed = devices.replicate(np.uint32(experiment.config.seed))
    return lambda data, step: call(data, seed, devices.replicate(np.int32(step)))


def training_call(experiment: Experiment, length: int) -> Callable[[Any, int], Any]:
    """Returns (data, step) -> metrics, a function that trains for `length` steps."""
    call = experiment.train_call(length)
    seed = experiment.devices.replicate(np.uint32(experiment.config.seed))
    state = experiment.devices.replicate(experiment.initial_state())

    def train(data: Any, step: int) -> Any:
        nonlocal state
        state, metrics = call(state, data, seed)
        return metrics

    return train


def measure(
    experiment: Experiment, make: Callable[[Experiment, int], Callable], most: int, steps: int
) -> tuple[float, float]:
    """Returns images per second and the share of waiting for data, after a call that compiles.

    A call that `make` returns does at most `most` of the steps.
    """
    length = min(most, steps, experiment.epoch_steps)
    call = make(experiment, length)
    # As in training, each call is within an epoch; the rest of the epoch is left out.
    in_epoch = range(0, experiment.epoch_steps - length + 1, length)
    epochs = itertools.count(0, experiment.epoch_steps)
    all_starts = (epoch + step for epoch in epochs for step in in_epoch)
    calls, waited = -(-steps // length), 0.0
    starts = list(itertools.islice(all_starts, calls + 1))
    feed = experiment.train_batches.feed(experiment.config.seed, 0, starts[-1] + 1)
    with contextlib.closing(feed):
        jax.block_until_ready(call(feed.at(starts[0]), starts[0]))
        begun = time.perf_counter()
        for start in starts[1:]:
            before = time.perf_counter()
            data = feed.at(start)
            waited += time.perf_counter() - before
            jax.block_until_ready(call(data, start))
        seconds = time.perf_counter() - begun
    return calls * length * experiment.config.train.batch_size / seconds, waited / seconds


@as_command()
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
    if args.steps < 1:
        raise UsageError(f"--steps is {args.steps}, expected at least 1")
    config = configs.override(configs.load(args.config), assignments)
    allocator.keep_memory()
    compile_cache.enable()
    experiment = Experiment(config, args.devices)
    batches = experiment.train_batches
    kind = f"streamed by {config.data.threads} threads" if batches.sharded else "in memory"
    shape = "x".join(map(str, config.data.image_shape))
    print(f"{config.data.name}, {shape}, batches of {config.train.batch_size}, {kind}")
    rate, _ = measure(experiment, data_call, batches.steps_per_call or 50, args.steps)
    print(f"data alone: {rate:,.0f} images/s")
    if not args.data_only:
        rate, waiting = measure(experiment, training_call, experiment.steps_per_call, args.steps)
        print(f"training: {rate:,.0f} images/s, {waiting:.1%} of its time waiting for data")


if __name__ == "__main__":
    main()
