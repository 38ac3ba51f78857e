"""Optimisers, learning-rate schedules, plateaus, early stopping, and the choice of the best epoch.

Plateaus and early stopping are pure functions of the validation accuracies so far, with the
semantics of the Keras callbacks ReduceLROnPlateau and EarlyStopping in mode "max" (keras.io).
A run's history is in its checkpoints, so there is no other state to save.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import optax
from ml_collections import ConfigDict

from aim_flax.errors import UsageError, check_choice
from aim_flax.train.freeze import freezing, rescaling

SCHEDULES = ("constant", "cosine")
# Epochs over which a rate that was scaled with the batch warms up.
_SCALING_WARMUP = 5
# Those whose rates don't depend on the number of epochs, so that a run can have more of them later.
OPEN_ENDED = ("constant",)
OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "sgd": optax.sgd}


def build_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns step -> learning rate: a linear warm-up, then constant or cosine to 0.

    The warm-up is from 0 over `schedule.warmup_epochs`. With a `schedule.reference_batch` the rate
    is scaled linearly with the batch; and where it grows and no warm-up is set, it rises over the
    first 5 epochs from what it is for the reference (P. Goyal et al., "Accurate, Large Minibatch
    SGD: Training ImageNet in 1 Hour", 2017, sections 2.1 and 2.2).

    Raises:
      UsageError: an unknown schedule, or a warm-up as long as the training.
    """
    schedule, start = config.schedule, 0.0
    check_choice("schedule.name", schedule.name, SCHEDULES)
    peak, epochs = config.optimizer.learning_rate, schedule.warmup_epochs
    total = config.train.epochs * steps_per_epoch
    if (reference := schedule.get("reference_batch")) is not None:
        factor = config.train.batch_size / reference
        if factor > 1 and not epochs:
            start, epochs = peak, _SCALING_WARMUP
            if epochs >= config.train.epochs:
                raise UsageError(
                    f"train.epochs is {config.train.epochs}, expected more than {epochs}, over"
                    " which schedule.reference_batch warms up; or set schedule.warmup_epochs"
                )
        peak *= factor
    warmup = round(epochs * steps_per_epoch)
    if not 0 <= warmup < total:
        raise UsageError(
            f"schedule.warmup_epochs is {schedule.warmup_epochs}, expected at least 0 and less"
            f" than train.epochs ({config.train.epochs})"
        )
    if schedule.name == "constant":
        rest = optax.constant_schedule(peak)
    else:
        rest = optax.cosine_decay_schedule(peak, total - warmup)
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(start, peak, warmup), rest], [warmup])


def build_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optax optimiser of `config.optimizer`; a key that is None is left to optax.

    Its changes to the parameters of the memory itself, weight decay included, are multiplied by
    `config.memory.learning_rate_scale`: 0 freezes the memory, while reads and updates still learn.
    Parts of the network have rates of their own by `config.train.rates`, or none by
    `config.train.freeze`: see `freeze.py`.

    Raises:
      UsageError: an unknown optimiser, an option that this one does not take, or a negative scale;
        what `rescaling` and `freezing` raise.
    """
    options = {k: v for k, v in config.optimizer.items() if v is not None}
    name = options.pop("name")
    check_choice("optimizer.name", name, OPTIMIZERS)
    build = OPTIMIZERS[name]
    for option in options:
        if option not in inspect.signature(build).parameters:
            raise UsageError(f"optimizer.{option} is set, but {name} takes no {option}")
    optimizer = build(**(options | {"learning_rate": schedule}))
    memory = config.get("memory") or {}
    scale = memory.get("learning_rate_scale", 1.0)
    if not isinstance(scale, Real) or not 0 <= scale < math.inf:
        raise UsageError(
            f"memory.learning_rate_scale is {scale!r}, expected a number of at least 0"
        )
    if scale != 1:
        optimizer = optax.chain(optimizer, optax.masked(optax.scale(scale), _of_memory))
    if rates := config.train.get("rates", ()):
        optimizer = optax.chain(optimizer, rescaling(rates))
    if pattern := config.train.get("freeze", ""):
        optimizer = freezing(optimizer, pattern, memory.get("zero_init", False))
    return optimizer


def _of_memory(params: Mapping[str, Any]) -> dict[str, bool]:
    """Returns which of a network's top-level names are memories."""
    return {name: name in ("memory", "memory_initial") for name in params}


def plateau_cuts(accuracies: Sequence[float], patience: int, min_delta: float = 1e-4) -> list[int]:
    """Returns the epochs, from 1, after which ReduceLROnPlateau cuts the learning rate.

    Args:
      accuracies: validation accuracy after each epoch.
      patience: epochs without a gain of more than `min_delta` over the best that cause a cut.
    """
    cuts, best, waited = [], -math.inf, 0
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy > best + min_delta:
            best, waited = accuracy, 0
            continue
        waited += 1
        if waited >= patience:
            cuts.append(epoch)
            waited = 0
    return cuts


def best_epoch(accuracies: Sequence[float], min_delta: float = 0.0) -> int:
    """Returns the epoch, from 1, whose weights EarlyStopping restores: the last gain of more than
    `min_delta` over the best before it."""
    best, best_accuracy = 0, -math.inf
    for epoch, accuracy in enumerate(accuracies, start=1):
        if accuracy > best_accuracy + min_delta:
            best, best_accuracy = epoch, accuracy
    return best


def select_epoch(accuracies: Sequence[float], losses: Sequence[float]) -> int:
    """Returns the epoch, from 1, of the highest accuracy; among equal ones, of the lowest loss.

    On few validation examples many epochs share an accuracy, and the first of them often comes
    before much training.
    """
    ranks = [(accuracy, -loss) for accuracy, loss in zip(accuracies, losses, strict=True)]
    return ranks.index(max(ranks)) + 1


def should_stop(accuracies: Sequence[float], patience: int, min_delta: float = 0.0) -> bool:
    """Returns whether EarlyStopping ends the run after these epochs."""
    return len(accuracies) - best_epoch(accuracies, min_delta) >= patience
