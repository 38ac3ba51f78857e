"""The parts of a run, built and checked from its config, and its compiled programs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_flax.build import build_model
from aim_flax.config import flatten
from aim_flax.data.augment import augment, check_options
from aim_flax.data.in_memory import epoch_order, gather, steps_per_epoch
from aim_flax.data.load import load_dataset
from aim_flax.errors import UsageError, check_choice
from aim_flax.evaluation import Evaluation, build_evaluate, memory_use
from aim_flax.parallel import AXIS, Devices
from aim_flax.schedules import build_optimizer, build_schedule
from aim_flax.steps import TrainState, augment_key, create_state, data_key, train_step


class Experiment:
    """What a config describes, ready to be trained.

    Attributes:
      config, devices, model, dataset, schedule, optimizer: the parts.
      epoch_steps, total_steps: steps in an epoch, and in all epochs.
      abstract_state: shapes and dtypes of the training state.
    """

    def __init__(self, config: ConfigDict, device_count: int | None = None):
        """Builds the parts; nothing is compiled, written or put on a device yet.

        Raises:
          UsageError: the config, or a part of it, can't be run.
        """
        self.config = config
        _check_positive(
            config, "train.batch_size", "train.epochs", "train.steps_per_call", "eval.batch_size"
        )
        check_choice("eval.select_on", config.eval.select_on, ("val", "test"))
        self.devices = Devices(config.parallel, device_count)
        batch_size = config.train.batch_size
        if batch_size % self.devices.count:
            raise UsageError(
                f"train.batch_size is {batch_size}, which {self.devices.count} devices cannot"
                " share equally"
            )
        check_options(config.augment or {})
        self.model = build_model(config, axis_name=AXIS)
        self.dataset = load_dataset(config)
        examples = len(self.dataset.splits["train"])
        if batch_size > examples:
            raise UsageError(
                f"train.batch_size is {batch_size}, but there are {examples} training examples"
            )
        self.epoch_steps = steps_per_epoch(examples, batch_size)
        self.total_steps = self.epoch_steps * config.train.epochs
        self.schedule = build_schedule(config, self.epoch_steps)
        self.optimizer = build_optimizer(config, self.schedule)
        # Finds a memory that doesn't fit the network before any file is touched.
        self.abstract_state: TrainState = jax.eval_shape(self._create, config.seed)

    def _create(self, seed: jax.Array | int) -> TrainState:
        image_shape = tuple(self.config.data.image_shape)
        return create_state(self.model, self.optimizer, seed, image_shape)

    def initial_state(self) -> TrainState:
        """Returns the state at step 0, numpy arrays."""
        # It runs once, and on CPU optimising its many random draws takes longer than that saves.
        cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if cpu else None
        create = jax.jit(self._create, compiler_options=options)
        return jax.tree.map(np.asarray, create(self.config.seed))

    def replicated_split(self, name: str) -> Any:
        """Returns images and labels of a split on every device."""
        split = self.dataset.splits[name]
        return self.devices.replicate((split.images, split.labels))

    def train_call(self, length: int) -> Callable:
        """Returns `length` steps, all within one epoch, as a program of all devices.

        (state, training split, seed) -> (state, {loss, accuracy: (length,)}), all replicated.
        The state that goes in is given up.
        """
        batch_size = self.config.train.batch_size
        local = batch_size // self.devices.count
        num_examples, scale = len(self.dataset.splits["train"]), self.config.data.scale
        augmentation = self.config.augment and self.config.augment.to_dict()

        def on_device(state, split, seed):
            epoch = state.step // self.epoch_steps
            order = epoch_order(data_key(seed), epoch, num_examples)
            rank = jax.lax.axis_index(AXIS)

            def body(state, _):
                first = rank * local
                start = state.step % self.epoch_steps * batch_size + first
                indices = jax.lax.dynamic_slice_in_dim(order, start, local)
                images, labels = gather(split, indices, scale)
                if augmentation is not None:
                    images = augment(images, augment_key(seed, state.step), first, augmentation)
                return train_step(
                    self.model, self.optimizer, state, images, labels, seed, axis_name=AXIS
                )

            if length == 1:
                # No loop: XLA on CPU computes convolutions in loops several times slower.
                state, metrics = body(state, None)
                return state, jax.tree.map(lambda metric: metric[None], metrics)
            return jax.lax.scan(body, state, length=length)

        return self.devices.map(on_device, donate=(0,))

    def evaluate(self, split: str) -> Callable[[Any], Evaluation]:
        """Returns replicated variables -> Evaluation of a split."""
        return build_evaluate(
            self.model,
            self.devices,
            self.replicated_split(split),
            self.config.eval.batch_size,
            len(self.dataset.splits[split]),
            len(self.dataset.classes),
            self.config.data.scale,
        )

    def memory_probe(self) -> Callable[[Any], dict[str, dict[str, float]]]:
        """Returns replicated variables -> the use of memory on the first selection batch."""
        if self.config.memory is None:
            return lambda variables: {}
        images = self.dataset.splits[self.config.eval.select_on].images
        images = images[: self.config.eval.batch_size].astype(np.float32) / self.config.data.scale
        use = jax.jit(partial(memory_use, self.model))
        return lambda variables: jax.tree.map(float, use(self.devices.local(variables), images))


def _check_positive(config: ConfigDict, *keys: str) -> None:
    values = flatten(config)
    for key in keys:
        if values[key] < 1:
            raise UsageError(f"{key} is {values[key]}, expected at least 1")
