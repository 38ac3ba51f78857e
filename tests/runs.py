"""Runs of a small network on digits: their configs, and what they leave."""

import contextlib
import csv
import dataclasses
import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from aim_flax import config as configs
from aim_flax import files
from aim_flax.train import dataset_record
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.progress import Progress
from aim_flax.train.restore import restore_run
from aim_flax.train.workdir import claimed
from tests.arrays import random_variables
from tests.asserts import assert_equal

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits_mlp.py")
SMALL = ("model.features=(16,16)", "memory.shape=(8,)", "memory.update_block.features=(4,)")
TIMINGS = ("train_seconds", "examples_per_second", "data_wait_share")


def arms() -> list[str]:
    """Returns file:arm for every arm of every config."""
    files = sorted(file for file in (ROOT / "configs").glob("*.py") if file.stem != "base")
    return [f"{file.stem}:{arm}" for file in files for arm in configs.arms(str(file))]


def load(name: str, assignments: Sequence[str] = ()) -> ConfigDict:
    """Returns the config of file:arm, with changes."""
    file, _, arm = name.partition(":")
    return configs.override(configs.load(f"{ROOT / 'configs' / file}.py:{arm}"), assignments)


def from_before(config: ConfigDict) -> dict:
    """Returns a config as it was saved before every config had every key."""
    saved = json.loads(configs.to_json(config))
    for key, value in configs.flatten(saved).items():
        group, dot, name = key.rpartition(".")
        lacking = group.startswith(
            ("data", "augment", "model", "memory", "instead", "optimizer", "train")
        )
        if lacking and value == configs.LEFT_OUT.get(key):
            part = saved
            for word in group.split("."):
                part = part[word]
            del part[name]
    saved["augment"] = saved["augment"] or None
    return saved


def write_run(
    config: ConfigDict,
    workdir: Path,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, array: array,
) -> None:
    """Makes a run with random weights, untrained: what training leaves of it, in a second.

    Args:
      change: from a parameter's path and random numbers to its numbers.
    """
    experiment = Experiment(config, 1)
    like = experiment.abstract_state
    images = np.zeros((1, *config.data.image_shape), np.float32)
    variables = random_variables(experiment.model, images)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    collections = {name: variables[name] for name in like.model_state}
    params = jax.tree_util.tree_map_with_path(
        lambda path, array: change(jax.tree_util.keystr(path), array), variables["params"]
    )
    state = zeros.replace(params=params, model_state=collections)
    with claimed(workdir, experiment.config):
        dataset_record.write(workdir, experiment.dataset.fingerprint, experiment.epoch_steps)
        with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
            checkpoints.save(0, dataclasses.asdict(Progress(best_step=0)), state)


def write_own_network(folder: Path) -> int:
    """Writes the files of README's network from elsewhere; returns their number of lines."""
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", text, re.DOTALL)
    for name, content in files:
        (folder / name).write_text(content)
    return sum(bool(line) for _, content in files for line in content.splitlines())


def flags(*assignments: str) -> list[str]:
    """Returns them as flags of a command line."""
    return [f"--config.{assignment}" for assignment in assignments]


def digits(arm: str = "aim", *assignments: str) -> ConfigDict:
    """A network small enough for tests to compile quickly; steps as in the real one."""
    small = SMALL if arm != "control" else SMALL[:1]
    return configs.override(configs.load(f"{DIGITS}:{arm}"), [*small, *assignments])


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def read_json(file: Path) -> dict:
    return files.read_json(file)


def history(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the columns of a run's metrics.csv."""
    rows = read_csv(workdir / "metrics.csv")
    return {column: np.array([float(row[column]) for row in rows]) for column in rows[0]}


def scalars(workdir, tag):
    """Returns {step: value} of a tag in a run's TensorBoard events."""
    (file,) = (workdir / "tensorboard").iterdir()
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        # A record is its size in 8 bytes, 4 of checksum, itself, 4 of checksum.
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found.update((event.step, v.simple_value) for v in event.summary.value if v.tag == tag)
        at += size + 16
    return found


def snapshot(folder: Path) -> dict[Path, int]:
    """Returns what is in a folder, and when it was changed."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs ended bit for bit alike, timings aside."""
    summaries = [read_json(run / "summary.json") for run in (one, other)]
    for summary in summaries:
        for key in TIMINGS:
            del summary[key]
    assert summaries[0] == summaries[1]
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    for checkpoint in ("best", "latest"):
        assert_equal(*(restore_run(run, checkpoint).variables for run in (one, other)))


def first_steps(config: ConfigDict, device_count: int, steps: int):
    """Returns the losses of a run's first steps, its state before them, and that after them."""
    experiment = Experiment(config, device_count)
    devices, epoch_steps = experiment.devices, experiment.epoch_steps
    before = experiment.initial_state()
    state, seed = devices.replicate(before), devices.replicate(np.uint32(config.seed))
    feed = experiment.train_batches.feed(config.seed, 0, steps)
    losses = []
    while len(losses) < steps:
        length = min(steps - len(losses), epoch_steps - len(losses) % epoch_steps)
        data = feed.at(len(losses))
        state, metrics = experiment.train_call(length)(state, data, seed)
        losses += devices.fetch(metrics)["loss"].tolist()
    return losses, before, devices.fetch(state)
