"""Our side: the training step of a config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from against import in_jax, inputs
from flax import traverse_util

from aim_flax import allocator, build_model
from aim_flax import config as configs
from aim_flax.train.optimizer import build_optimizer
from aim_flax.train.step import create_state, train_step, trained_variables, with_variables

ROOT = Path(__file__).parents[2]
# As our commands do, before JAX starts its threads.
allocator.keep_memory()


def drawn(shapes: Any) -> Any:
    """Returns a tree of variables with the weights that all sides have."""
    paths = traverse_util.flatten_dict(shapes, sep="/")
    arrays = {path: inputs.drawn(path, leaf.shape) for path, leaf in paths.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


class Ours:
    """The network of a config and its training step.

    Args:
      config: FILE:ARM in configs/.
      pixels, batch_size, classes: of the images.
      overrides: KEY=VALUE of the config.
    """

    def __init__(
        self,
        config: str,
        pixels: int,
        batch_size: int,
        classes: int,
        overrides: Sequence[str] = (),
    ):
        sizes = (
            *(f"data.image_shape=({pixels},{pixels},3)", f"train.batch_size={batch_size}"),
            *(f"model.num_classes={classes}", *overrides),
        )
        self._config = configs.override(configs.load(f"{ROOT}/configs/{config}"), sizes)
        self._model = build_model(self._config)
        self._optimizer = build_optimizer(
            self._config, optax.constant_schedule(inputs.LEARNING_RATE)
        )
        self._batch = inputs.batch(pixels, batch_size, classes)
        shape = tuple(self._config.data.image_shape)
        self._shapes = jax.eval_shape(lambda: create_state(self._model, self._optimizer, 0, shape))

    def counts(self) -> list[int]:
        parts = (self._shapes.params, self._shapes.model_state)
        return [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in parts]

    def _forward(self, variables: Any, images: jax.Array) -> jax.Array:
        return self._model.apply(variables, images, train=False)

    def outputs(self) -> dict[str, list[float]]:
        variables = drawn(trained_variables(self._shapes))
        logits = np.ravel(jax.jit(self._forward)(variables, self._batch[0]))
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes)
        state = state.replace(learning_rate_scale=np.ones((), np.float32))
        state = jax.device_put(with_variables(state, variables))
        self._step = in_jax.Compiled(self._train, state, self._batch)
        return {"logits": logits.tolist(), **inputs.two_steps(self._step)}

    def _train(self, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        state, metrics = train_step(
            self._model, self._optimizer, state, images, labels, self._config.seed
        )
        return state, metrics["loss"]

    def step(self) -> None:
        self._step()

    def facts(self) -> dict[str, Any]:
        variables = trained_variables(self._shapes)
        operations = in_jax.forward_operations(self._forward, variables, self._batch[0])
        return {
            "forward_operations": operations,
            "versions": in_jax.versions("aim_flax", "flax"),
            **self._step.facts(),
        }
