"""The quick convolution is JAX's, with its gradients, whatever its kernel, strides and padding."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from aim_flax.layers import convolution as layer
from aim_flax.layers.convolution import convolution
from tests.arrays import draw
from tests.asserts import assert_close

pytestmark = pytest.mark.usefixtures("quick_compile")
NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    # Windows of the input, the convolution, taps, windows of the output's changes; from three
    # channels two or four columns of the output at once.
    "channels",
    [(3, 18), (8, 3), (33, 18), (8, 2), (3, 8)],
)
@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((3, 3), "SAME"), ((5, 6), "VALID"), ((5, 3), [(2, 0), (1, 3)]), ((2, 4), [(0, 4), (3, 0)])],
)
def test_outputs_and_gradients_are_those_of_jax(
    monkeypatch, channels, kernel, strides, padding, avx512
):
    monkeypatch.setattr(layer, "_has_avx512", lambda: avx512)
    check((9, 8), channels, kernel, strides, padding)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [
        ((2, 2), (3, 3), "SAME"),
        ((1, 1), (3, 3), "SAME"),
        ((2, 4), (3, 3), [(1, 0), (0, 2)]),
        ((4, 4), (3, 3), "VALID"),
        ((4, 4), (4, 4), "VALID"),
        ((3, 4), (5, 3), [(2, 2), (1, 1)]),
    ],
)
def test_kernels_larger_than_their_maps(size, kernel, strides, padding):
    """Or than what comes of these, to which the input's gradient is owed."""
    check(size, (8, 24), kernel, strides, padding)


def check(size, channels, kernel, strides, padding):
    x, weights = jnp.asarray(draw(2, *size, channels[0])), jnp.asarray(draw(*kernel, *channels))

    def run(convolve):
        convolve = partial(convolve, window_strides=strides, padding=padding, **NUMBERS)
        y, pullback = jax.vjp(convolve, x, weights)
        return y, pullback(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    assert_close(jax.jit(run, static_argnums=0)(convolution), run(jax.lax.conv_general_dilated))


def test_others_are_left_to_jax():
    x, weights = jnp.asarray(draw(2, 7, 7, 4)), jnp.asarray(draw(3, 3, 2, 6))
    given = dict(window_strides=(1, 1), padding="SAME", feature_group_count=2, **NUMBERS)
    assert_close(
        convolution(x, weights, **given), jax.lax.conv_general_dilated(x, weights, **given)
    )
    sequence, weights = jnp.asarray(draw(2, 7, 4)), jnp.asarray(draw(3, 4, 6))
    given = dict(window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    expected = jax.lax.conv_general_dilated(sequence, weights, **given)
    assert_close(convolution(sequence, weights, **given), expected)
