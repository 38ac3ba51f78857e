"""Flax's side: a ResNet as its ImageNet example writes it, in Linen alone.

Source of the structure: google/flax, examples/imagenet: convolutions without biases, batch norm of
momentum 0.9 and epsilon 1e-5, the stride on a block's 3x3 convolution. The stem's stride is 1 and
padding is explicit, so that outputs can be compared with ours; modules have our names.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from against import in_jax, inputs
from against.ours import drawn
from flax import linen as nn


class Block(nn.Module):
    features: int
    stride: int
    project: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, padding=1)
        norm = partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9, epsilon=1e-5)
        y = conv(self.features, (1, 1), padding=0, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = conv(self.features, (3, 3), strides=self.stride, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = conv(4 * self.features, (1, 1), padding=0, name="conv3")(y)
        y = norm(name="norm3")(y)
        if self.project:
            x = conv(4 * self.features, (1, 1), self.stride, padding=0, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class Stem(nn.Module):
    width: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), padding=3, use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not self.train, momentum=0.9, epsilon=1e-5, name="norm")(x))
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))


class ResNet(nn.Module):
    classes: int
    stage_sizes: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Stem(self.width, train, name="stem")(x)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = Block(
                    self.width * 2**stage,
                    stride=2 if stage and not block else 1,
                    project=not block,
                    train=train,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


class OfFlax:
    """See `worker.py`; arguments as of `Ours`, and the network's sizes."""

    def __init__(
        self,
        pixels: int,
        batch_size: int,
        classes: int,
        stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
    ):
        self._model = ResNet(classes, tuple(stage_sizes), width)
        self._optimizer = optax.adam(inputs.LEARNING_RATE, eps=1e-7)
        self._batch = inputs.batch(pixels, batch_size, classes)
        self._shapes = jax.eval_shape(
            partial(self._model.init, train=False), jax.random.key(0), self._batch[0]
        )

    def counts(self) -> list[int]:
        parts = (self._shapes["params"], self._shapes["batch_stats"])
        return [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts]

    def _forward(self, variables: Any, images: jax.Array) -> jax.Array:
        return self._model.apply(variables, images, train=False)

    def outputs(self) -> dict[str, list[float]]:
        variables = drawn(self._shapes)
        logits = np.ravel(jax.jit(self._forward)(variables, self._batch[0]))
        params, statistics = variables["params"], variables["batch_stats"]
        state = jax.device_put((params, statistics, self._optimizer.init(params)))
        self._step = in_jax.Compiled(self._train, state, self._batch)
        return {"logits": logits.tolist(), **inputs.two_steps(self._step)}

    def _train(self, state: tuple, images: jax.Array, labels: jax.Array) -> tuple:
        params, statistics, optimizer_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, changed = self._model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), changed["batch_stats"]

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer_state = self._optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), statistics, optimizer_state), value

    def step(self) -> None:
        self._step()

    def facts(self) -> dict[str, Any]:
        operations = in_jax.forward_operations(self._forward, self._shapes, self._batch[0])
        return {
            "forward_operations": operations,
            "versions": in_jax.versions("flax", "optax"),
            **self._step.facts(),
        }
