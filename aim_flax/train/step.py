"""What one device computes: the training step and its state.

Everything is pure: a step depends on its state, its batch, and keys that are folded from the
run's seed and the step's number, so a run can continue from its state alone. With an
`axis_name`, gradients and metrics are averaged over the devices of that axis.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from aim_flax.keys import dropout_key, init_key, memory_key
from aim_flax.train.anomaly import Probe, first_anomaly, probing
from aim_flax.train.freeze import frozen_norms


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


def variables_of(state: TrainState) -> dict[str, Any]:
    """Returns the network's variables, as `model.apply` takes them."""
    return {"params": state.params, **state.model_state}


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: jax.Array | int,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Returns the state at step 0 for images (B, *image_shape)."""
    variables = model.init(init_key(seed), jnp.zeros((1, *image_shape)), train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state={k: v for k, v in variables.items() if k not in ("params", "intermediates")},
        opt_state=optimizer.init(params),
        learning_rate_scale=jnp.ones(()),
    )


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
    places: Sequence[Probe] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of gradient descent on the mean cross-entropy.

    The network's keys are "dropout", different on each device, and "memory", the same on all.

    Args:
      images: (B, H, W, C) float32, this device's share of the batch.
      labels: (B,) int32.
      seed: the run's.
      class_weights: (classes,) float32, what each example's cross-entropy is multiplied by; None:
        not done. The mean is over examples, not over weights, so devices can share a batch.
      freeze: a pattern, see `freeze.frozen_norms`.
      places: where numbers are looked at, see `anomaly.find_probes`; None: not done.

    Returns:
      The next state, and `loss` and `accuracy` of the whole batch, () float32, in training mode;
      with `places` also `anomaly`, see `anomaly.first_anomaly`.
    """
    rngs = {
        "dropout": dropout_key(seed, state.step, axis_name),
        "memory": memory_key(seed, state.step),
    }

    def loss_fn(params, zeros):
        looking = contextlib.nullcontext() if places is None else probing(places, zeros)
        with frozen_norms(freeze), looking:
            logits, model_state = model.apply(
                {"params": params, **state.model_state},
                images,
                train=True,
                mutable=list(state.model_state),
                rngs=rngs,
            )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if class_weights is not None:
            losses *= jnp.asarray(class_weights, losses.dtype)[labels]
        return losses.mean(), (logits, model_state)

    zeros = [jnp.zeros(2) for _ in places or ()]
    (loss, (logits, model_state)), (grads, counts) = jax.value_and_grad(
        loss_fn, argnums=(0, 1), has_aux=True
    )(state.params, zeros)
    metrics = {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}
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
    return state, metrics
