"""What many tests assert: trees that are equal, and mistakes that are told in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from PIL import Image

from aim_flax.errors import UsageError


def assert_close(found, expected, tolerance=1e-5):
    """Compares trees; the tolerance is relative to each array's largest number, or to 1."""

    def compare(path, a, b):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(compare, found, expected)


def assert_equal(found, expected):
    """Compares trees bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_drawn_alike(drawn, kept):
    """Compares two files of a figure, which may differ as the fonts of two machines do.

    So only what has a strong colour counts, which points, lines and intervals have.
    """
    images = [np.asarray(Image.open(file).convert("RGB")) / 255 for file in (drawn, kept)]
    assert images[0].shape == images[1].shape
    strong = [(np.ptp(image, axis=-1) > 0.4).sum() for image in images]
    np.testing.assert_allclose(*strong, rtol=0.05)


@contextmanager
def refused(pattern: str = "", *, exactly: str | None = None, kind=UsageError) -> Iterator[None]:
    """Expects an error of one line, in which a regular expression is found, or which is a text."""
    with pytest.raises(kind) as refusal:
        yield
    message = str(refusal.value)
    # Not by `match`, which also sees the note that JAX adds to tracebacks.
    assert re.search(pattern, message), message
    assert exactly in (None, message)
    assert "\n" not in message


def fails(capsys, command, *argv, status: int = 2) -> str:
    """Returns the one line with which a command line ends in an error."""
    with pytest.raises(SystemExit) as exit_:
        command(list(argv))
    assert exit_.value.code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line
