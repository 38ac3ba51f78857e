"""Keras's side: the published AiM-ResNet50, and its control with the same stem.

Written from its description: J. Lunkad, "AiM: Memory for Artificial Intelligence" (March 2021).
Layers have our names, with dots. Keras must have been told to use JAX (KERAS_BACKEND).
"""

import math
from typing import Any

import jax
import keras
import numpy as np
from against import in_jax, inputs
from keras import layers, ops

ROLES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


class Memory(layers.Layer):
    """A 1x1 convolution that is only ever fed ones; the input gives the number of examples."""

    def __init__(self, shape: tuple[int, int, int], name: str):
        super().__init__(name=name)
        self.shape = shape
        self.conv = layers.Conv2D(shape[-1], 1, name="conv")

    def build(self, input_shape: tuple) -> None:
        self.conv.build((None, *self.shape))

    def call(self, x: Any) -> Any:
        # It is the same for all examples, so it is computed once for all of them.
        m = self.conv(ops.ones((1, *self.shape)))
        return ops.broadcast_to(m, (ops.shape(x)[0], *self.shape))


def fit(m: Any, side: int) -> Any:
    """Reshapes a memory to a square map's size, or pads it to that, as published."""
    total, area = math.prod(m.shape[1:]), side * side
    if total >= area:
        if total % area:
            raise ValueError(f"{total} floats don't fill {side}x{side} evenly")
        return layers.Reshape((side, side, total // area))(m)
    inner = math.isqrt(total - 1) + 1
    if inner > side:
        raise ValueError(f"{total} floats don't fit into {side}x{side}")
    front, around = (inner**2 - total) // 2, (side - inner) // 2
    m = layers.Reshape((total, 1))(m)
    m = layers.ZeroPadding1D((front, inner**2 - total - front))(m)
    m = layers.Reshape((inner, inner, 1))(m)
    return layers.ZeroPadding2D(((around, side - inner - around),) * 2)(m)


def conv(x: Any, features: int, size: int, name: str, stride: int = 1) -> Any:
    return layers.Conv2D(
        features, size, stride, padding="same", kernel_initializer="he_normal", name=name
    )(x)


def norm(x: Any, name: str) -> Any:
    return layers.BatchNormalization(name=name)(x)


def read(x: Any, m: Any) -> Any:
    """Returns [x, m]; x alone where there is no memory."""
    return x if m is None else layers.Concatenate()([x, fit(m, x.shape[1])])


def update(x: Any, m: Any, name: str) -> Any:
    """Returns the memory that a map and the memory before make."""
    shape, h = m.shape[1:], read(x, m)
    for i, features in enumerate((16, 16, 32), start=1):
        h = conv(h, features, 3, f"{name}.conv{i}")
        h = layers.Activation("sigmoid")(norm(h, f"{name}.norm{i}"))
    h = layers.AveragePooling2D((x.shape[1] // shape[0], x.shape[2] // shape[1]))(h)
    return layers.Conv2D(shape[-1], 1, name=f"{name}.output")(h)


def block(x: Any, m: Any, features: int, stride: int, project: bool, name: str) -> Any:
    # Of 1x1 convolutions "same" pads nothing.
    y = conv(read(x, m), features, 1, f"{name}.conv1", stride)
    y = layers.ReLU()(norm(y, f"{name}.norm1"))
    y = conv(y, features, 3, f"{name}.conv2")
    y = layers.ReLU()(norm(y, f"{name}.norm2"))
    y = norm(conv(y, 4 * features, 1, f"{name}.conv3"), f"{name}.norm3")
    if project:
        x = conv(x, 4 * features, 1, f"{name}.shortcut", stride)
        x = norm(x, f"{name}.shortcut_norm")
    return layers.ReLU()(layers.Add()([x, y]))


def resnet(
    pixels: int,
    classes: int,
    memory_shape: tuple[int, ...] | None,
    stage_sizes: tuple[int, ...],
    width: int,
) -> keras.Model:
    images = keras.Input((pixels, pixels, 3))
    m = initial = None
    if memory_shape:
        m = Memory(tuple(memory_shape), "memory")(images)
        initial = Memory(tuple(memory_shape), "memory_initial")(images)
    x = layers.ZeroPadding2D(3)(images)
    x = layers.Conv2D(width, 7, kernel_initializer="he_normal", name="stem.conv")(x)
    x = layers.ReLU()(norm(x, "stem.norm"))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for stage, blocks in enumerate(stage_sizes):
        for number in range(blocks):
            name, first = f"stage{stage + 1}_block{number + 1}", number == 0
            stride = 2 if stage and first else 1
            x = block(x, m if first else initial, width * 2**stage, stride, first, name)
            # What the last stage would write, nobody reads.
            if memory_shape and first and stage < 3:
                m = update(x, m, f"{name}.memory_update")
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(classes, name="head")(x))


class OfKeras:
    """See `worker.py`.

    Args:
      pixels, batch_size, classes: of the images.
      memory_shape: (R, K, D); none: the control.
      stage_sizes, width: of the network.
    """

    def __init__(
        self,
        pixels: int,
        batch_size: int,
        classes: int,
        memory_shape: tuple[int, ...] | None = None,
        stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
    ):
        assert keras.backend.backend() == "jax"
        self._batch = inputs.batch(pixels, batch_size, classes)
        self._model = resnet(pixels, classes, memory_shape, stage_sizes, width)
        self._model.compile(
            keras.optimizers.Adam(inputs.LEARNING_RATE),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
        )
        for variable in self._model.variables:
            if "seed_generator" not in variable.path:
                *layer, role = variable.path.replace(".", "/").split("/")
                collection, ours = ROLES[role]
                path = "/".join((collection, *layer, ours))
                variable.assign(inputs.drawn(path, tuple(variable.shape)))

    def counts(self) -> list[int]:
        return [
            sum(math.prod(v.shape) for v in variables)
            for variables in (
                self._model.trainable_variables,
                self._model.non_trainable_variables,
            )
        ]

    def _forward(self, trainable: list, fixed: list, images: Any) -> Any:
        return self._model.stateless_call(trainable, fixed, images, training=False)[0]

    def outputs(self) -> dict[str, list[float]]:
        model = self._model
        trainable, fixed = (
            [v.value for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )
        self._arguments = jax.eval_shape(lambda *a: a, trainable, fixed, self._batch[0])
        logits = np.ravel(jax.jit(self._forward)(trainable, fixed, self._batch[0]))
        # What `fit` compiles and calls for each batch (with jit_compile=True), without its loop.
        # Metrics are made by the first step.
        images, labels = self._batch
        model.optimizer.build(model.trainable_variables)
        metrics = [v.value for v in model.metrics_variables]
        state = (trainable, fixed, [v.value for v in model.optimizer.variables])

        def step(state: tuple, images: Any, labels: Any) -> tuple:
            # The loss that is told is the mean of all since the metrics were empty.
            logs, (*state, _) = model.train_step((*state, metrics), (images, labels))
            return tuple(state), logs["loss"]

        self._step = in_jax.Compiled(step, state, self._batch)
        return {"logits": logits.tolist(), **inputs.two_steps(self._step)}

    def step(self) -> None:
        self._step()

    def facts(self) -> dict[str, Any]:
        operations = in_jax.forward_operations(self._forward, *self._arguments)
        return {
            "forward_operations": operations,
            "versions": in_jax.versions("keras"),
            **self._step.facts(),
        }
