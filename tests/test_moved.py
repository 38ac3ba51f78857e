"""docs/moved.py: how far kernels ended from where they started, with their low-rank changes."""

import runpy

import numpy as np

from tests.runs import ROOT

SCRIPT = runpy.run_path(str(ROOT / "docs" / "moved.py"))


def test_a_change_counts_as_part_of_its_kernel():
    start = np.zeros((1, 1, 2, 2))
    down, up = np.array([[[[1.0], [2.0]]]]), np.array([[3.0, 4.0]])
    changed = {
        "a/kernel": start + np.array([[1.0, 0.0], [0.0, 0.0]]),
        "a/low_rank/down/kernel": down,
        "a/low_rank/up/kernel": up,
        "b/kernel": start + 7,
    }
    plain = {"a/kernel": start + 2, "b/kernel": start}
    # 1 + 3, 4, 6 and 8 in the four places; `b` has no change.
    expected = {"a": (4.0, (16 + 16 + 36 + 64) ** 0.5)}
    found = SCRIPT["distances"]({"a/kernel": start, "b/kernel": start}, plain, changed)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(found["a"], expected["a"], rtol=1e-12)
