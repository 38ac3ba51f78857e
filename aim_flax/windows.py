"""The windows of adaptive average pooling."""

import numpy as np


def window_means(size: int, out: int) -> np.ndarray:
    """Returns the (out, size) matrix that averages each window.

    Window i of `out` is from floor(i·size / out) to ceil((i + 1)·size / out): windows overlap, and
    repeat where `size` is the smaller.
    """
    matrix = np.zeros((out, size))
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
