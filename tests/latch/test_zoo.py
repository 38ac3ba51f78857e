"""Networks that nobody here wrote: each equal to itself with the memory written into it by hand.

Every one reads in all modes, writes, carries, is differentiated, mapped over seeds, called at two
batch sizes and exported; or it is refused, in one line.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate, fit
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, refused
from tests.latch import zoo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

MAP = Memory((2, 2, 3), "direct")
LINE = Memory((3, 2), "direct")
VOLUME = Memory((2, 1, 2, 3), "direct")
FLAT = Memory((4,), "direct")
MEAN, CAUSAL = MemoryUpdate((3,), pool="mean"), MemoryUpdate((3,), pool="causal")


def whole(*shape, most=11):
    return np.random.default_rng(1).integers(0, most, shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, what it is called with for a number of examples, and what is latched on."""

    net: nn.Module
    inputs: Any
    read: str
    update_after: Any
    memory: Memory = MAP
    update: MemoryUpdate = MemoryUpdate((3,))
    kwargs: Any = dataclasses.field(default_factory=dict)

    def latch(self, mode="add", **options):
        return AiM(
            self.net, self.memory, self.read, self.update_after,
            read_mode=mode, update=self.update, **options,
        )  # fmt: skip


def images(b, size=4, channels=2):
    return (draw(b, size, size, channels),)


CASES = {
    "MNIST": Case(zoo.MNIST(), images, "conv2|dense", "conv1"),
    "ResNet": Case(zoo.ResNet(), images, ".*/conv1", "block0", kwargs=dict(train=False)),
    "WideResNet": Case(zoo.WideResNet(), images, "conv.*", "stem"),
    "DenseNet": Case(zoo.DenseNet(), images, "conv.*", "conv.*"),
    "Inception": Case(zoo.Inception(), partial(images, size=8), "branch.|pool", "stem"),
    "EfficientNet": Case(zoo.EfficientNet(), images, ".*/(expand|depthwise)", r"block\d"),
    "UNet": Case(zoo.UNet(), images, "up|mask", "down1"),
    "Generator": Case(zoo.Generator(), lambda b: (draw(b, 3),), "colour", "dense", FLAT),
    "VAE": Case(zoo.VAE(), lambda b: (draw(b, 5),), "decoder", "encoder", FLAT),
    "ViT": Case(zoo.ViT(), images, ".*/up", r"block\d", FLAT, MEAN),
    "Mixer": Case(zoo.Mixer(), images, "tokens|channels/up|head", "channels", FLAT, MEAN),
    "BERT": Case(
        zoo.BERT(), lambda b: (whole(b, 5), np.arange(5) < 2 + whole(b, 1) % 3),
        ".*/up|head", "block0", FLAT, MEAN,
    ),
    "GPT": Case(zoo.GPT(), lambda b: (whole(b, 5),), ".*/up", "block0", FLAT, CAUSAL),
    "LSTM": Case(zoo.LSTM(), lambda b: (whole(b, 5),), "head", "dense", FLAT, CAUSAL),
    "WaveNet": Case(zoo.WaveNet(), lambda b: (draw(b, 7, 2),), "(gate|value).", "stem", LINE, MEAN),
    "C3D": Case(zoo.C3D(), lambda b: (draw(b, 3, 4, 4, 2),), "conv2", "conv1", VOLUME),
    "PointNet": Case(zoo.PointNet(), lambda b: (draw(b, 6, 3),), "features", "points", FLAT, MEAN),
    "GCN": Case(
        zoo.GCN(), lambda b: (draw(b, 3, 2), draw(b, 3, 3, seed=1)),
        r"layer\d", "layer0", FLAT, MEAN,
    ),
    "TwoTowers": Case(zoo.TwoTowers(), lambda b: (*images(b), draw(b, 3)), "text", "image"),
    "NeRF": Case(zoo.NeRF(), lambda b: (draw(b, 3),), "layer[1-3]", "layer0", FLAT),
    "ActorCritic": Case(zoo.ActorCritic(), images, "hidden", {"body": 0}),
    "BiT": Case(zoo.BiT(), images, "conv", "stem"),
}  # fmt: skip
MODES = ("concat", "add", "scale", "attend")


