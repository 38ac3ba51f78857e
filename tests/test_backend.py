"""The installed backend computes correctly."""

import jax.lib

from aim_flax import devices


def test_product_and_reduction_under_jit_are_right(capsys):
    """jaxlib 0.10.2 fails this: github.com/jax-ml/jax/issues/39103."""
    assert devices.computes_correctly()
    devices.warn_of_wrong_results()
    assert capsys.readouterr() == ("", "")


def test_wrong_backend_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(devices, "computes_correctly", lambda: False)
    devices.warn_of_wrong_results()
    (warning,) = capsys.readouterr().err.splitlines()
    assert jax.lib.__version__ in warning
    assert "issues/39103" in warning
