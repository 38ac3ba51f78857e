"""A plain multi-layer perceptron."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.errors import check_choice

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "sigmoid": nn.sigmoid, "tanh": nn.tanh}


class Layer(nn.Module):
    """A hidden layer: Dense -> batch norm (optional) -> activation -> dropout."""

    features: int
    activation: str
    batch_norm: bool
    dropout: float
    dtype: jnp.dtype | None
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel_init = nn.initializers.he_normal()
        x = nn.Dense(self.features, kernel_init=kernel_init, dtype=self.dtype, name="dense")(x)
        if self.batch_norm:
            x = nn.BatchNorm(
                use_running_average=not train,
                axis_name=self.axis_name,
                dtype=self.dtype,
                name="norm",
            )(x)
        x = ACTIVATIONS[self.activation](x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class MLP(nn.Module):
    """Hidden layers `layer1`, `layer2`, ... (each with a `dense`) and a linear `head`.

    Attributes:
      num_classes: number of logits.
      features: width of each hidden layer.
      activation: "relu", "gelu", "sigmoid" or "tanh".
      batch_norm: whether hidden layers are normalised before the activation.
      dropout: rate after the activation, in training only; needs a "dropout" key if above 0.
      dtype: of the computation; parameters and logits are float32 whatever it is.
      axis_name: device axis over which batch statistics are averaged in training, or None.

    Raises:
      UsageError: on an unknown activation.
    """

    num_classes: int
    features: Sequence[int] = (256, 256)
    activation: str = "relu"
    batch_norm: bool = False
    dropout: float = 0.0
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns logits (B, num_classes), float32, of images (B, ...)."""
        check_choice("activation", self.activation, ACTIVATIONS)
        x = images.reshape(images.shape[0], -1)
        for i, features in enumerate(self.features, start=1):
            x = Layer(
                features,
                self.activation,
                self.batch_norm,
                self.dropout,
                self.dtype,
                self.axis_name,
                name=f"layer{i}",
            )(x, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
