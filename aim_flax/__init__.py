"""AiM in JAX and Flax: a notebook for neural networks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aim_flax.evaluate.interventions import intervene
    from aim_flax.instead import Instead
    from aim_flax.latch import AiM
    from aim_flax.memory import Memory, fit
    from aim_flax.models.build import build_model
    from aim_flax.updates import MemoryUpdate
    from aim_flax.use.predictor import Predictor

__version__ = "0.1.0"

__all__ = [
    "AiM",
    "Instead",
    "Memory",
    "MemoryUpdate",
    "Predictor",
    "build_model",
    "fit",
    "intervene",
]

# Imported when they are asked for: a command says what is wrong with its flags, and ends on Ctrl-C,
# without the seconds that JAX takes.
_HOMES = {
    "AiM": "latch",
    "Instead": "instead",
    "Memory": "memory",
    "MemoryUpdate": "updates",
    "Predictor": "use.predictor",
    "build_model": "models.build",
    "fit": "memory",
    "intervene": "evaluate.interventions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