def modes(name):
    """Returns the ways in which a network of the zoo can read."""
    case = CASES[name]
    refused = {"attend": len(case.memory.shape) == 1, "concat": name == "BiT"}
    return [mode for mode in MODES if not refused.get(mode)]


class Notes:
    """A memory as a network would have it inside: what its layers read, and who rewrites it."""

    def __init__(self, variables, mode, case, carried=0.0):
        self.variables, self.mode, self.case = variables, mode, case
        self.m = variables["params"]["memory"]["content"][None] + carried

    def of(self, module, what):
        """Returns the variables of what is latched on to a module."""

        def look(tree):
            for name in module.path:
                tree = tree.get(name, {})
            return tree.get(f"memory_{what}", {})

        return {name: look(tree) for name, tree in self.variables.items()}

    def wrote(self, module, y):
        block = self.of(module, "update")
        if block["params"]:
            self.m = self.case.update.apply(block, y, self.m)
        return y

    def read(self, layer, x):
        if self.mode == "concat":
            m = self.shaped(layer, x)
            m = jnp.broadcast_to(m, (*x.shape[:-1], m.shape[-1]))
            groups = getattr(layer, "feature_group_count", 1)
            parts = jnp.split(x, groups, axis=-1)
            return layer(jnp.concatenate([half for x in parts for half in (x, m)], axis=-1))
        params = self.of(layer, "read")["params"]
        if self.mode == "attend":
            slots = self.m.reshape(self.m.shape[0], 1, -1, self.m.shape[-1])
            q = (x @ params["query"]["kernel"]).reshape(x.shape[0], -1, 1, slots.shape[-1])
            weights = jax.nn.softmax((q * slots).sum(-1) / np.sqrt(slots.shape[-1]))
            found = (weights[..., None] * slots).sum(axis=2)
            share = self.multiply(layer, found.reshape(*x.shape[:-1], -1), params["output"])
        else:
            share = self.multiply(layer, self.shaped(layer, x), params)
        y = layer(x)
        return y * (1 + share) if self.mode == "scale" else y + share

    def shaped(self, layer, x):
        """Returns the memory in the form in which a layer reads it."""
        if not isinstance(layer, nn.Dense):
            return fit(self.m, *x.shape[1:-1])
        of_positions = self.case.update.pool == "causal" and self.m.ndim == 3
        m = self.m if of_positions else self.m.reshape(len(self.m), -1, self.m.shape[-1]).mean(1)
        return m.reshape(*m.shape[:-1], *(1,) * (x.ndim - m.ndim), m.shape[-1])

    def multiply(self, layer, m, params):
        kernel = params["kernel"]
        if isinstance(layer, nn.Dense):
            return m @ kernel
        axes = kernel.ndim - 2
        every = lambda n: (n,) * axes if isinstance(n, int) else n  # noqa: E731
        letters = "DHW"[-axes:] if axes > 1 else "T"
        numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        strides, padding = every(layer.strides or 1), layer.padding
        if isinstance(layer, nn.ConvTranspose):
            return jax.lax.conv_transpose(m, kernel, strides, padding, dimension_numbers=numbers)
        dilation = every(layer.kernel_dilation or 1)
        if padding == "CAUSAL":
            padding = [(dilation[0] * (kernel.shape[0] - 1), 0)]
        return jax.lax.conv_general_dilated(
            m, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers
        )


def with_memory_inside(case, mode, variables, args, carried=0.0):
    """Returns what the network makes of its inputs with the memory written into it."""
    net = case.net.clone(notes=Notes(variables, mode, case, carried))
    return net.apply(variables, *args, **case.kwargs)


@cache
def drawn(name, mode, seed=0):
    case = CASES[name]
    return random_variables(case.latch(mode), *case.inputs(3), seed=seed, **case.kwargs)


