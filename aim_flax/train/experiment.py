"""The parts of a run, built and checked from its config, and its compiled programs."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from aim_flax.config import flatten
from aim_flax.data.augment import check_options, roll_in_evaluation, rolls
from aim_flax.data.balance import BALANCES, class_weights
from aim_flax.data.dataset import Dataset, EvalBatches
from aim_flax.data.load import decode_if_small, open_dataset, with_classes
from aim_flax.data.scaling import scaling
from aim_flax.devices import AXIS, Devices
from aim_flax.errors import UsageError, check_choice
from aim_flax.evaluate.evaluation import Evaluation, build_evaluate
from aim_flax.evaluate.memory_use import memory_use
from aim_flax.models.build import (
    build_model,
    check_logits,
    field_names,
    network_class,
    plain,
    trained,
)
from aim_flax.models.pretrained import Pretrained, read_pretrained, start_from
from aim_flax.options import check_values
from aim_flax.sources import check_network
from aim_flax.train.anomaly import Probe, anomaly_names, find_probes
from aim_flax.train.optimizer import build_optimizer, build_schedule
from aim_flax.train.remat import check_remat, recomputing
from aim_flax.train.step import (
    TrainState,
    create_state,
    size_in_bytes,
    state_from,
    train_step,
    variables_of,
    with_variables,
)


class Experiment:
    """What a config describes, ready to be trained.

    Attributes:
      config: with the number of classes filled in.
      devices, model, dataset, train_batches, schedule, optimizer: the parts.
      epoch_steps, total_steps: steps in an epoch, and in all epochs.
      steps_per_call: most steps in one compiled call.
      abstract_state: shapes and dtypes of the training state.
      class_weights: see `train_step`.
      places: where a step looks for numbers that are not finite; None: nowhere.
    """

    def __init__(
        self,
        config: ConfigDict,
        device_count: int | None = None,
        dataset: Dataset | None = None,
        devices: Devices | None = None,
    ):
        """Builds the parts; nothing is compiled, written or put on a device yet.

        Args:
          config: the experiment.
          device_count: how many devices to use; None for all.
          dataset: that of an experiment with the same groups `data` and `eval`, to share it; None:
            the one that the config names is read.
          devices: others than the `device_count` of this machine.

        Raises:
          UsageError: the config, or a part of it, can't be run.
          DataError: an image of a dataset that is decoded at once can't be read.
        """
        check_values(flatten(config))
        check_network(config.model)
        check_choice("eval.select_on", config.eval.select_on, ("val", "test"))
        check_choice("train.balance", config.train.balance, BALANCES)
        self.devices = devices or Devices(config.parallel, device_count)
        batch_size = config.train.batch_size
        count, parts = self.devices.count, config.train.get("accumulate", 1)
        if batch_size % (count * parts):
            in_parts = "" if parts == 1 else f" in {parts} parts each (train.accumulate)"
            raise UsageError(
                f"train.batch_size is {batch_size}, which {count} devices cannot share"
                f" equally{in_parts}"
            )
        check_options(config.augment or {})
        dataset = dataset or open_dataset(config)
        self.config = config = with_classes(config, dataset.classes)
        self.model = build_model(config, axis_name=AXIS)
        # Finds a memory that doesn't fit the network before images are read, or files written.
        self._create = _create(config, self.model)
        self.abstract_state = self._create.eval_shape(seed=config.seed)
        self._check_statistics()
        self._check_memory()
        check_remat(self.model, tuple(config.data.image_shape), config.train.get("remat", ""))
        self.dataset = decode_if_small(dataset, config)
        examples = self.dataset.sizes["train"]
        if batch_size > examples:
            raise UsageError(
                f"train.batch_size is {batch_size}, but there are {examples} training examples"
            )
        # None where nothing is to be done: then nothing is drawn or traced for it.
        changes = {name: value for name, value in (config.augment or {}).items() if value}
        self.places = self._places() if config.train.get("detect_anomaly", False) else None
        self.train_batches = self.dataset.train_batches(
            self.devices,
            batch_size,
            scaling(config.data),
            changes or None,
            balanced=config.train.balance == "sampling",
        )
        self.class_weights = None
        if config.train.balance == "weights":
            labels = self.dataset.labels("train")
            self.class_weights = class_weights(labels, len(self.dataset.classes))
        self.epoch_steps = self.train_batches.epoch_steps
        self.total_steps = self.epoch_steps * config.train.epochs
        self.schedule = build_schedule(config, self.epoch_steps)
        self.optimizer = build_optimizer(config, self.schedule)
        most = self.train_batches.steps_per_call or config.train.steps_per_call
        self.steps_per_call = min(config.train.steps_per_call, most)
        self._programs: dict[tuple, Callable] = {}

    def _check_statistics(self) -> None:
        """Raises UsageError where devices would keep running statistics of their own images."""
        name = self.config.model.name
        if self.devices.count == 1 or "axis_name" in field_names(network_class(name)):
            return
        statistics = flatten_dict(self.abstract_state.model_state.get("batch_stats", {}))
        if any("memory_update" not in path for path in statistics):
            raise UsageError(
                f"{name} has batch statistics but no field axis_name, over which they would be"
                f" averaged on {self.devices.count} devices: give it one, or use --devices 1"
            )

    def _places(self) -> tuple[Probe, ...]:
        """Returns the places in the network that a training step comes to."""
        model = build_model(self.config)  # Without an axis of devices: none is there yet.
        state = self.abstract_state

        def run(variables: Any, images: jax.Array) -> Any:
            rngs = {name: jax.random.key(0) for name in ("dropout", "memory")}
            # Which calls the module that it recomputes in a way of its own.
            with recomputing(self.config.train.get("remat", "")):
                return model.apply(
                    variables, images, train=True, mutable=list(state.model_state), rngs=rngs
                )

        parts = self.devices.count * self.config.train.get("accumulate", 1)
        local = self.config.train.batch_size // parts
        images = jax.ShapeDtypeStruct((local, *self.config.data.image_shape), np.float32)
        return find_probes(run, variables_of(state), images)

    @functools.cached_property
    def anomaly_names(self) -> list[str]:
        """What the metric `anomaly` of a training step is an index of."""
        return anomaly_names(self.places, self.abstract_state.params)

    def _check_memory(self) -> None:
        """Raises UsageError if not even the training state fits into a device's memory."""
        size, most = size_in_bytes(self.abstract_state), self.devices.memory_bytes
        if most is not None and size > most:
            raise UsageError(
                f"the training state of this network takes {size / 1e9:,.1f} GB, and each of"
                f" {self.devices.count} devices has {most / 1e9:,.1f} GB: choose smaller sizes in"
                " model.* or memory.*"
            )

    def with_seed(self, seed: int) -> "Experiment":
        """Returns the same experiment with another seed; both share their compiled programs."""
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        with other.config.unlocked():
            other.config.seed = seed
        return other

    def program(self, key: tuple, build: Callable[[], Callable]) -> Callable:
        if key not in self._programs:
            self._programs[key] = build()
        return self._programs[key]

    def pretrained(self) -> Pretrained | None:
        """Reads the weights that training starts from; None: it starts from random ones.

        Raises:
          UsageError: they can't be had, or don't fit the network.
        """
        if self.config.model.get("pretrained") is None:
            return None
        alone = build_model(plain(self.config), axis_name=AXIS)
        return read_pretrained(
            self.config,
            abstract_variables(self.config, alone),
            variables_of(self.abstract_state),
        )

    def initial_state(self, pretrained: Pretrained | None = None) -> TrainState:
        """Returns the state at step 0, numpy arrays; `pretrained` is that of this config."""
        state = jax.tree.map(np.asarray, self._create(seed=self.config.seed))
        pretrained = pretrained or self.pretrained()
        if pretrained is None:
            return state
        # The optimisers' own state does not depend on the parameters' values.
        return with_variables(state, start_from(variables_of(state), pretrained))

    def train_call(self, length: int, together: bool = False) -> Callable:
        """Returns `length` steps, all within one epoch, as a program of all devices.

        (state, data, seed) -> (state, {loss, accuracy: (length,)}), where `data` is what
        `train_batches.feed` has for the first step, and the rest is replicated. The program reuses
        the memory of the state that goes in.

        Args:
          together: for several seeds at once: state, seed and metrics have a leading axis of seeds,
            and `data` comes from a feed of all of them.
        """

        def build() -> Callable:
            steps = self.steps_on_device(length)
            if together:
                steps = jax.vmap(steps, in_axes=(0, self.train_batches.seed_axes, 0))
            sharded = (1,) if self.train_batches.sharded else ()
            return self.devices.map(steps, donate=(0,), sharded=sharded)

        return self.program(("train", length, together), build)

    def step_shapes(self) -> tuple[Any, Any, Any]:
        """Returns the shapes and places of what `train_call` takes: (state, data, seed)."""
        place, batches = self.devices.abstract, self.train_batches
        seed = jax.ShapeDtypeStruct((), np.uint32)
        return place(self.abstract_state), place(batches.shapes(), batches.sharded), place(seed)

    def steps_on_device(self, length: int) -> Callable:
        """Returns what one device computes of `train_call`."""
        train = self.config.train

        def on_device(state, data, seed):
            batch = self.train_batches.on_device(data, seed, state.step)

            def body(state, _):
                images, labels = batch(state.step)
                return train_step(
                    self.model,
                    self.optimizer,
                    state,
                    images,
                    labels,
                    seed,
                    axis_name=AXIS,
                    class_weights=self.class_weights,
                    freeze=train.get("freeze", ""),
                    remat=train.get("remat", ""),
                    places=self.places,
                    accumulate=train.get("accumulate", 1),
                    # XLA on CPU computes convolutions in loops several times slower.
                    unroll=self.devices.platform == "cpu",
                    ema_decay=train.get("ema_decay"),
                )

            if length == 1:
                # No loop: XLA on CPU computes convolutions in loops several times slower.
                state, metrics = body(state, None)
                return state, jax.tree.map(lambda metric: metric[None], metrics)
            return jax.lax.scan(body, state, length=length)

        return on_device

    def evaluate(self, split: str, together: bool = False) -> Callable[..., list[Evaluation]]:
        """Returns (replicated variables, seed) -> [Evaluation of a split].

        With `together` variables have a leading axis of seeds, (seeds,) ints on the host, and there
        is one for each of them.
        """

        def build() -> Callable:
            batches, classes = self.eval_batches(split), len(self.dataset.classes)
            network = trained(self.model)
            evaluate = build_evaluate(network, self.devices, batches, classes, together)
            return evaluate if together else lambda *of_run: [evaluate(*of_run)]

        return self.program(("evaluate", split, together), build)

    def eval_batches(self, split: str) -> EvalBatches:
        """Returns the batches of a split, in its order."""
        return self.dataset.eval_batches(
            self.devices,
            split,
            self.config.eval.batch_size,
            scaling(self.config.data),
            rolls(self.config.augment),
        )

    def memory_probe(self, together: bool = False) -> Callable[..., dict[str, dict[str, Any]]]:
        """Returns (replicated variables, seed) -> the use of memory on the first selection batch.

        Numbers are arrays, () or, with `together`, (seeds,), as are the seeds on the host.
        """
        if self.config.memory is None:
            return lambda variables, seed: {}
        images = self.probe_images()
        indices = self.dataset.record_indices(self.config.eval.select_on)[: len(images)]
        roll, network = rolls(self.config.augment), trained(self.model)

        def use(variables, images, indices, seed):
            shown = roll_in_evaluation(images, seed, indices) if roll else images
            return memory_use(network, variables, shown)

        def build() -> Callable:
            of_all = jax.vmap(use, in_axes=(0, None, None, 0)) if together else use
            return self.devices.on_first(of_all)

        use_of = self.program(("probe", together), build)

        def probe(variables: Any, seed: int | np.ndarray) -> dict[str, dict[str, Any]]:
            found = use_of(variables, images, indices, np.asarray(seed, np.uint32))
            return jax.tree.map(np.asarray, found)

        return probe

    def probe_images(self) -> np.ndarray:
        """Returns the first selection batch, (at most eval.batch_size, H, W, C) float32, as the
        files have it."""
        split, count = self.config.eval.select_on, self.config.eval.batch_size
        return scaling(self.config.data)(self.dataset.first_images(split, count))


