"""Weights of the published Keras network as Flax variables.

    python -m aim_flax.cli.keras_import weights.h5 --workdir runs/imported

makes a run of them, at step 0, that eval.py can evaluate and train.py continue.
"""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.console import CommandParser, as_command, folder, parse_with_overrides
from aim_flax.errors import UsageError
from aim_flax.models.build import build_model
from aim_flax.models.keras_files import read_keras_hdf5
from aim_flax.models.keras_weights import variables_from_keras
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import abstract_state
from aim_flax.train.progress import Progress
from aim_flax.train.step import trained_variables, with_variables
from aim_flax.train.workdir import claimed


def import_weights(path: str | PathLike, config: ConfigDict, workdir: str | PathLike) -> ConfigDict:
    """Makes a run, at step 0, from the weights in a Keras HDF5 file, and returns its config.

    Args:
      config: of the arm `published`. The number of classes and the memory's channels are set to
        what the weights show; image size and the memory's rows and columns must fit the weights.
      workdir: must hold no checkpoints yet.

    Raises:
      UsageError: the file, its weights, or the config do not fit; nothing is written.
    """
    weights = read_keras_hdf5(path)
    # Layers whose biases show the number of classes and of the memory's channels.
    sized_by = ("fc1000", "mem_init")
    classes, channels = (np.shape(weights.get(name, {}).get("bias")) for name in sized_by)
    changes = []
    if len(classes) == 1:
        changes.append(f"model.num_classes={classes[0]}")
    if len(channels) == 1 and config.memory is not None:
        changes.append(f"memory.shape={(*config.memory.shape[:2], *channels)}")
    config = configs.override(config, changes)
    expected = abstract_state(config, build_model(config))
    variables = variables_from_keras(
        weights,
        trained_variables(expected),
        hint=f" with images {tuple(config.data.image_shape)} and a memory"
        f" {config.memory and tuple(config.memory.shape)}: set --config.data.image_shape or"
        " --config.memory.shape to those of the training",
    )
    workdir = Path(workdir)
    if (workdir / "checkpoints").exists():
        raise UsageError(f"{workdir} holds a run already; choose another --workdir")
    with claimed(workdir, config):
        # Zeros, as the optimisers start out.
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), expected)
        state = with_variables(state, variables)
        state = state.replace(learning_rate_scale=np.ones((), np.float32))
        checkpoints = Checkpoints(workdir / "checkpoints")
        checkpoints.save(0, dataclasses.asdict(Progress(best_step=0)), state)
        checkpoints.close()
    return config


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.keras_import",
        description="Makes a run from the weights of a published Keras AiM-ResNet50.",
        allow_abbrev=False,
    )
    parser.add_argument("weights", help="an HDF5 file that Keras wrote")
    parser.add_argument("--workdir", type=folder, required=True, help="of the new run")
    parser.add_argument(
        "--config",
        default="stanford_dogs_resnet50:published",
        metavar="FILE[:ARM]",
        help="default: %(default)s",
    )
    args, assignments = parse_with_overrides(parser, argv)
    config = configs.override(configs.load(args.config), assignments)
    config = import_weights(args.weights, config, args.workdir)
    print(f"{args.workdir}: weights of {args.weights}, {config.model.num_classes} classes")


if __name__ == "__main__":
    main()
