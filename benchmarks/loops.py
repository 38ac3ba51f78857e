"""Ten training steps in one scan against ten calls: python benchmarks/loops.py."""

import statistics
import time

import jax
import jax.numpy as jnp

from aim_flax.models.mlp import MLP
from aim_flax.models.resnet import ResNet

STEPS, ROUNDS = 10, 5


def main() -> None:
    networks = {
        "ResNet, two blocks of width 8, 32x32 images": (
            ResNet(10, stage_sizes=(1, 1), width=8, stem="cifar"),
            jnp.ones((16, 32, 32, 3)),
        ),
        "MLP, two layers of 256, 8x8 images": (MLP(10), jnp.ones((64, 8, 8, 1))),
    }
    for name, (network, images) in networks.items():
        calls, scan = compare(network, images)
        print(f"{name}: {STEPS} calls {calls:.4f} s, a scan {scan:.4f} s, ratio {scan / calls:.2f}")


def compare(network, images: jax.Array) -> tuple[float, float]:
    """Returns the median seconds of the same steps as calls and as a scan, taken in turn."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-2, leaf.dtype), shapes)
    rest = {k: v for k, v in variables.items() if k != "params"}

    def step(params, _):
        def loss(params):
            logits, _ = network.apply(
                {"params": params, **rest}, images, train=True, mutable=list(rest)
            )
            return logits.sum()

        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, jax.grad(loss)(params)), None

    one = jax.jit(lambda params: step(params, None)[0])
    many = jax.jit(lambda params: jax.lax.scan(step, params, length=STEPS)[0])

    def calls(params):
        for _ in range(STEPS):
            params = one(params)
        return params

    seconds = {calls: [], many: []}
    for turn in range(ROUNDS + 1):
        for way, measured in seconds.items():
            start = time.perf_counter()
            jax.block_until_ready(way(variables["params"]))
            if turn:  # The first one compiles.
                measured.append(time.perf_counter() - start)
    return statistics.median(seconds[calls]), statistics.median(seconds[many])


if __name__ == "__main__":
    main()
