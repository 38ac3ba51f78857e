"""Compiles a config's training step for topologies, and tells what it costs on each."""

import copy

import jax
from ml_collections import ConfigDict

from aim_flax.data.load import open_dataset, with_classes
from aim_flax.errors import UsageError
from aim_flax.train.chips import Topology, topology
from aim_flax.train.cost_report import Bounds, bounds, report, scaling
from aim_flax.train.costs import TooLargeError, measure
from aim_flax.train.experiment import Experiment
from aim_flax.train.topologies import absent_devices, planned, present_topology

HERE = "here"


def compile_for(config: ConfigDict, names: str, images_per_chip: int | None = None) -> None:
    """Prints what a training step of a config costs on each of several topologies.

    Args:
      names: of the topologies, with commas between them; "here": the devices of this machine.
      images_per_chip: images of each chip in a step, however many chips there are; None: they share
        `train.batch_size`.

    Raises:
      UsageError: before anything is compiled: no such topology, a compiler that isn't installed, a
        batch that its chips can't share, or a config that can't be run.
    """
    places = {name: None if name == HERE else topology(name) for name in names.split(",")}
    if images_per_chip is not None and images_per_chip < 1:
        raise UsageError(f"--images-per-chip is {images_per_chip}, expected at least 1")
    if HERE not in places:
        # The backend of a TPU that isn't there would be looked for, and that of a GPU would fail.
        jax.config.update("jax_platforms", "cpu")
    config = _with_classes(config)
    jobs = {}
    for name, place in places.items():
        devices = jax.devices() if place is None else absent_devices(place)
        jobs[name] = planned(_sized(config, name, len(devices), images_per_chip), devices)
        places[name] = place or present_topology(devices)

    shape = "x".join(map(str, config.data.image_shape))
    print(f"{config.name}:{config.arm}, images {shape}, {config.dtype}, a training step by XLA")
    found = {}
    for name, experiment in jobs.items():
        if (place_bounds := _tell(name, experiment, places[name])) is not None:
            count, batch_size = experiment.devices.count, experiment.config.train.batch_size
            found[name] = (count, batch_size, place_bounds)
    if len(found) > 1:
        kind = "weak scaling, as many images on each chip" if images_per_chip else "strong scaling"
        print(f"\n{kind}, at those bounds:\n{scaling(found)}")


def _with_classes(config: ConfigDict) -> ConfigDict:
    """Returns the config with its number of classes, if need be that of the images."""
    if config.model.num_classes is not None:
        return config
    try:
        return with_classes(config, open_dataset(config).classes)
    except UsageError as error:
        raise UsageError(
            f"{error}; without the images, --config.model.num_classes=N says how many classes"
        ) from None


def _sized(config: ConfigDict, name: str, count: int, images_per_chip: int | None) -> ConfigDict:
    """Returns the config with the batch of so many chips."""
    if images_per_chip is not None:
        config = copy.deepcopy(config)
        with config.unlocked():
            config.train.batch_size = images_per_chip * count
    elif config.train.batch_size % count:
        raise UsageError(
            f"train.batch_size is {config.train.batch_size}, which the {count} chips of {name}"
            " cannot share equally; --images-per-chip=N gives each of them N"
        )
    return config


def _tell(name: str, experiment: Experiment, place: Topology | None) -> Bounds | None:
    """Compiles for a topology, and prints what it costs; returns its bounds, if there are any, and
    the step fits."""
    count, batch_size = experiment.devices.count, experiment.config.train.batch_size
    print(f"\n{name}: {count} x {experiment.devices.model}, {batch_size // count} of", end=" ")
    print(f"{batch_size:,} images on each", flush=True)
    try:
        costs = measure(experiment)
    except TooLargeError as error:
        print(f"  does not fit: {error}; fewer images on each chip need less", flush=True)
        return None
    memory = place.chip.memory if place else experiment.devices.memory()
    print(report(costs, batch_size, count, place, memory))
    print(f"  compiled in {costs.seconds:.0f} s", flush=True)
    fits = memory is None or costs.peak <= memory
    return bounds(costs, place) if place and fits else None
