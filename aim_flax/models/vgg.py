"""VGG, as in the paper and, with its head, as the control of AiM's author.

Sources: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (2014); J. Lunkad's published VGG16 control, which has a batch norm between the
flattened map and the dense layers.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice
from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.convolution import convolution
from aim_flax.layers.pooling import max_pool
from aim_flax.windows import window_means

POOLINGS = ("flatten", "global", "grid")
_GRID = 7


class VGG(nn.Module):
    """VGG; by default the published VGG16 control.

    Submodules: `stage<s>_conv<i>` (and `stage<s>_norm<i>`), `stage<s>_pool`, `norm` (if any),
    `dense1`, `dense2`, ..., `head`, all counted from 1.

    It can be differentiated in reverse only: by `jax.grad`, not by `jax.jvp` or `jax.hessian`.

    Attributes:
      num_classes: width of the output.
      stage_sizes: convolutions in each stage. VGG16: 2, 2, 3, 3, 3.
      widths: features of the convolutions of each stage.
      dense_sizes: features of the dense layers in front of the head. Published: 4096, 4096.
      pooling: what the dense layers get of the last map: "flatten", every pixel, so that the
        parameters fit one image size; "global", its mean; "grid", every cell of a 7x7 grid, means
        of the pixels there, as in torchvision: the same as "flatten" at 224 px.
      dense_norm: whether a batch norm stands in front of the dense layers. Published: yes.
      batch_norm: whether a batch norm follows each convolution. Published: no.
      momentum, epsilon: of the batch norms.
      dtype: of the computation; None takes the inputs' and parameters' own, also for the logits.
      axis_name: device axis over which batch statistics are averaged in training, or None.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (2, 2, 3, 3, 3)
    widths: Sequence[int] = (64, 128, 256, 512, 512)
    dense_sizes: Sequence[int] = (4096, 4096)
    pooling: str = "flatten"
    dense_norm: bool = True
    batch_norm: bool = False
    momentum: float = 0.99
    epsilon: float = 1e-3
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits, (B, num_classes), float32 where `dtype` is given.

        Args:
          images: (B, H, W, channels), floats; H and W at least 2 ** the number of stages.
          train: whether batch norm uses (and records) the statistics of this batch.

        Raises:
          UsageError: for images too small, an unknown `pooling`, or not one width for each stage.
        """
        self._check(images)
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        he_normal = nn.initializers.he_normal()
        x = images
        for stage, (convs, width) in enumerate(
            zip(self.stage_sizes, self.widths, strict=True), start=1
        ):
            for i in range(1, convs + 1):
                x = nn.Conv(
                    width,
                    (3, 3),
                    kernel_init=he_normal,
                    dtype=self.dtype,
                    conv_general_dilated=convolution,
                    name=f"stage{stage}_conv{i}",
                )(x)
                if self.batch_norm:
                    x = norm(name=f"stage{stage}_norm{i}")(x)
                x = nn.relu(x)
            x = MaxPool(name=f"stage{stage}_pool")(x)
        if self.pooling == "grid":
            x = _grid(x)
        x = x.mean(axis=(1, 2)) if self.pooling == "global" else x.reshape(x.shape[0], -1)
        if self.dense_norm:
            x = norm(name="norm")(x)
        for i, features in enumerate(self.dense_sizes, start=1):
            x = nn.relu(
                nn.Dense(features, kernel_init=he_normal, dtype=self.dtype, name=f"dense{i}")(x)
            )
        logits = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            name="head",
        )(x)
        return logits if self.dtype is None else logits.astype(jnp.float32)

    def _check(self, images: jax.Array) -> None:
        check_choice("pooling", self.pooling, POOLINGS)
        stages = len(self.stage_sizes)
        if len(self.widths) != stages:
            raise UsageError(
                f"widths are {tuple(self.widths)}, expected one for each of {stages} stages"
            )
        if min(images.shape[1:3]) < 2**stages:
            height, width = images.shape[1:3]
            raise UsageError(
                f"images of {height}x{width} px are too small for {stages} stages of VGG,"
                f" expected at least {2**stages} px"
            )


def _grid(x: jax.Array) -> jax.Array:
    """Returns the means of a map's cells, (B, 7, 7, C)."""
    if x.shape[1:3] == (_GRID, _GRID):
        return x
    rows, columns = (jnp.asarray(window_means(size, _GRID), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)


class MaxPool(nn.Module):
    """2x2 max pool of stride 2: a module, so that a memory can be updated after it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, H // 2, W // 2, C)."""
        return max_pool(x, (2, 2), strides=(2, 2))
