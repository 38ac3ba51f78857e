"""AiM in JAX and Flax: a notebook for neural networks."""

from aim_flax.build import build_model
from aim_flax.interventions import intervene
from aim_flax.latch import AiM
from aim_flax.memory import Memory, MemoryUpdate, fit

__all__ = ["AiM", "Memory", "MemoryUpdate", "build_model", "fit", "intervene"]
