"""Flax transformations inside the backbone, around it, and around the latched network."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import AiM, Memory
from tests.arrays import KEY, draw, outputs_and_gradients, random_variables
from tests.asserts import assert_close, refused
from tests.networks import WithSetup


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Conv(4, (3, 3), name="conv")(x))


class ScanBody(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Stage(nn.Module):
    """Three blocks, one after the other, each with its own parameters, transformed or not."""

    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        if self.transformation == "scan":
            body = nn.scan(
                ScanBody, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return body(name="blocks")(x, None)[0]
        block = nn.remat(Block) if self.transformation == "remat" else Block
        for i in range(3):
            x = block(name=f"block{i}")(x)
        return x


class Ensemble(nn.Module):
    """The same blocks side by side: their outputs are added."""

    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        if self.transformation == "vmap":
            blocks = nn.vmap(
                Block, in_axes=None, axis_size=3, variable_axes={"params": 0},
                split_rngs={"params": True},
            )  # fmt: skip
            return blocks(name="blocks")(x).sum(axis=0)
        return sum(Block(name=f"block{i}")(x) for i in range(3))


class Staged(nn.Module):
    """A layer to write after, a stage, a norm behind it, and a layer that reads after all."""

    stage: type[nn.Module]
    transformation: str = "none"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="stem")(x)
        x = self.stage(self.transformation, name="stage")(x)
        x = nn.LayerNorm(name="behind")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


def stacked(variables, inner):
    """Returns the variables of stage/block{0,1,2} stacked under one module of a transformation."""
    flat = flatten_dict(variables["params"])
    joint = {path: leaf for path, leaf in flat.items() if not path[1].startswith("block")}
    for path in {path[2:] for path in flat if path[:2] == ("stage", "block0")}:
        blocks = [flat["stage", f"block{i}", *path] for i in range(3)]
        joint["stage", *inner, *path] = np.stack(blocks)
    return {**variables, "params": unflatten_dict(joint)}


def latch_on_stages(mode, net):
    """Updates come before the transformed modules, around them, and behind them."""
    update_after = ["stem", "stage", "behind"]
    return AiM(net, Memory((2, 2, 4)), ["stage/.*conv", "head"], update_after, read_mode=mode)


STAGED_INPUT = draw(2, 4, 4, 3)


@cache
def untransformed(mode, stage):
    aim = latch_on_stages(mode, Staged(stage))
    variables = random_variables(aim, STAGED_INPUT)
    return variables, outputs_and_gradients(aim, variables, STAGED_INPUT)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize(
    ("stage", "transformation", "inner"),
    [(Stage, "remat", None), (Stage, "scan", ("blocks", "block")), (Ensemble, "vmap", ("blocks",))],
    ids=["remat", "scan", "vmap"],
)
def test_reads_inside_and_updates_around_transformations(mode, stage, transformation, inner):
    variables, (outputs, (params, image)) = untransformed(mode, stage)
    if inner is not None:
        variables = stacked(variables, inner)
        params = stacked({"params": params}, inner)["params"]
    aim = latch_on_stages(mode, Staged(stage, transformation))
    shapes = jax.eval_shape(aim.init, KEY, STAGED_INPUT)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    found = outputs_and_gradients(aim, variables, STAGED_INPUT)
    assert_close(found, (outputs, (params, image)))


def test_a_backbone_that_is_itself_transformed_reads():
    x = draw(2, 4, 4, 4)
    plain, remat = (
        AiM(net, Memory((2, 2, 4)), "block.*/conv") for net in (Stage(), nn.remat(Stage)())
    )
    variables = random_variables(plain, x)
    expected = outputs_and_gradients(plain, variables, x)
    assert_close(outputs_and_gradients(remat, variables, x), expected)


@pytest.mark.parametrize(
    ("net", "place"),
    [
        (Staged(Stage, "remat"), "stage/block0"),
        (Staged(Stage, "remat"), "stage/block1/conv"),
        (Staged(Stage, "scan"), "stage/blocks/block"),
        (Staged(Ensemble, "vmap"), "stage/blocks"),
        (nn.remat(Staged)(Stage), "stem"),
    ],
)
def test_updates_inside_transformations_are_refused(net, place):
    aim = AiM(net, Memory((2, 2, 4)), read="head", update_after=place)
    message = f"update_after matches '{place}', which runs inside a Flax transformation"
    message += ".*: .*; update after a module around the transformed one, or behind it"
    with refused(message):
        jax.eval_shape(aim.init, KEY, STAGED_INPUT)


JitBlock = nn.jit(Block)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = JitBlock(name="block")(x)
        return nn.Conv(4, (1, 1), name="last")(x)


@pytest.mark.parametrize("read", [".*conv", "last"])
def test_backbones_with_nn_jit_are_refused_even_after_the_plain_one_was_compiled(read):
    x = draw(2, 4, 4, 4)
    Jitted().init(KEY, x)
    with refused("'block.*' runs inside nn.jit, .*: .* compile the whole step with jax.jit"):
        AiM(Jitted(), Memory((2, 2, 4)), read=read, read_mode="add").init(KEY, x)


def latched(**options):
    return AiM(WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1", **options)


@pytest.mark.slow
def test_a_latched_network_can_be_jitted_vmapped_and_scanned_as_a_whole():
    x = draw(3, 2, 4, 4, 3)
    aim = latched()
    variables = random_variables(aim, x[0])
    expected = jnp.stack([aim.apply(variables, images) for images in x])
    run = partial(aim.apply, variables)
    assert_close(jax.jit(jax.vmap(run))(x), expected)
    assert_close(jax.lax.map(jax.jit(run), x), expected)
    vmapped = nn.vmap(
        AiM, in_axes=0, variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
    )(WithSetup(), Memory((2, 2, 4)), "layers_1", "layers_0", "layers_1")  # fmt: skip
    assert_close(vmapped.apply(variables, x), expected)


class Outer(nn.Module):
    body: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        body = self.body or latched(name="body")
        return nn.Dense(2, name="outer_head")(body(x) + body(x))


def test_a_latched_network_can_be_part_of_another():
    x = draw(2, 4, 4, 3)
    aim = latched()
    variables = random_variables(Outer(), x)
    body = {name: tree["body"] for name, tree in variables.items()}
    alone = jax.eval_shape(aim.init, KEY, x)
    assert jax.tree.structure(body) == jax.tree.structure(alone)
    head = {"params": variables["params"]["outer_head"]}
    expected = nn.Dense(2).apply(head, 2 * aim.apply(body, x))
    for outer in (Outer(), Outer(body=aim)):
        shapes = jax.eval_shape(outer.init, KEY, x)
        assert jax.tree.structure(shapes) == jax.tree.structure(variables)
        assert_close(outer.apply(variables, x), expected)
