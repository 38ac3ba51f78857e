"""The installed backend computes correctly."""

import jax.lib

from aim_flax import devices


def test_product_and_reduction_under_jit_are_right():
    """jaxlib 0.10.2 fails this: github.com/jax-ml/jax/issues/39103."""
    assert devices.computes_correctly()
    assert devices.warning() is None


def test_wrong_backend_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(devices, "computes_correctly", lambda: False)
    warning = devices.warning()
    assert jax.lib.__version__ in warning
    assert "issues/39103" in warning
    assert "\n" not in warning
