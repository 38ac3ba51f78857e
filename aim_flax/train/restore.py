"""Restores a run's network and weights from its workdir alone."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from aim_flax.models.build import build_model, trained
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import abstract_state
from aim_flax.train.workdir import read_config


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint of a run.

    Attributes:
      config: the run's.
      model: its network, as `build_model` returns it.
      variables: the network's variables, numpy arrays: `model.apply(variables, images)`.
      step: the number of steps after which it had these variables.
    """

    config: ConfigDict
    model: nn.Module
    variables: dict[str, Any]
    step: int


def restore_run(workdir: str | Path, checkpoint: str | int = "best") -> Restored:
    """Restores a checkpoint of a run.

    Args:
      workdir: of the run.
      checkpoint: "best" (by the accuracy on the split that selects), "latest" (the latest that
        can be read), or the step of one that was kept.

    Raises:
      UsageError: `workdir` holds no run, or no such checkpoint.
    """
    workdir = Path(workdir)
    config = read_config(workdir).lock()
    model = build_model(config)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    with contextlib.closing(checkpoints):
        variables, step = checkpoints.variables(checkpoint, abstract_state(config, trained(model)))
    return Restored(config, model, variables, step)
