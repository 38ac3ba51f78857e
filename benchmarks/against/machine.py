"""What the machine can do: the sides that bound all others."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SIDE = 2048
COPIED = 1 << 28  # bytes, far more than caches hold


class Products:
    """A product of two float32 matrices by NumPy's BLAS on all cores."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self._a, self._b = (rng.standard_normal((SIDE, SIDE), np.float32) for _ in range(2))
        self._out = np.empty_like(self._a)

    def counts(self) -> list[int]:
        return [0, 0]

    def outputs(self) -> dict[str, list[float]]:
        return {}

    def step(self) -> None:
        np.matmul(self._a, self._b, out=self._out)

    def facts(self) -> dict[str, Any]:
        return {"operations": 2 * SIDE**3, "versions": f"numpy {np.__version__}"}


class Copies:
    """A copy of an array, a part of it by each core."""

    def __init__(self):
        self._from = np.ones(COPIED // 4, np.float32)
        self._to = np.ones_like(self._from)
        cores = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(cores)
        self._parts = list(
            zip(np.array_split(self._to, cores), np.array_split(self._from, cores), strict=True)
        )

    def counts(self) -> list[int]:
        return [0, 0]

    def outputs(self) -> dict[str, list[float]]:
        return {}

    def step(self) -> None:
        list(self._pool.map(lambda part: np.copyto(*part), self._parts))

    def facts(self) -> dict[str, Any]:
        # Each byte is read once and written once.
        return {"bytes_moved": 2 * COPIED, "versions": f"numpy {np.__version__}"}
