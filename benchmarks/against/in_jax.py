"""What the sides in JAX have in common: a compiled step, its state, and what XLA says of it."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from aim_flax.models.describe import multiply_adds


class Compiled:
    """A training step that was compiled once, and the state that it goes on from.

    Args:
      step: of (state, images, labels), returns the next state and the loss; the state is donated.
      state: at the start, arrays or their shapes.
      batch: images and labels.
    """

    def __init__(self, step: Callable, state: Any, batch: Sequence[np.ndarray]):
        self.state, self._batch = state, jax.device_put(tuple(batch))
        self._program = jax.jit(step, donate_argnums=0).lower(state, *self._batch).compile()

    def __call__(self) -> float:
        """Takes a step and returns its loss when all of it is done."""
        self.state, loss = self._program(self.state, *self._batch)
        jax.block_until_ready(self.state)
        return float(loss)

    def facts(self) -> dict[str, float]:
        """Returns the MiB that XLA asks for, and the bytes that its operations read and write."""
        memory = self._program.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        needed += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        moved = self._program.cost_analysis()["bytes accessed"]
        return {"program_mib": needed / 2**20, "bytes_moved": moved}


def forward_operations(forward: Callable, *arguments: Any) -> int:
    """Returns the multiply-adds of a forward pass."""
    return multiply_adds(jax.make_jaxpr(forward)(*arguments).jaxpr)


def versions(*packages: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in (*packages, "jax"))
