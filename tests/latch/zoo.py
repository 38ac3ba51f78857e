"""Networks as others write them, small, each after its paper or example; nothing of ours in them.

Where a network has `notes.read(layer, x)` it calls a layer, and `notes.wrote(module, y)` says what
a module has returned. By itself that is all. With other notes a memory stands inside the network,
written there by hand: what a latched one must be equal to.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn


class NoNotes:
    def read(self, layer, x):
        return layer(x)

    def wrote(self, module, y):
        return y


class Noted(nn.Module):
    notes: Any = NoNotes()


class MNIST(Noted):
    """Flax, examples/mnist."""

    @nn.compact
    def __call__(self, x):
        conv1, conv2 = nn.Conv(4, (3, 3), name="conv1"), nn.Conv(6, (3, 3), name="conv2")
        x = nn.avg_pool(nn.relu(self.notes.wrote(conv1, conv1(x))), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(self.notes.read(conv2, x)), (2, 2), (2, 2))
        dense = nn.Dense(7, name="dense")
        x = nn.relu(self.notes.read(dense, x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(x)


class ResidualBlock(Noted):
    stride: int = 1
    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: nn.BatchNorm(not train, name=name)  # noqa: E731
        conv1 = nn.Conv(self.features, (3, 3), (self.stride,) * 2, use_bias=False, name="conv1")
        h = nn.relu(norm("norm1")(self.notes.read(conv1, x)))
        h = norm("norm2")(nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(h))
        if x.shape != h.shape:
            x = nn.Conv(self.features, (1, 1), (self.stride,) * 2, name="shortcut")(x)
        return nn.relu(x + h)


class ResNet(Noted):
    """K. He et al., 2016; flax, examples/imagenet."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for i, stride in enumerate((1, 2)):
            block = ResidualBlock(self.notes, stride, 4 + 2 * i, name=f"block{i}")
            x = self.notes.wrote(block, block(x, train))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class WideResNet(Noted):
    """Pre-activation with group norm: S. Zagoruyko, N. Komodakis, 2016."""

    @nn.compact
    def __call__(self, x):
        stem = nn.Conv(4, (3, 3), name="stem")
        x = self.notes.wrote(stem, stem(x))
        for i in range(2):
            h = nn.relu(nn.GroupNorm(2, name=f"norm{i}")(x))
            x = x + self.notes.read(nn.Conv(4, (3, 3), name=f"conv{i}"), h)
        return nn.Dense(3, name="head")(x.max(axis=(1, 2)))