@pytest.mark.parametrize("name", CASES)
def test_a_latched_network_is_the_network_with_the_memory_inside(name):
    case, args = CASES[name], CASES[name].inputs(3)
    variables = {mode: drawn(name, mode) for mode in modes(name)}

    @jax.jit
    def both(variables, *args):
        found = {m: case.latch(m).apply(v, *args, **case.kwargs) for m, v in variables.items()}
        byhand = {m: with_memory_inside(case, m, v, args) for m, v in variables.items()}
        unwritten = case.latch().clone(update_after="")
        return found, byhand, unwritten.apply(variables["add"], *args, **case.kwargs)

    found, expected, plain = both(variables, *args)
    assert_close(found, expected)
    # And what is written counts.
    differing = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, found["add"])
    assert max(jax.tree.leaves(differing)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_gradients_carry_seeds_and_batch_sizes(name):
    case, args = CASES[name], CASES[name].inputs(3)
    aim, variables = case.latch(), drawn(name, "add")
    seeds = [variables, drawn(name, "add", seed=1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seeds)

    def loss(run, params):
        y = run({**variables, "params": params}, args)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(y))

    latched = lambda v, args: aim.apply(v, *args, **case.kwargs)  # noqa: E731
    byhand = partial(with_memory_inside, case, "add")

    @jax.jit
    def everything(params, stacked):
        gradients = [jax.grad(partial(loss, run))(params) for run in (latched, byhand)]
        return gradients, jax.vmap(latched, in_axes=(0, None))(stacked, args)

    (found, expected), mapped = everything(variables["params"], stacked)
    assert_close(found, expected)
    apart = jax.jit(lambda seeds: [latched(v, args) for v in seeds])(seeds)
    assert_close(mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *apart))
    # Examples don't see each other, so fewer of them are the same.
    fewer = jax.jit(latched)(variables, tuple(x[:2] for x in args))
    assert_close(fewer, jax.tree.map(lambda y: y[:2], apart[0]))


@pytest.mark.parametrize("name", CASES)
def test_carry_and_export(name):
    case, args = CASES[name], CASES[name].inputs(3)
    variables = drawn(name, "add")
    if case.update.pool != "causal":
        carrying = case.latch(carry="state")
        carried = draw(*case.memory.shape, seed=3)
        given = {**variables, "memory": {"carried": carried}}
        found = jax.jit(partial(carrying.apply, **case.kwargs))(given, *args)
        assert_close(found, with_memory_inside(case, "add", variables, args, carried))
        kwargs = {} if "train" in case.kwargs else case.kwargs
        _, state = jax.jit(
            partial(
                carrying.apply, train=True, mutable=["memory", "batch_stats"],
                rngs={"dropout": KEY}, **kwargs,
            )
        )(given, *args)  # fmt: skip
        assert np.abs(state["memory"]["carried"] - carried).max() > 1e-4
    apply = jax.jit(partial(case.latch().apply, **case.kwargs))
    exported = jax.export.export(apply)(variables, *args)
    assert_close(exported.call(variables, *args), apply(variables, *args))


REFUSED = {
    "PixelCNN": (
        zoo.PixelCNN(), images, "conv", "", MAP,
        "read matches 'conv', but its mask says nothing about the memory's channels",
    ),
    "Swin": (
        zoo.Swin(), images, "window", "patches", MAP,
        "the memory was written for a batch of 3, but 'window' sees 12: the backbone folds",
    ),
    "Experts": (
        zoo.Experts(), lambda b: (draw(b, 4, 3),), "expert", "embed", FLAT,
        "the memory was written for a batch of 3, but 'expert' sees 6: the backbone folds",
    ),
    "TimeMajor": (
        zoo.TimeMajor(), lambda b: (draw(b, 3, 2),), "step", "embed", FLAT,
        "read matches 'step', which has an array .* its first axis is not the batch, so examples",
    ),
    "BiT": (
        zoo.BiT(), images, "conv", "", MAP,
        "read matches 'conv', but its class StdConv has a param of its own, .*: use read_mode 'add",
    ),
    "ActorCritic": (
        zoo.ActorCritic(), images, "hidden", "body", MAP,
        r"update_after matches 'body', whose output is a tuple: say .* update_after={'body': 0}",
    ),
    "GPT": (
        zoo.GPT(), lambda b: (whole(b, 5),), ".*/up", "block0", FLAT,
        r"'block0': a memory \(4,\) is updated from an array \(3, 5, 4\), so .* pool='causal'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    net, inputs, read, update_after, memory, message = REFUSED[name]
    update = MemoryUpdate((3,), pool="mean" if name in ("Experts", "TimeMajor") else None)
    aim = AiM(net, memory, read, update_after, update=update)
    with refused(message):
        jax.eval_shape(aim.init, KEY, *inputs(3))


def test_the_zoo_is_large_enough():
    assert len(CASES) >= 20
