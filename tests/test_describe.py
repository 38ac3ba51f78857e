"""Exact sizes of the networks in configs/, and how they are counted."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from aim_flax import cli
from aim_flax import config as configs
from aim_flax.describe import describe, multiply_adds

CONFIGS = Path(__file__).parents[1] / "configs"

# (parameters, running statistics) of every arm of every config.
COUNTS = {
    # Two hidden layers of 256: 64·256+256 + 256·256+256 + 256·10+10 = 85,002. Memory of 64:
    # reads 64·(256+256+10), Dense on ones 64·64+64, each update block on [256, 64]:
    # 320·16+16 + 16·16+16 + 16·32+32 + 2·(16+16+32) + 32·64+64 = 8,192.
    "digits_mlp:control": (85_002, 0),
    "digits_mlp:aim": (85_002 + 33_408 + 4_160 + 2 * 8_192, 256),
    "digits_mlp:aim_no_update": (85_002 + 33_408 + 4_160, 0),
    "digits_mlp:aim_state": (85_002 + 33_408 + 4_160 + 2 * 8_192, 256),
    "digits_mlp:aim_direct": (85_002 + 33_408 + 64 + 2 * 8_192, 256),
}


def arms() -> list[str]:
    return [
        f"{file.stem}:{arm}"
        for file in sorted(CONFIGS.glob("*.py"))
        for arm in runpy.run_path(str(file))["ARMS"]
    ]


def test_every_arm_has_a_count():
    assert sorted(arms()) == sorted(COUNTS)


@pytest.mark.parametrize("arm", arms())
def test_counts(arm):
    name, _, word = arm.partition(":")
    text = describe(configs.load(f"{CONFIGS / name}.py:{word}"))
    (total,) = [line.split() for line in text.splitlines() if line.startswith("total")]
    assert tuple(int(n.replace(",", "")) for n in total[1:]) == COUNTS[arm]
    assert f"parameters + running statistics: {sum(COUNTS[arm]):,}" in text


def test_table_names_backbone_memory_reads_and_updates(capsys):
    cli.train(["--config", f"{CONFIGS / 'digits_mlp'}.py", "--describe"])
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:-3]]
    assert [(name, int(n.replace(",", ""))) for name, n, _ in rows] == [
        ("backbone", 85_002),
        ("memory", 4_160),
        ("read head", 640),
        ("read layer1/dense", 16_384),
        ("read layer2/dense", 16_384),
        ("update layer1", 8_192),
        ("update layer2", 8_192),
        ("total", 138_954),
    ]


def count(fn, *shapes) -> int:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return multiply_adds(jax.make_jaxpr(fn)(*args).jaxpr)


def test_multiply_adds_of_products():
    assert count(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 3 * 5
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 2, 3), (4, 3, 5)) == 4 * 30
    assert count(lambda a: a + 1, (7,)) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8 * 8 * 6 * 9 * 4),
        ({"strides": 2}, 4 * 4 * 6 * 9 * 4),
        ({"padding": "VALID"}, 6 * 6 * 6 * 9 * 4),
        ({"feature_group_count": 2}, 8 * 8 * 6 * 9 * 2),
    ],
)
def test_multiply_adds_of_convolutions(options, expected):
    layer = nn.Conv(6, (3, 3), **options)
    x = jnp.ones((1, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    assert count(lambda x: layer.apply(variables, x), x.shape) == expected


def test_multiply_adds_within_loops_and_calls():
    def repeated(a, b):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, b), None), a, length=7)[0]

    assert count(repeated, (2, 3), (3, 3)) == 7 * 2 * 3 * 3
