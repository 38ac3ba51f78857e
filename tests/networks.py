"""Small networks, with a memory latched on, and their parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate
from tests.arrays import random_variables

D = 3  # floats of the memory of the networks below


class Probe(nn.Module):
    """Returns {look: the memory as it stands there}, given variables that went through `lenses`."""

    @nn.compact
    def __call__(self, x):
        look = {"look0": nn.Dense(D, name="look0")(x)}
        h = nn.Dense(4, name="write1")(x)
        look["look1"] = nn.Dense(D, name="look1")(x)
        h = nn.Dense(4, name="write2")(h)
        look["look2"] = nn.Dense(D, name="look2")(x)
        return look


def probe(**options):
    given = dict(read="look.*", update_after="write.*", read_mode="add")
    return AiM(Probe(), Memory((D,), "dense"), **{**given, **options})


def lenses(variables):
    """Makes every `look` return the memory it reads: kernels are zero, read kernels identity."""
    params = {
        name: {
            "kernel": np.zeros_like(layer["kernel"]),
            "bias": np.zeros_like(layer["bias"]),
            "memory_read": {"kernel": np.eye(D, dtype=np.float32)},
        }
        if name.startswith("look")
        else layer
        for name, layer in variables["params"].items()
    }
    return {**variables, "params": params}


def probed(x, seed=0, **options):
    aim = probe(**options)
    return aim, lenses(random_variables(aim, x, seed=seed))


class Net(nn.Module):
    """Dense layers with batch norm and dropout, one of them given from outside."""

    last: nn.Module = nn.Dense(2)
    axis_name: str | None = None
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="dense1")(x)
        x = nn.BatchNorm(not train, axis_name=self.axis_name, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        x = nn.relu(nn.Dense(4, name="dense2")(x))
        return self.last(x)


def latched_net(net=None, **options):
    given = dict(read="dense2|last", update_after="dense1", read_mode="add")
    return AiM(net or Net(), Memory((D,), "dense"), **{**given, **options})


class WithSetup(nn.Module):
    """Submodules made in `setup`, which another method calls."""

    def setup(self):
        self.layers = [nn.Conv(4, (3, 3)), nn.Conv(5, (3, 3))]
        self.head = nn.Dense(3)

    def encode(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x

    def __call__(self, x):
        return self.head(self.encode(x).mean(axis=(1, 2)))


def dense(variables, name, x):
    """Returns what a Dense layer makes of x without a memory."""
    layer = variables["params"][name]
    return x @ layer["kernel"] + layer["bias"]


def weights_of(variables, name="memory"):
    """Returns what the parameters of a dense memory, or of one of a 1x1 convolution, make of it."""
    ((kind, layer),) = variables["params"][name].items()
    kernel = layer["kernel"]
    content = kernel.sum(axis=tuple(range(kernel.ndim - 1))) + layer["bias"]
    return content[None] if kind == "dense" else np.broadcast_to(content, (1, 2, 2, len(content)))


def written(variables, place, y, m, **options):
    """Returns what the update block of a place makes of an output and a memory, in evaluation."""
    block = {name: variables[name][place]["memory_update"] for name in ("params", "batch_stats")}
    return MemoryUpdate(**options).apply(block, y, m)


def gradients_and_state(aim, variables, x, **options):
    """Returns the gradients of a loss, and what a training pass writes."""

    def loss(params):
        y, state = aim.apply(
            {**variables, "params": params}, x,
            train=True, mutable=["memory", "batch_stats"], **options,
        )  # fmt: skip
        return jnp.square(y - 1).mean(), state

    return jax.grad(loss, has_aux=True)(variables["params"])
