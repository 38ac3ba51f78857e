"""AiM in JAX and Flax: a notebook for neural networks."""

from aim_flax.evaluate.interventions import intervene
from aim_flax.latch import AiM
from aim_flax.memory import Memory, fit
from aim_flax.models.build import build_model
from aim_flax.updates import MemoryUpdate
from aim_flax.use.predictor import Predictor

__version__ = "0.1.0"

__all__ = ["AiM", "Memory", "MemoryUpdate", "Predictor", "build_model", "fit", "intervene"]
