"""Weights of the published Keras network as Flax variables.

Source of the layer names: J. Lunkad's published AiM-ResNet50. `res<stage><block>_branch2a/2b/2c`
are a block's convolutions, `_branch1` its shortcut, with stages from 2 to 5 and blocks from a;
`mem_conv<stage>a_branch_a/b/c` and `Memory<stage>a_branch` are an update block, `mem_init` is the
memory that is updated and `mem_global` the one that is not.

    python -m aim_flax.cli.keras_import weights.h5 --workdir runs/imported

makes a run of them, at step 0, that eval.py evaluates and train.py goes on with.
"""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.console import CommandParser, parse_with_overrides, run_reporting_errors
from aim_flax.errors import UsageError
from aim_flax.models.build import build_model
from aim_flax.models.keras_weights import form, read_keras_hdf5, variables_from_keras
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import abstract_state
from aim_flax.train.progress import Progress
from aim_flax.train.workdir import claim


def import_weights(path: str | PathLike, config: ConfigDict, workdir: str | PathLike) -> ConfigDict:
    """Makes a run, at step 0, of the weights in a Keras HDF5 file.

    Args:
      path: see `read_keras_hdf5`.
      config: of the arm `published`; the number of classes and the memory's channels are set to
        what the weights show, image size and the memory's rows and columns must fit them.
      workdir: of the run; must hold no checkpoints yet.

    Returns:
      The run's config.

    Raises:
      UsageError: the file, its weights, or the config do not fit; nothing is written.
    """
    variables = variables_from_keras(read_keras_hdf5(path))
    classes = variables["params"]["head"]["bias"].shape[0]
    channels = variables["params"]["memory"]["conv"]["bias"].shape[0]
    shape = (*config.memory.shape[:2], channels)
    changes = [f"model.num_classes={classes}", f"memory.shape={shape}"]
    config = configs.override(config, changes)
    image_shape = tuple(config.data.image_shape)
    expected = abstract_state(config, build_model(config))
    imported = traverse_util.flatten_dict(variables["params"])
    for place, leaf in traverse_util.flatten_dict(expected.params).items():
        found = imported.get(place)
        if found is None or found.shape != leaf.shape:
            what = "is not among the weights" if found is None else f"is {form(found.shape)} there"
            raise UsageError(
                f"{'/'.join(place)} {what}, but {form(leaf.shape)} with images"
                f" {form(image_shape)} and a memory {form(shape)}: set --config.data.image_shape"
                " or --config.memory.shape to those of the training"
            )
    workdir = Path(workdir)
    if (workdir / "checkpoints").exists():
        raise UsageError(f"{workdir} holds a run already; choose another --workdir")
    claim(workdir, config)
    # Zeros, as the optimisers start out.
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), expected)
    state = state.replace(
        params=variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        learning_rate_scale=np.ones((), np.float32),
    )
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, state, dataclasses.asdict(Progress(best_step=0)))
    checkpoints.close()
    return config


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.keras_import",
        description="Makes a run of the weights of a published Keras AiM-ResNet50.",
        allow_abbrev=False,
    )
    parser.add_argument("weights", help="an HDF5 file that Keras wrote")
    parser.add_argument("--workdir", required=True, help="of the new run")
    parser.add_argument(
        "--config",
        default="configs/stanford_dogs_resnet50.py:published",
        metavar="FILE[:ARM]",
        help="default: %(default)s",
    )
    args, assignments = parse_with_overrides(parser, argv)

    def work() -> None:
        config = configs.override(configs.load(args.config), assignments)
        config = import_weights(args.weights, config, args.workdir)
        print(f"{args.workdir}: weights of {args.weights}, {config.model.num_classes} classes")

    run_reporting_errors(work)


if __name__ == "__main__":
    main()
