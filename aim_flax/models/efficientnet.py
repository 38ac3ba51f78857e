"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, and with relu6.

Sources: M. Tan, Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(2019); the sizes of Lite0 are those of the TPU repository's efficientnet/lite.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.errors import UsageError
from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.depthwise import depthwise_taps
from aim_flax.layers.once import gradient_once

# Of the seven stages: the depthwise kernels, their strides, and how much wider a block is inside.
_KERNELS = (3, 3, 5, 3, 5, 5, 3)
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite; by default Lite0, as TensorFlow pads it.

    Submodules: `stem` and `top` (with `conv`, `norm`), `stage<s>_block<b>` (with `expand`,
    `expand_norm` but for the first stage, `depthwise`, `depthwise_norm`, `project`,
    `project_norm`), `head`. Stages and blocks count from 1, and every submodule returns one array.

    It can be differentiated in reverse only: by `jax.grad`, not by `jax.jvp` or `jax.hessian`.

    Attributes:
      num_classes: width of the output.
      stage_sizes: blocks in each of the seven stages.
      widths: channels of the stages' outputs.
      stem_width, top_width: channels of the first convolution and of the last.
      dropout: of what the head gets, in training.
      momentum, epsilon: of the batch norms.
      dtype: of the computation; None takes the inputs' and parameters' own, also for the logits.
      axis_name: device axis over which batch statistics are averaged in training, or None.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (1, 2, 2, 3, 3, 4, 1)
    widths: Sequence[int] = (16, 24, 40, 80, 112, 192, 320)
    stem_width: int = 32
    top_width: int = 1280
    dropout: float = 0.2
    momentum: float = 0.99
    epsilon: float = 1e-3
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits, (B, num_classes), float32 where `dtype` is given.

        Args:
          images: (B, H, W, channels), floats.
          train: whether batch norm uses (and records) the statistics of this batch, and dropout,
            with the key "dropout", is done.

        Raises:
          UsageError: not one size and one width for each stage.
        """
        for name, values in (("stage_sizes", self.stage_sizes), ("widths", self.widths)):
            if len(values) != len(_KERNELS):
                raise UsageError(
                    f"{name} are {tuple(values)}, expected one for each of {len(_KERNELS)} stages"
                )
        conv = partial(
            nn.Conv,
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal"),
            dtype=self.dtype,
            conv_general_dilated=depthwise_taps,
        )
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = ConvNorm(self.stem_width, 3, 2, conv, norm, name="stem")(images)
        stages = zip(self.stage_sizes, self.widths, _KERNELS, _STRIDES, _EXPANSIONS, strict=True)
        for stage, (blocks, width, kernel, stride, expansion) in enumerate(stages, start=1):
            for block in range(1, blocks + 1):
                x = InvertedBlock(
                    features=width,
                    kernel=kernel,
                    stride=stride if block == 1 else 1,
                    expansion=expansion,
                    conv=conv,
                    norm=norm,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = ConvNorm(self.top_width, 1, 1, conv, norm, name="top")(x)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            name="head",
        )(x)
        return logits if self.dtype is None else logits.astype(jnp.float32)


class ConvNorm(nn.Module):
    """Convolution, batch norm, relu6."""

    features: int
    kernel: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, ceil(H / stride), ceil(W / stride), features)."""
        window = (self.kernel, self.kernel)
        x = self.conv(self.features, window, strides=self.stride, name="conv")(x)
        return nn.relu6(gradient_once(self.norm(name="norm")(x)))


class InvertedBlock(nn.Module):
    """1x1 convolution to more channels, depthwise convolution, 1x1 convolution to fewer.

    Attributes:
      features: of the output; where that has the input's shape, the input is added to it.
      kernel, stride: of the depthwise convolution.
      expansion: channels within, as a multiple of the input's; 1: no first convolution.
    """

    features: int
    kernel: int
    stride: int
    expansion: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, ceil(H / stride), ceil(W / stride), features)."""
        y, inner = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = self.conv(inner, (1, 1), name="expand")(y)
            y = nn.relu6(gradient_once(self.norm(name="expand_norm")(y)))
        y = self.conv(
            inner,
            (self.kernel, self.kernel),
            strides=self.stride,
            feature_group_count=inner,
            name="depthwise",
        )(y)
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = self.conv(self.features, (1, 1), name="project")(y)
        y = self.norm(name="project_norm")(y)
        return x + y if y.shape == x.shape else y
