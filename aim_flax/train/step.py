"""What one device computes: the training step and its state.

Everything is pure: a step depends on its state, its batch, and keys that are folded from the
run's seed and the step's number, so a run can continue from its state alone. With an
`axis_name`, gradients and metrics are averaged over the devices of that axis.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from aim_flax.keys import dropout_key, init_key, memory_key
from aim_flax.train.anomaly import Probe, first_anomaly, probing
from aim_flax.train.freeze import frozen_norms
from aim_flax.train.remat import recomputing


class TrainState(struct.PyTreeNode):
    """All that a run needs to continue.

    Attributes:
      step: () int32, the number of steps taken.
      params: the network's parameters, those of its memory among them.
      model_state: the other collections: `batch_stats`, and `memory` where it is carried.
      opt_state: the optimiser's.
      learning_rate_scale: () float32, the factor by which plateaus have cut the learning rate.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    learning_rate_scale: jax.Array


class AveragedState(TrainState):
    """That of a run with `train.ema_decay`.

    Not a field that may be None: orbax would miss it in the checkpoints of earlier versions.

    Attributes:
      average: the moving average of the network's variables, see `moved_average`.
    """

    average: Any


def variables_of(state: TrainState) -> dict[str, Any]:
    """Returns the variables of the network that is evaluated and kept, as `model.apply` takes them:
    their moving average, where there is one."""
    return state.average if isinstance(state, AveragedState) else trained_variables(state)


def size_in_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, or of their shapes and dtypes."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def trained_variables(state: TrainState) -> dict[str, Any]:
    """Returns the variables of the network that is trained."""
    return {"params": state.params, **state.model_state}


def with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """Returns a state before the first step with other variables."""
    model_state = {name: variables[name] for name in state.model_state}
    state = state.replace(params=variables["params"], model_state=model_state)
    return state.replace(average=variables) if isinstance(state, AveragedState) else state


def moved_average(average: Any, variables: Any, decay: float, step: jax.Array) -> Any:
    """Returns the exponential moving average of a network's variables after a step.

    Batch statistics and a carried memory are averaged as the parameters are, for they belong to
    them: those of the last step are of a network that is further on. So do timm's `ModelEmaV3` and
    the published training code of EfficientNet. The decay starts lower, as of TensorFlow's
    `ExponentialMovingAverage` with `num_updates`: min(decay, (1 + step) / (10 + step)), so that the
    random values at the start are soon forgotten.

    Args:
      average, variables: trees of the same structure; what is no float is taken as it is.
      step: () int32, the number of steps taken, this one included.
    """
    step = step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        # Not optax.incremental_update, whose rounding would move what is frozen.
        return old + rate.astype(new.dtype) * (new - old)

    return jax.tree.map(moved, average, variables)


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: jax.Array | int,
    image_shape: tuple[int, ...],
    averaged: bool = False,
    check: Callable[[Any], None] = lambda output: None,
) -> TrainState:
    """Returns the state at step 0 for images (B, *image_shape), with a moving average if asked.

    Args:
      check: is given what the network makes of one image.
    """
    image = jnp.zeros((1, *image_shape))
    output, variables = model.init_with_output(init_key(seed), image, train=False)
    check(output)
    return state_from(variables, optimizer, averaged)


def state_from(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, averaged: bool = False
) -> TrainState:
    """Returns the state at step 0 of a network that was just initialised with these variables."""
    params = variables["params"]
    model_state = {k: v for k, v in variables.items() if k not in ("params", "intermediates")}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        learning_rate_scale=jnp.ones(()),
    )
    return AveragedState(**vars(state), average=trained_variables(state)) if averaged else state


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    seed: jax.Array | int,
    axis_name: str | None = None,
    class_weights: jax.typing.ArrayLike | None = None,
    freeze: str = "",
    remat: str = "",
    places: Sequence[Probe] | None = None,
    accumulate: int = 1,
    unroll: bool = False,
    ema_decay: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of gradient descent on the mean cross-entropy.

    The network's keys are "dropout", different on each device and for each part, and "memory", the
    same on all and for all: they share a memory.

    Args:
      images: (B, H, W, C) float32, this device's share of the batch.
      labels: (B,) int32.
      seed: the run's.
      class_weights: (classes,) float32, what each example's cross-entropy is multiplied by; None:
        not done. The mean is over examples, not over weights, so devices can share a batch.
      freeze: a pattern, see `freeze.frozen_norms`.
      remat: a pattern, see `remat.recomputing`.
      places: where numbers are looked at, see `anomaly.find_probes`; None: not done.
      accumulate: the number of equal parts that the share is computed in, one after the other; the
        gradient is the mean of theirs, and so that of the whole. A part is every so manieth
        example, so that the parts of all devices together are the same on any number of devices.
        Batch norms see a part at a time, and a carried memory goes on from part to part.
      unroll: whether the program has the parts one after the other, instead of a loop.
      ema_decay: of the state's moving average, see `moved_average`.

    Returns:
      The next state, and `loss` and `accuracy` of the whole batch, () float32, in training mode;
      with `places` also `anomaly`, see `anomaly.first_anomaly`.
    """
    dropout, memory = dropout_key(seed, state.step, axis_name), memory_key(seed, state.step)

    def loss_fn(params, zeros, model_state, images, labels, dropout):
        looking = contextlib.nullcontext() if places is None else probing(places, zeros)
        with frozen_norms(freeze), looking, recomputing(remat):
            logits, model_state = model.apply(
                {"params": params, **model_state},
                images,
                train=True,
                mutable=list(model_state),
                rngs={"dropout": dropout, "memory": memory},
            )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if class_weights is not None:
            losses *= jnp.asarray(class_weights, losses.dtype)[labels]
        return losses.mean(), (logits, model_state)

    zeros = [jnp.zeros(2) for _ in places or ()]

    def gradient(model_state, images, labels, dropout):
        (loss, (logits, model_state)), grads = jax.value_and_grad(
            loss_fn, argnums=(0, 1), has_aux=True
        )(state.params, zeros, model_state, images, labels, dropout)
        metrics = {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}
        return grads, metrics, model_state

    def add_part(carried, part):
        total, model_state = carried
        number, images, labels = part
        key = jax.random.fold_in(dropout, number)
        grads, metrics, model_state = gradient(model_state, images, labels, key)
        return (jax.tree.map(jnp.add, total, grads), model_state), metrics

    if accumulate == 1:
        grads, metrics, model_state = gradient(state.model_state, images, labels, dropout)
    else:
        images, labels = (
            jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0) for x in (images, labels)
        )
        (grads, model_state), metrics = jax.lax.scan(
            add_part,
            (jax.tree.map(jnp.zeros_like, (state.params, zeros)), state.model_state),
            (jnp.arange(accumulate), images, labels),
            unroll=accumulate if unroll else 1,
        )
        grads = jax.tree.map(lambda total: total / accumulate, grads)
        metrics = jax.tree.map(jnp.mean, metrics)
    grads, counts = grads
    if axis_name is not None:
        grads, counts, metrics = jax.lax.pmean((grads, counts, metrics), axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: u * state.learning_rate_scale.astype(u.dtype), updates)
    params = optax.apply_updates(state.params, updates)
    if places is not None:
        metrics["anomaly"] = first_anomaly(counts, metrics["loss"], grads, params)
    state = state.replace(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
    )
    if ema_decay is not None:
        average = moved_average(state.average, trained_variables(state), ema_decay, state.step)
        state = state.replace(average=average)
    return state, metrics
