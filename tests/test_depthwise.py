"""Depthwise convolutions by taps are the convolutions, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_flax.layers import depthwise
from aim_flax.layers.depthwise import depthwise_taps
from aim_flax.models.describe import multiply_adds
from tests.arrays import draw
from tests.asserts import assert_close

pytestmark = pytest.mark.usefixtures("quick_compile", "standard_promotion")


def both(x, kernel, **options):
    """Returns the outputs and gradients of a layer by taps, and of the same one by XLA."""
    results = []
    for function in (depthwise_taps, None):
        layer = nn.Conv(
            x.shape[-1], kernel, use_bias=False, conv_general_dilated=function, **options
        )
        variables = {"params": {"kernel": draw(*kernel, 1, x.shape[-1], seed=1)}}

        def loss(params, x, layer=layer):
            y = layer.apply({"params": params}, x)
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        gradients, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)
        results.append((y, gradients))
    return results


@pytest.mark.parametrize("size", [(7, 8), (5, 3), (2, 1)])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {}),
        ((5, 5), {"strides": 2}),
        ((3, 5), {"strides": (2, 3)}),
        ((3, 3), {"strides": 2, "padding": [(1, 1), (1, 1)]}),
        ((2, 2), {"padding": [(3, 0), (0, 2)]}),
        ((1, 1), {"strides": 2}),
    ],
)
def test_outputs_and_gradients_are_the_convolutions(size, kernel, options):
    taps, convolution = both(
        jnp.asarray(draw(3, *size, 4)), kernel, feature_group_count=4, **options
    )
    assert_close(taps, convolution, 1e-5)


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray(draw(64, 6, 6, 4))
    options = dict(feature_group_count=4)
    (y, (of_kernel, of_x)), _ = both(x.astype(jnp.bfloat16), (5, 5), dtype=jnp.bfloat16, **options)
    _, (expected, (exact_kernel, exact_x)) = both(x, (5, 5), **options)
    assert y.dtype == of_x.dtype == jnp.bfloat16
    for found, exact in (
        (y, expected),
        (of_x, exact_x),
        (of_kernel["kernel"], exact_kernel["kernel"]),
    ):
        np.testing.assert_allclose(
            found.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max())
        )


@pytest.mark.parametrize(
    "options",
    [
        dict(feature_group_count=2),
        dict(feature_group_count=4, kernel_dilation=2),
        dict(feature_group_count=4, input_dilation=2, padding=[(1, 1), (1, 1)]),
        dict(feature_group_count=4, features=8),
        dict(),
    ],
)
def test_other_convolutions_are_left_to_xla(options, monkeypatch):
    monkeypatch.setattr(depthwise, "_depthwise", None)
    x, options = jnp.asarray(draw(2, 5, 6, 4)), {"features": 4, **options}
    layers = [
        nn.Conv(kernel_size=(3, 3), conv_general_dilated=f, **options)
        for f in (depthwise_taps, None)
    ]
    variables = layers[0].init(jax.random.key(0), x)
    assert_close(*(layer.apply(variables, x) for layer in layers), 1e-6)


def test_it_is_counted_as_the_convolution_that_it_is():
    layer = nn.Conv(4, (3, 3), feature_group_count=4, conv_general_dilated=depthwise_taps)
    x = jnp.ones((1, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(lambda x: layer.apply(variables, x))(x)
    assert multiply_adds(jaxpr.jaxpr) == 8 * 8 * 4 * 9


def test_a_program_for_a_gpu_has_the_convolution():
    def run(x, kernel):
        return depthwise_taps(
            x, kernel, (1, 1), "SAME",
            feature_group_count=4, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).sum()  # fmt: skip

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 4), (3, 3, 1, 4))]
    for platform, there in (("cuda", True), ("cpu", False)):
        text = str(
            jax.export.export(jax.jit(jax.grad(run)), platforms=[platform])(*shapes).mlir_module()
        )
        assert ("stablehlo.convolution" in text) == there