def abstract_state(config: ConfigDict, model: nn.Module) -> TrainState:
    """Returns the shapes and dtypes of the training state of a config's network."""
    return _create(config, model).eval_shape(seed=config.seed)


def abstract_variables(config: ConfigDict, model: nn.Module) -> dict[str, Any]:
    """Returns the shapes and dtypes of a network's variables, whatever of them is trained."""
    shape = tuple(config.data.image_shape)
    create = functools.partial(create_state, model, optax.identity(), image_shape=shape)
    return variables_of(jax.eval_shape(lambda: create(seed=config.seed)))


def abstract_state_from(config: ConfigDict, variables: Mapping[str, Any]) -> TrainState:
    """Returns the shapes and dtypes of the training state of a network with these variables."""
    create = functools.partial(state_from, **_state_options(config))
    return jax.eval_shape(lambda variables: create(variables), dict(variables))


def _create(config: ConfigDict, model: nn.Module) -> jax.stages.Wrapped:
    """Returns seed -> the training state at step 0, a program that is traced once."""
    create = functools.partial(
        create_state,
        model,
        image_shape=tuple(config.data.image_shape),
        check=functools.partial(
            check_logits, name=config.model.name, classes=config.model.num_classes
        ),
        **_state_options(config),
    )
    # It runs once, and on CPU optimising its many random draws takes longer than it saves.
    cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(create, compiler_options=options)


def _state_options(config: ConfigDict) -> dict[str, Any]:
    """Returns what a training state is made with, besides the network's variables."""
    # The state at step 0 does not depend on the schedule.
    optimizer = build_optimizer(config, optax.constant_schedule(0.0))
    return dict(optimizer=optimizer, averaged=config.train.get("ema_decay") is not None)
