"""The devices of a topology that isn't there, and training on them, for compiling only."""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from aim_flax.data.load import load_dataset
from aim_flax.data.unseen import unseen
from aim_flax.devices import Devices
from aim_flax.errors import UsageError
from aim_flax.train.chips import CHIPS, Topology
from aim_flax.train.experiment import Experiment

# libtpu would ask the network which TPU this machine is, take a lock that another process may hold,
# and write of its own.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


# What XLA must know of a GPU that isn't there, besides its memory.
_HOPPER = dict(core_count=132, fpus_per_core=128, shared_memory_per_core=233_472)
_HOPPER |= dict(shared_memory_per_block_optin=232_448, l2_cache_size=52_428_800)
_GPUS: dict[str, dict[str, float]] = {
    "a100": dict(
        core_count=108,
        fpus_per_core=64,
        shared_memory_per_core=167_936,
        shared_memory_per_block_optin=166_912,
        l2_cache_size=41_943_040,
        clock_rate_ghz=1.41,
        capability=8,
    ),
    "h100": dict(_HOPPER, clock_rate_ghz=1.98, capability=9),
    "h200": dict(_HOPPER, clock_rate_ghz=1.98, capability=9),
}


def absent_devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the devices of a topology, for which programs can be compiled.

    Raises:
      UsageError: the chip's compiler isn't installed.
    """
    if topology.chip.platform == "cuda":
        return _gpus(topology)
    _check_installed(topology, "tpu", ["libtpu"])
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.name.startswith("v4:"):
        # As on the real one: both cores of a chip are one device.
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(topology.name, "tpu", **options).devices


def _gpus(topology: Topology) -> Sequence[jax.Device]:
    # JAX's cuda13 is the newest; cuda12 is still to be had.
    _check_installed(topology, "cuda", ["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"])
    chip, own = topology.chip, dict(_GPUS[topology.name.partition(":")[0]])
    capability = own.pop("capability")
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # JAX's own
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # It would warn that there is no GPU.
    values = own | dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        threads_per_core_limit=2048,
        shared_memory_per_block=49_152,
        registers_per_core_limit=65_536,
        registers_per_block_limit=65_536,
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=65_535,
        block_dim_limit_z=65_535,
        memory_bandwidth=int(chip.bandwidth),
        device_memory_size=chip.memory,
    )
    described = " ".join(f"{name}: {value}" for name, value in values.items())
    # A text of XLA's GpuTargetConfigProto, stream_executor/device_description.proto.
    target = (
        f"gpu_device_info {{ {described} cuda_compute_capability {{ major: {capability} }} }}"
        ' platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
        f' runtime_version {{ major: 13 }} device_description_str: "{chip.kinds[0]}"'
    )
    shape = f"1x1x{topology.count}"  # slices, processes, devices of each
    return topologies.get_topology_desc("", "cuda", target_config=target, topology=shape).devices


def _check_installed(topology: Topology, extra: str, modules: Sequence[str]) -> None:
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module) is not None:
                return
    raise UsageError(
        f"compiling for {topology.name} needs {modules[0]}:"
        f" pip install -e '.[{extra}]' -c constraints.txt"
    )


def present_topology(devices: Sequence[jax.Device]) -> Topology | None:
    """Returns the topology of devices that are there; None: it is of no chip that is known."""
    kind = devices[0].device_kind
    chip = next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
    if chip is None:
        return None
    shape: tuple[int, ...] = (len(devices),)
    if chip.platform == "tpu":
        shape = tuple(len(set(axis)) for axis in zip(*(d.coords for d in devices), strict=True))
    return Topology("here", chip, shape)


def planned(config: ConfigDict, devices: Sequence[jax.Device]) -> Experiment:
    """Returns training on devices that need not be there, of images that need not be there.

    Digits are in memory; all else is streamed, from a dataset of unknown size. By shard_map, which
    equals pmap.

    Raises:
      UsageError: the config can't be run on so many devices.
    """
    config = copy.deepcopy(config)
    devices = Devices("shard_map", available=devices)
    with config.unlocked():
        config.parallel = "shard_map"
        if config.data.name != "digits":
            config.data.in_memory_mb = 0.0
    if config.data.name == "digits":
        dataset = load_dataset(config)
    else:
        shape, images = tuple(config.data.image_shape), 100 * config.train.batch_size
        dataset = unseen(shape, config.model.num_classes, images)
    return Experiment(config, dataset=dataset, devices=devices)
