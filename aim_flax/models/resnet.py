"""ResNet with bottleneck blocks, as in the paper and in the code published with AiM.

Sources: K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition" (2015);
J. Lunkad's published code, a Keras ResNet50: convolutions with biases, the stride on a block's
first 1x1 convolution and on its shortcut, batch norm with epsilon 1e-3 and momentum 0.99.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice
from aim_flax.layers.batch_norm import BatchNorm
from aim_flax.layers.pointwise import pointwise_product
from aim_flax.layers.pooling import max_pool

STEMS = ("imagenet", "cifar")
STRIDES_ON = ("conv1", "conv2")
POINTWISE = {"einsum": pointwise_product, "conv": None}


class ResNet(nn.Module):
    """Bottleneck ResNet; by default the published ResNet50 control.

    Submodules: `stem`, `stage<s>_block<b>` (with `conv1`, `norm1`, ..., and `shortcut`,
    `shortcut_norm` in the first block of a stage), `head`. Stages and blocks count from 1,
    and every submodule returns one array.

    It can be differentiated in reverse only: by `jax.grad`, not by `jax.jvp` or `jax.hessian`.

    Attributes:
      num_classes: width of the output.
      stage_sizes: blocks in each stage. ResNet50: 3, 4, 6, 3.
      width: channels of the stem and of the inner convolutions of stage 1, twice as many in every
        further stage; or a sequence with the channels of each stage, the first also the stem's.
      stem: "imagenet" (7x7 convolution, 3x3 max pool of stride 2) or "cifar" (3x3 convolution of
        stride 1, no pool).
      stem_stride: of the 7x7 convolution. Published: 1 with memory, 2 in the control.
      conv_bias: whether convolutions have biases. Published: yes, though the batch norm after
        each convolution cancels its bias.
      momentum, epsilon: of the batch norms.
      stride_on: which convolution of a block has its stride: "conv1", as in the paper and as
        published; "conv2", as in torchvision ("v1.5"), which pads it by 1 on all sides.
      dtype: of the computation; None takes the inputs' and parameters' own, also for the logits.
      axis_name: device axis over which batch statistics are averaged in training, or None.
      pointwise: "einsum" computes convolutions on CPU as `aim_flax.layers` does, those of 1x1 as
        matrix products; "conv" leaves them to XLA, which takes longer.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int | Sequence[int] = 64
    stem: str = "imagenet"
    stem_stride: int = 2
    conv_bias: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-3
    stride_on: str = "conv1"
    dtype: jnp.dtype | None = None
    axis_name: str | None = None
    pointwise: str = "einsum"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns the logits, (B, num_classes), float32 where `dtype` is given.

        Args:
          images: (B, H, W, channels), floats.
          train: whether batch norm uses (and records) the statistics of this batch.

        Raises:
          UsageError: for an unknown `stem`, `pointwise` or `stride_on`, or not one width for each
            stage.
        """
        check_choice("stem", self.stem, STEMS)
        check_choice("pointwise", self.pointwise, POINTWISE)
        check_choice("stride_on", self.stride_on, STRIDES_ON)
        conv = partial(
            nn.Conv,
            use_bias=self.conv_bias,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            conv_general_dilated=POINTWISE[self.pointwise],
        )
        norm = partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        widths = stage_widths(self.width, self.stage_sizes)
        x = Stem(self.stem, widths[0], self.stem_stride, conv, norm, name="stem")(images)
        for stage, (blocks, width) in enumerate(
            zip(self.stage_sizes, widths, strict=True), start=1
        ):
            for block in range(1, blocks + 1):
                x = BottleneckBlock(
                    features=width,
                    stride=2 if stage > 1 and block == 1 else 1,
                    project=block == 1,
                    stride_on=self.stride_on,
                    conv=conv,
                    norm=norm,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = x.mean(axis=(1, 2))
        logits = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.glorot_uniform(),
            dtype=self.dtype,
            name="head",
        )(x)
        return logits if self.dtype is None else logits.astype(jnp.float32)


def stage_widths(width: int | Sequence[int], stage_sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the channels of each stage's inner convolutions, for a `width` of `ResNet`.

    Raises:
      UsageError: for not one width for each stage.
    """
    if not isinstance(width, Sequence):
        return tuple(width * 2**stage for stage in range(len(stage_sizes)))
    if len(width) != len(stage_sizes):
        raise UsageError(
            f"width is {tuple(width)}, expected a number or one for each of {len(stage_sizes)}"
            " stages"
        )
    return tuple(width)


class Stem(nn.Module):
    """Convolution, batch norm, relu: 3x3, or 7x7 and then a 3x3 max pool of stride 2."""

    kind: str
    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns (B, H, W, features), for "imagenet" H and W divided by 2·stride, rounded up."""
        if self.kind == "cifar":
            x = self.conv(self.features, (3, 3), name="conv")(images)
            return nn.relu(self.norm(name="norm")(x))
        padding = [(3, 3), (3, 3)]
        x = self.conv(self.features, (7, 7), strides=self.stride, padding=padding, name="conv")(
            images
        )
        x = nn.relu(self.norm(name="norm")(x))
        return max_pool(x, (3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolution, added to a shortcut.

    Attributes:
      features: of the first two convolutions; the block's output has four times as many.
      stride: of the shortcut, and of the first or the second convolution.
      project: whether the shortcut is a 1x1 convolution, not the identity.
      stride_on: which of the two, see `ResNet`.
    """

    features: int
    stride: int
    project: bool
    stride_on: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (B, ceil(H / stride), ceil(W / stride), 4·features)."""
        first, second = (self.stride, 1) if self.stride_on == "conv1" else (1, self.stride)
        y = self.conv(self.features, (1, 1), strides=first, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        # SAME would pad even sizes on one side only; where nothing is skipped, it is the same.
        padding = "SAME" if second == 1 else [(1, 1), (1, 1)]
        y = self.conv(self.features, (3, 3), strides=second, padding=padding, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.features, (1, 1), name="conv3")(y)
        y = self.norm(name="norm3")(y)
        if self.project:
            x = self.conv(4 * self.features, (1, 1), strides=self.stride, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)
