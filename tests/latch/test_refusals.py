"""What the latch refuses, when a network is initialised or applied, each in one line."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory, MemoryUpdate
from tests.arrays import KEY, draw
from tests.asserts import refused


class Mixed(nn.Module):
    """Layers of every kind, to point patterns at."""

    @nn.compact
    def __call__(self, x):
        tokens = nn.Embed(5, 4, name="embed")(jnp.zeros(x.shape[:1], jnp.int32))
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        line = nn.Conv(4, (3,), name="line")(x[:, 0])
        nn.Conv(4, (3, 3), name="unbatched")(x[0])
        nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 4, 4)), name="masked")(x)
        nn.ConvLocal(4, (1, 1), name="local")(x)
        nn.DenseGeneral(4, axis=(-2, -1), name="several_axes")(x)
        nn.DenseGeneral(4, batch_dims=(0,), name="batch_dims")(x)
        nn.Dense(4, name="one_example")(x[0, 0, 0])
        pair = Pair(name="pair")(x)
        nn.Dense(4, name="late")(x.reshape(-1, 4))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)) + line.mean(axis=1) + tokens + pair[0])


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.zeros(4), x


def refuse(options, **told):
    aim = AiM(**{"backbone": Mixed(), "memory": Memory((2, 2, 4)), "read": "head", **options})
    with refused(**told):
        jax.eval_shape(aim.init, KEY, draw(2, 4, 4, 3))


CANNOT = "cannot read a memory; these can: nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral"
UNBATCHED = "a convolution over 2 axes reads only into inputs of 4, (B, ..., C), not (4, 4, 4)"
ONLY_LAST_AXIS = "an nn.DenseGeneral can read only over its last axis"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("embed", f"Embed {CANNOT}"),
        ("norm", f"BatchNorm {CANNOT}"),
        ("local", f"ConvLocal {CANNOT}"),
        ("several_axes", ONLY_LAST_AXIS),
        ("batch_dims", ONLY_LAST_AXIS),
        ("unbatched", UNBATCHED),
        ("masked", "its mask says nothing about the memory's channels"),
        ("one_example", "its input has no batch axis: (4,)"),
    ],
)
def test_modules_that_cannot_read_are_refused(place, why):
    refuse(dict(read=place), exactly=f"read matches {place!r}, but {why}")


FOLDED = "sees 32: the backbone folds something into its batch axis after the update$"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(read="conv1"),
            r"^read pattern 'conv1' matches no module of Mixed \(did you mean 'conv'\?\); there are"
            ": conv, line, unbatched, masked, several_axes, batch_dims, one_example, late, head$",
        ),
        (dict(read="hea"), r"'hea' matches no module of Mixed \(did you mean 'head'\?\)"),
        (dict(read=("head", "tail")), "'tail' matches no module of Mixed; there are"),
        (
            dict(update_after="norms"),
            r"^update_after pattern 'norms' .*'norm'\?\); there are: embed, conv, norm, ",
        ),
        (dict(read_initial="heads"), "^read_initial pattern 'heads' matches no module of Mixed"),
        (dict(read_initial="conv"), "read_initial matches 'conv', which read does not match$"),
        (
            dict(read="conv", memory=Memory((6,), "dense")),
            r"'conv', but a convolution reads a memory of shape \(R, K, D\), not \(6,\)$",
        ),
        (
            dict(update_after="pair"),
            "^update_after matches 'pair', whose output is a tuple: say which part of it is the"
            r" array, such as update_after={'pair': 0} for the first$",
        ),
        (
            dict(update_after="line"),
            r"'line': a memory of shape \(2, 2, 4\) is updated from an array \(B, H, W, C\), not",
        ),
        (
            dict(update_after="one_example", memory=Memory((6,), "dense")),
            r"memory of shape \(6,\) is updated from an array \(B, ..., C\), not \(4,\)$",
        ),
        (
            dict(read="late", update_after="conv"),
            f"the memory was written for a batch of 2, but 'late' {FOLDED}",
        ),
        (
            dict(
                update_after=("conv", "late"),
                memory=Memory((6,), "dense"),
                update=MemoryUpdate(pool="mean"),
            ),
            f"the memory was written for a batch of 2, but 'late' {FOLDED}",
        ),
        (
            dict(read_mode="adds"),
            r"read_mode is 'adds', expected one of concat, .* \(did you mean 'add'\?\)$",
        ),
        (
            dict(carry="stat", update_after="conv"),
            r"carry is 'stat', expected one of weights, state \(did you mean 'state'\?\)$",
        ),
        (dict(fit="stretch"), "fit is 'stretch', expected one of reshape, resize$"),
        (dict(zero_init=True), "zero_init needs read_mode 'add', 'scale' or 'attend': in 'conca"),
        (dict(carry="state"), "carry 'state' needs update_after: nothing writes to this memory$"),
        (dict(carry_rate=0.0), r"carry_rate is 0.0, expected a number in"),
        (dict(carry_rate=1.5), r"carry_rate is 1.5, expected .* \(0, 1\]$"),
        (dict(carry_rate=float("nan")), "carry_rate is nan, expected a number"),
        (
            dict(read="conv("),
            r"'conv\(' is no regular expression: missing \), unterminated subpattern at posi",
        ),
        (
            dict(update_after="conv", update=MemoryUpdate(mode="gate")),
            "the update block's mode is 'gate', expected one of replace, residual, gated .*'gated'",
        ),
        (dict(memory=Memory((2,))), r"a conv memory has shape \(R, K, D\)"),
    ],
)
def test_refusals_say_in_one_line_what_was_wrong(options, message):
    refuse(options, pattern=message)


class Own(nn.Module):
    name_: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Dense(3, name=self.name_)(x))


@pytest.mark.parametrize("name", ["memory", "memory_initial"])
def test_names_of_the_memories_are_taken(name):
    aim = AiM(Own(name), Memory((4,), "dense"), read="head", read_initial="head")
    with pytest.raises(nn.module.errors.NameInUseError, match=f'submodule "{name}"'):
        aim.init(KEY, draw(2, 3))
