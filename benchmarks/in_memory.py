"""Data in memory, against a pipeline of records: python benchmarks/in_memory.py.

50,000 images of 32x32x3, shifted by at most 4 pixels, flipped and divided by 255; no training.
Rounds alternate between the ways. Ours are computed within one compiled call of 50 steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from aim_flax.data.in_memory import InMemory, Split
from aim_flax.data.scaling import Scaling
from aim_flax.devices import Devices
from aim_flax.files import write_csv

EXAMPLES, SHAPE, SHIFT, STEPS = 50_000, (32, 32, 3), 4, 50


def compiled(split: Split, batch_size: int) -> Callable[[int], None]:
    """Returns a function of n: computes n batches by `TrainBatches`, in calls of 50 steps."""
    devices = Devices("pmap", 1)
    augmentation = {"shift": SHIFT, "flip_horizontal": True}
    data = InMemory((), {"train": split})
    batches = data.train_batches(devices, batch_size, Scaling(255.0), augmentation)

    def on_device(data, seed, step):
        batch = batches.on_device(data, seed, step)

        def body(_, i):
            # Carried, so that each batch is written to memory, as a training step finds it.
            return batch(step + i), None

        return jax.lax.scan(body, batch(step), jnp.arange(1, STEPS))[0]

    call = devices.map(on_device)
    feed = batches.feed(0, 0, STEPS)
    seed = devices.replicate(np.uint32(0))

    def measure(steps: int) -> None:
        for start in range(0, steps, STEPS):
            step = devices.replicate(np.int32(start))
            jax.block_until_ready(call(feed.at(start), seed, step))

    return measure


def per_record(split: Split, batch_size: int, threads: int) -> Callable[[int], None]:
    """Returns the same for a Grain pipeline with NumPy functions of one record."""

    def change(record: tuple[np.ndarray, np.int32], rng: np.random.Generator):
        image, label = record
        padded = np.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="symmetric")
        top, left = rng.integers(0, 2 * SHIFT, 2, endpoint=True)
        image = padded[top : top + SHAPE[0], left : left + SHAPE[1]]
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return image.astype(np.float32) / 255.0, label

    records = list(zip(split.images, split.labels, strict=True))
    changed = grain.MapDataset.source(records).seed(0).shuffle().repeat().random_map(change)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
    pipeline = changed.batch(batch_size).to_iter_dataset(options)

    def measure(steps: int) -> None:
        iterator = iter(pipeline)
        for _ in range(steps):
            jax.block_until_ready(jax.device_put(next(iterator)))
        # Or its threads would work on in the other ways' turns.
        iterator.close()

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch_sizes", default="128,512")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, *SHAPE), np.uint8)
    split = Split(images, rng.integers(0, 10, EXAMPLES).astype(np.int32))
    rows = []
    for batch_size in map(int, args.batch_sizes.split(",")):
        # Ours, then Grain in the calling thread, as its manual advises for memory, and in two.
        ways = {"compiled": (compiled(split, batch_size), 4 * STEPS)}
        for threads in (0, 2):
            steps = max(1, 6400 // batch_size)
            ways[f"grain, {threads} threads"] = per_record(split, batch_size, threads), steps
        rows += compare(ways, batch_size, args.rounds)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.csv:
        write_csv(args.csv, list(rows[0]), rows)


def compare(
    ways: dict[str, tuple[Callable[[int], None], int]], batch_size: int, rounds: int
) -> list[dict]:
    """Returns a row for each way, of the medians of rounds that take a turn of each."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (measure, steps) in ways.items():
            wall, used = time.perf_counter(), time.process_time()
            measure(steps)
            if turn:  # The first one compiles.
                images = steps * batch_size
                rates[name].append(images / (time.perf_counter() - wall))
                cpu[name].append((time.process_time() - used) / images * 1e6)
    first = statistics.median(next(iter(rates.values())))
    return [
        {
            "way": name,
            "batch_size": batch_size,
            "images_per_second": round(statistics.median(rates[name])),
            "lowest": round(min(rates[name])),
            "highest": round(max(rates[name])),
            "cpu_microseconds_per_image": f"{statistics.median(cpu[name]):.2f}",
            "ratio": f"{first / statistics.median(rates[name]):.2f}",
        }
        for name in ways
    ]


if __name__ == "__main__":
    main()
