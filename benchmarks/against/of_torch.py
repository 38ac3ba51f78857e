"""PyTorch's sides: our control's ResNet50, and EfficientNet-Lite0 from its package.

Modules of the ResNet have our names. Modes: `eager`; `channels_last`, the memory format; and
`compiled`, torch.compile of the network in that format. Adam is the fused one in all of them.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from against import inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MODES = ("eager", "channels_last", "compiled")
# Of what they are named in PyTorch, our collection and name.
ROLES = {
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "bias": ("params", "bias"),
}


def norm(features: int) -> nn.Module:
    return nn.BatchNorm2d(features, eps=1e-3, momentum=0.01)


class Stem(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 7, padding=3), norm(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(torch.relu(self.norm(self.conv(x))))


class Block(nn.Module):
    def __init__(self, inputs: int, features: int, stride: int, project: bool):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, features, 1, stride), norm(features)
        self.conv2, self.norm2 = nn.Conv2d(features, features, 3, padding=1), norm(features)
        self.conv3, self.norm3 = nn.Conv2d(features, 4 * features, 1), norm(4 * features)
        self.project = project
        if project:
            self.shortcut = nn.Conv2d(inputs, 4 * features, 1, stride)
            self.shortcut_norm = norm(4 * features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.project:
            x = self.shortcut_norm(self.shortcut(x))
        return torch.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, classes: int, stage_sizes: tuple[int, ...], width: int):
        super().__init__()
        self.stem, self.blocks, inputs = Stem(width), [], width
        for stage, blocks in enumerate(stage_sizes):
            for number in range(blocks):
                features = width * 2**stage
                name = f"stage{stage + 1}_block{number + 1}"
                stride = 2 if stage and not number else 1
                setattr(self, name, Block(inputs, features, stride, project=not number))
                self.blocks.append(name)
                inputs = 4 * features
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class OfTorch:
    """See `worker.py`.

    Args:
      mode: one of MODES.
      pixels, batch_size, classes: of the images.
      network: "resnet" or "efficientnet_lite0".
      weight_decay: of AdamW; None: Adam.
      eps: of either.
      sizes: of the ResNet.
    """

    def __init__(
        self,
        mode: str,
        pixels: int,
        batch_size: int,
        classes: int,
        network: str = "resnet",
        weight_decay: float | None = None,
        eps: float = 1e-7,
        stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
    ):
        assert mode in MODES, mode
        self._mode, threads = mode, len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        if network == "resnet":
            self._network = ResNet(classes, stage_sizes, width)
            places = {name: _place(name) for name in self._network.state_dict()}
        else:
            self._network, places = _efficientnet(classes)
        with torch.no_grad():
            for name, value in self._network.state_dict().items():
                if not name.endswith("num_batches_tracked"):
                    value.copy_(_drawn(places[name], tuple(value.shape)))
        images, labels = inputs.batch(pixels, batch_size, classes)
        self._images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        self._labels = torch.from_numpy(labels).long()
        if mode != "eager":
            self._network = self._network.to(memory_format=torch.channels_last)
            self._images = self._images.to(memory_format=torch.channels_last)
        common = dict(lr=inputs.LEARNING_RATE, eps=eps, fused=True)
        parameters = self._network.parameters()
        if weight_decay is None:
            self._optimizer = torch.optim.Adam(parameters, **common)
        else:
            self._optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay, **common)

    def counts(self) -> list[int]:
        statistics = [
            value.numel()
            for name, value in self._network.named_buffers()
            if not name.endswith("num_batches_tracked")
        ]
        return [sum(value.numel() for value in self._network.parameters()), sum(statistics)]

    def outputs(self) -> dict[str, list[float]]:
        self._network.eval()
        with torch.no_grad():
            logits = self._network(self._images)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._network(self._images)
        self._forward_operations = counter.get_total_flops() // 2
        self._network.train()
        compiled = self._mode == "compiled"
        self._call: Callable = torch.compile(self._network) if compiled else self._network
        logits = logits.ravel().tolist()
        return {"logits": logits, **inputs.two_steps(self._train)}

    def _train(self) -> float:
        loss = nn.functional.cross_entropy(self._call(self._images), self._labels)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def step(self) -> None:
        self._train()

    def facts(self) -> dict[str, Any]:
        return {
            "forward_operations": self._forward_operations,
            "versions": f"torch {torch.__version__}",
        }


def _place(name: str) -> str:
    """Returns the path of our variable, from the name of the ResNet's here."""
    *layer, role = name.split(".")
    is_norm = "norm" in layer[-1] if layer else False
    collection, ours = ROLES.get(role, ("params", "scale" if is_norm else "kernel"))
    return "/".join((collection, *layer, ours))


def _drawn(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a weight that all sides have, with PyTorch's order of axes."""
    if not path.endswith("kernel"):
        return torch.from_numpy(inputs.drawn(path, shape))
    outputs, channels, *window = shape
    return torch.from_numpy(
        np.moveaxis(inputs.drawn(path, (*window, channels, outputs)), (-1, -2), (0, 1)).copy()
    )


def _efficientnet(classes: int) -> tuple[nn.Module, dict[str, str]]:
    """Returns EfficientNet-Lite0 without dropout, and our paths by the names of its variables."""
    from efficientnet_lite_pytorch import EfficientNet

    from aim_flax.models.weights_names import LAYOUTS

    # It prints what it does.
    with contextlib.redirect_stdout(None):
        network = EfficientNet.from_name(
            "efficientnet-lite0",
            num_classes=classes,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
            batch_norm_momentum=0.9,
        )
    model = {"name": "efficientnet_lite", "stage_sizes": (1, 2, 2, 3, 3, 4, 1)}
    places = LAYOUTS["torch_efficientnet"](model)
    return network, {name: "/".join(place.path) for name, place in places.items()}