class DenseNet(Noted):
    """Every layer sees all before it: G. Huang et al., 2017."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            conv = nn.Conv(2, (3, 3), name=f"conv{i}")
            h = self.notes.read(conv, nn.relu(x))
            x = jnp.concatenate([x, self.notes.wrote(conv, h)], axis=-1)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class Inception(Noted):
    """Branches side by side: C. Szegedy et al., 2015."""

    @nn.compact
    def __call__(self, x):
        stem = nn.Conv(3, (5, 5), strides=2, padding="VALID", name="stem")
        x = nn.relu(self.notes.wrote(stem, stem(x)))
        branches = [self.notes.read(nn.Conv(2, (k, k), name=f"branch{k}"), x) for k in (1, 3, 5)]
        pooled = nn.max_pool(x, (3, 3), padding="SAME")
        branches.append(self.notes.read(nn.Conv(2, (1, 1), name="pool"), pooled))
        x = nn.relu(jnp.concatenate(branches, axis=-1))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class InvertedResidual(Noted):
    @nn.compact
    def __call__(self, x):
        h = nn.relu6(self.notes.read(nn.Conv(8, (1, 1), use_bias=False, name="expand"), x))
        depthwise = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")
        h = nn.relu6(self.notes.read(depthwise, h))
        gate = nn.sigmoid(nn.Dense(8, name="gate")(h.mean(axis=(1, 2), keepdims=True)))
        return x + nn.Conv(x.shape[-1], (1, 1), name="project")(h * gate)


class EfficientNet(Noted):
    """Inverted residuals with squeeze and excitation: M. Sandler et al., 2018; M. Tan, 2019."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, name="stem")(x)
        for i in range(2):
            block = InvertedResidual(self.notes, name=f"block{i}")
            x = self.notes.wrote(block, block(x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class UNet(Noted):
    """O. Ronneberger et al., 2015: down, up by transposed convolutions, and across."""

    @nn.compact
    def __call__(self, x):
        across = nn.relu(nn.Conv(3, (3, 3), name="down0")(x))
        down = nn.Conv(4, (3, 3), strides=2, name="down1")
        x = nn.relu(self.notes.wrote(down, down(across)))
        up = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")
        x = jnp.concatenate([across, self.notes.read(up, x)], axis=-1)
        return self.notes.read(nn.Conv(2, (1, 1), name="mask"), nn.relu(x))


class Generator(Noted):
    """From a vector to an image: A. Radford et al., 2016 (DCGAN)."""

    @nn.compact
    def __call__(self, x, train=False):
        dense = nn.Dense(2 * 2 * 4, name="dense")
        x = self.notes.wrote(dense, dense(x)).reshape(x.shape[0], 2, 2, 4)
        x = nn.relu(nn.BatchNorm(not train, name="norm")(x))
        x = nn.ConvTranspose(3, (4, 4), strides=(2, 2), name="up")(x)
        return jnp.tanh(self.notes.read(nn.Dense(2, name="colour"), x))


class VAE(Noted):
    """Flax, examples/vae, without the noise."""

    def setup(self):
        self.encoder, self.mean = nn.Dense(6), nn.Dense(3)
        self.decoder, self.image = nn.Dense(6), nn.Dense(5)

    def encode(self, x):
        return self.mean(nn.relu(self.notes.wrote(self.encoder, self.encoder(x))))

    def decode(self, z):
        return self.image(nn.relu(self.notes.read(self.decoder, z)))

    def __call__(self, x):
        return self.decode(self.encode(x))


class MLPBlock(Noted):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(self.notes.read(nn.Dense(8, name="up"), x))
        return nn.Dense(x.shape[-1], name="down")(h)


class EncoderBlock(Noted):
    @nn.compact
    def __call__(self, x, mask=None, *, deterministic=True):
        h = nn.LayerNorm(name="norm1")(x)
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, name="attention")
        x = x + attention(h, mask=mask, deterministic=deterministic)
        x = x + MLPBlock(self.notes, name="mlp")(nn.LayerNorm(name="norm2")(x))
        return self.notes.wrote(self, x)


class ViT(Noted):
    """A. Dosovitskiy et al., 2021."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.Conv(4, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 4)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 4))
        for i in range(2):
            x = EncoderBlock(self.notes, name=f"block{i}")(x, deterministic=deterministic)
        return nn.Dense(3, name="head")(x.mean(axis=1))


class Mixer(Noted):
    """I. Tolstikhin et al., 2021: Dense layers over tokens, and over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, 4)
        h = nn.LayerNorm(name="norm1")(x).swapaxes(1, 2)
        x = x + self.notes.read(nn.Dense(x.shape[1], name="tokens"), h).swapaxes(1, 2)
        channels = MLPBlock(self.notes, name="channels")
        x = x + self.notes.wrote(channels, channels(nn.LayerNorm(name="norm2")(x)))
        return self.notes.read(nn.Dense(3, name="head"), x.mean(axis=1))


class BERT(Noted):
    """J. Devlin et al., 2019: tokens, and which of them are padding."""

    @nn.compact
    def __call__(self, tokens, mask, *, deterministic=True):
        x = nn.Embed(11, 4, name="embed")(tokens)
        both = nn.make_attention_mask(mask, mask)
        for i in range(2):
            block = EncoderBlock(self.notes, name=f"block{i}")
            x = block(x, both, deterministic=deterministic)
        return self.notes.read(nn.Dense(3, name="head"), x[:, 0])


class GPT(Noted):
    """Position t predicts token t + 1: A. Radford et al., 2018."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 4, name="embed")(tokens)
        mask = nn.make_causal_mask(tokens)
        for i in range(2):
            x = EncoderBlock(self.notes, name=f"block{i}")(x, mask)
        return nn.Dense(11, name="head")(x)


class LSTM(Noted):
    """S. Hochreiter, J. Schmidhuber, 1997; flax, examples/seq2seq: scanned by nn.RNN."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.RNN(nn.OptimizedLSTMCell(4), name="rnn")(nn.Embed(11, 3, name="embed")(tokens))
        dense = nn.Dense(5, name="dense")
        x = nn.relu(self.notes.wrote(dense, dense(x)))
        return self.notes.read(nn.Dense(11, name="head"), x)


class WaveNet(Noted):
    """Dilated causal convolutions over a signal: A. van den Oord et al., 2016."""

    @nn.compact
    def __call__(self, x):
        stem = nn.Conv(4, (2,), padding="CAUSAL", name="stem")
        x = self.notes.wrote(stem, stem(x))
        for i in range(2):
            gate, value = (
                nn.Conv(4, (2,), padding="CAUSAL", kernel_dilation=2**i, name=f"{name}{i}")
                for name in ("gate", "value")
            )
            x = x + nn.sigmoid(self.notes.read(gate, x)) * jnp.tanh(self.notes.read(value, x))
        return nn.Dense(3, name="head")(x)


