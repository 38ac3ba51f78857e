"""Layers of aim_flax/layers/ against Flax's and JAX's own: python benchmarks/layers.py.

Each is computed forward and backward, in float32, at sizes of ResNet50 and its memory's update
blocks (112 px, batch 4), of the small ResNet and its (32 px, width 8, batch 32), and of the last
stages of networks for images of 32 px. The two ways take turns within one process. Numbers are
medians; ratios are those of each turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax import allocator
from aim_flax.console import reporting_errors
from aim_flax.files import write_csv
from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.convolution import convolution
from aim_flax.layers.depthwise import depthwise_taps
from aim_flax.layers.pointwise import pointwise_product
from aim_flax.layers.pooling import max_pool

COLUMNS = ("layer", "map", "milliseconds", "plain_milliseconds", "ratio", "ratio_low", "ratio_high")
COLUMNS += ("device",)


def batch_norm_and_relu(kind: Any, x: jax.Array) -> jax.Array:
    scale = jnp.ones(x.shape[-1:])
    variables = {"params": {"scale": scale, "bias": scale}}
    norm = kind(use_running_average=False, epsilon=1e-3)
    statistics = {"mean": scale, "var": scale}
    y, _ = norm.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])
    return nn.relu(y)


def convolve(function: Any, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return function(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


def layers() -> Iterator[tuple[str, Callable[..., jax.Array], Any, Any, tuple]]:
    """Yields names, functions of a way and arrays, our way, the plain one, and shapes of arrays."""
    plain = jax.lax.conv_general_dilated
    for size, channels in ((56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)):
        shape = (4, size, size, channels)
        yield "batch norm and relu", batch_norm_and_relu, BatchNorm, nn.BatchNorm, (shape,)
    for size, inputs, features in ((56, 64, 256), (28, 512, 128), (14, 256, 1024), (7, 2048, 512)):
        shapes = ((4, size, size, inputs), (1, 1, inputs, features))
        yield f"1x1 convolution to {features}", convolve, pointwise_product, plain, shapes
    for size, width in ((56, 64), (28, 128), (14, 256), (7, 512)):
        shapes = ((4, size, size, width), (3, 3, width, width))
        yield f"3x3 convolution to {width}", convolve, convolution, plain, shapes
    for size, width in ((56, 256), (28, 512), (14, 1024)):
        shapes = ((4, size, size, width), (3, 3, width, 16))
        yield "3x3 convolution to 16", convolve, convolution, plain, shapes
    shapes = ((4, 112, 112, 3), (7, 7, 3, 64))
    yield "7x7 convolution to 64", convolve, convolution, plain, shapes
    for size, channels in ((16, 8), (16, 32), (8, 64), (4, 128), (2, 256)):
        shape = (32, size, size, channels)
        yield "batch norm and relu", batch_norm_and_relu, BatchNorm, nn.BatchNorm, (shape,)
    for size, inputs, features in ((16, 8, 8), (8, 16, 16), (4, 32, 32), (16, 32, 16), (8, 64, 16)):
        shapes = ((32, size, size, inputs), (3, 3, inputs, features))
        yield f"3x3 convolution to {features}", convolve, convolution, plain, shapes
    for size, width in ((2, 64), (2, 512), (1, 512)):
        shapes = ((32, size, size, width), (3, 3, width, width))
        yield f"3x3 convolution to {width}", convolve, convolution, plain, shapes
    shapes = ((32, 32, 32, 3), (7, 7, 3, 8))
    yield "7x7 convolution to 8", convolve, convolution, plain, shapes
    shapes = ((32, 32, 32, 144), (3, 3, 1, 144))
    depthwise = partial(convolve, feature_group_count=144)
    yield "depthwise 3x3 convolution", depthwise, depthwise_taps, plain, shapes

    def pool(function: Any, x: jax.Array) -> jax.Array:
        return function(x, (3, 3), (2, 2), [(1, 1), (1, 1)])

    for shape in ((4, 112, 112, 64), (32, 32, 32, 8)):
        yield "3x3 max pooling", pool, max_pool, nn.max_pool, (shape,)


def measure(layer: Callable, ways: tuple, shapes: tuple, rounds: int) -> list[list[float]]:
    """Returns the seconds of each way, taken in turn."""
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys[1:], shapes, strict=True)]
    out = jax.eval_shape(partial(layer, ways[0]), *arrays)
    change = jax.random.normal(keys[0], out.shape)

    def both(way: Any, change: jax.Array, *arrays: jax.Array) -> tuple:
        y, pullback = jax.vjp(partial(layer, way), *arrays)
        return y, pullback(change)

    runs = [jax.jit(partial(both, way)) for way in ways]
    ours, plain = (jax.block_until_ready(run(change, *arrays)) for run in runs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        # Not the largest difference: by rounding a relu passes a number near 0, or does not.
        apart = jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        assert apart < 1e-3, f"the two ways differ by {apart}"
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run(change, *arrays))
            taken.append(time.perf_counter() - start)
    return seconds


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    allocator.keep_memory()
    rows = []
    for name, layer, ours, plain, shapes in layers():
        seconds = measure(layer, (ours, plain), shapes, args.rounds)
        ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
        quarter = len(ratios) // 4
        row = {
            "layer": name,
            "map": "x".join(map(str, shapes[0])),
            "milliseconds": f"{1e3 * statistics.median(seconds[0]):.2f}",
            "plain_milliseconds": f"{1e3 * statistics.median(seconds[1]):.2f}",
            "ratio": f"{statistics.median(ratios):.2f}",
            "ratio_low": f"{ratios[quarter]:.2f}",
            "ratio_high": f"{ratios[-1 - quarter]:.2f}",
            "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        }
        rows.append(row)
        print("  ".join(f"{key} {row[key]}" for key in COLUMNS), flush=True)
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