class C3D(Noted):
    """Convolutions over space and time: D. Tran et al., 2015."""

    @nn.compact
    def __call__(self, x):
        conv1 = nn.Conv(3, (3, 3, 3), name="conv1")
        x = nn.relu(self.notes.wrote(conv1, conv1(x)))
        x = nn.max_pool(x, (1, 2, 2), (1, 2, 2))
        x = nn.relu(self.notes.read(nn.Conv(4, (2, 3, 3), strides=2, name="conv2"), x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2, 3)))


class PointNet(Noted):
    """The same layers for every point, and a maximum: C. R. Qi et al., 2017."""

    @nn.compact
    def __call__(self, points):
        dense = nn.Dense(6, name="points")
        x = nn.relu(self.notes.wrote(dense, dense(points)))
        x = self.notes.read(nn.Dense(6, name="features"), x).max(axis=1)
        return nn.Dense(3, name="head")(x)


class GCN(Noted):
    """Graphs with features and adjacency: T. Kipf, M. Welling, 2017; flax, jraph examples."""

    @nn.compact
    def __call__(self, nodes, edges):
        for i in range(2):
            dense = nn.Dense(4, name=f"layer{i}")
            h = self.notes.wrote(dense, self.notes.read(dense, nodes))
            nodes = nn.relu(jnp.einsum("bij,bjf->bif", edges, h))
        return nn.Dense(3, name="head")(nodes.sum(axis=1))


class TwoTowers(Noted):
    """Two inputs and one score for each pair: A. Radford et al., 2021 (CLIP)."""

    @nn.compact
    def __call__(self, images, texts):
        conv = nn.Conv(4, (2, 2), strides=2, name="image")
        seen = self.notes.wrote(conv, conv(images)).mean(axis=(1, 2))
        written = self.notes.read(nn.Dense(4, name="text"), texts)
        return (nn.Dense(4, name="joint")(seen) * written).sum(axis=-1, keepdims=True)


class NeRF(Noted):
    """A deep MLP with its input once more in the middle: B. Mildenhall et al., 2020."""

    @nn.compact
    def __call__(self, x):
        h = x
        for i in range(4):
            h = jnp.concatenate([h, x], axis=-1) if i == 2 else h
            dense = nn.Dense(6, name=f"layer{i}")
            h = nn.relu(self.notes.read(dense, h) if i else self.notes.wrote(dense, dense(h)))
        return nn.Dense(4, name="colour")(h)


class Body(Noted):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv")(x))
        return h, {"features": h.mean(axis=(1, 2))}


class ActorCritic(Noted):
    """Flax, examples/ppo: several outputs, of a block that returns several."""

    @nn.compact
    def __call__(self, x):
        body = Body(self.notes, name="body")
        h, parts = body(x)
        self.notes.wrote(body, h)
        x = nn.relu(self.notes.read(nn.Dense(5, name="hidden"), h.reshape(h.shape[0], -1)))
        policy = nn.log_softmax(nn.Dense(3, name="policy")(x))
        return policy, nn.Dense(1, name="value")(x) + parts["features"][:, :1]


class StdConv(nn.Conv):
    """A convolution that standardises its kernel: A. Kolesnikov et al., 2020 (BiT)."""

    def param(self, name, init, *args, **kwargs):
        value = super().param(name, init, *args, **kwargs)
        if name != "kernel":
            return value
        value = value - value.mean(axis=(0, 1, 2))
        return value / (value.std(axis=(0, 1, 2)) + 1e-5)


class BiT(Noted):
    @nn.compact
    def __call__(self, x):
        stem = nn.Conv(4, (3, 3), name="stem")
        x = self.notes.wrote(stem, stem(x))
        x = nn.relu(self.notes.read(StdConv(4, (3, 3), name="conv"), x))
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


class PixelCNN(Noted):
    """Convolutions with masks: A. van den Oord et al., 2016."""

    @nn.compact
    def __call__(self, x):
        mask = jnp.ones((3, 3, x.shape[-1], 4)).at[1, 2:].set(0).at[2].set(0)
        x = nn.Conv(4, (3, 3), mask=mask, name="conv")(x)
        return nn.Dense(3, name="head")(x)


class Swin(Noted):
    """Windows folded into the batch: Z. Liu et al., 2021."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="patches")(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = nn.Dense(4, name="window")(x.reshape(-1, 4, channels))
        return nn.Dense(3, name="head")(x.reshape(batch, -1, 4).mean(axis=1))


class Experts(Noted):
    """Tokens sorted to experts, (experts, tokens, C): N. Shazeer et al., 2017."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x)
        tokens = x.reshape(2, -1, 4)
        each = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
        x = each(4, name="expert")(tokens).reshape(x.shape)
        return nn.Dense(3, name="head")(x.mean(axis=1))


class TimeMajor(Noted):
    """(T, B, C) inside, as recurrent networks have it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x)
        x = nn.Dense(4, name="step")(x.swapaxes(0, 1))
        return nn.Dense(3, name="head")(x.mean(axis=0))
