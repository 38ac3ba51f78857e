"""A trained network that tells the classes of images."""

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_flax.data.preprocessing import Preprocessing
from aim_flax.errors import DataError, UsageError
from aim_flax.models.build import trained
from aim_flax.names import printable

if TYPE_CHECKING:
    from PIL import Image


def probabilities(model: nn.Module, preprocessing: Preprocessing) -> Callable[[Any, Any], Any]:
    """Returns (variables, pixels (B, H, W, C) uint8) -> (B, classes) float32, to be compiled.

    The network sees each image alone, as a batch of one: what it says of an image, and where its
    memory is written, can't depend on the images beside it.
    """

    def one(variables: Any, pixels: jax.Array) -> jax.Array:
        logits = model.apply(variables, preprocessing.inputs(pixels[None]), train=False)
        return jax.nn.softmax(logits[0].astype(jnp.float32))

    return jax.vmap(one, in_axes=(None, 0))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of an image.

    Attributes:
      label: the name of the most probable class.
      probability: of that class.
      probabilities: (classes,) float32.
      classes: their names.
    """

    label: str
    probability: float
    probabilities: np.ndarray = dataclasses.field(repr=False)
    classes: tuple[str, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, classes: tuple[str, ...], probabilities: np.ndarray) -> "Prediction":
        best = int(np.argmax(probabilities))
        return cls(classes[best], float(probabilities[best]), probabilities, classes)

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Returns the most probable classes with their probabilities, the first one first."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.classes[i], float(self.probabilities[i])) for i in order]


class Predictor:
    """A run's network, with the preprocessing and the names of the classes.

        predictor = Predictor.from_run("runs/digits_mlp-aim-0")
        print(predictor("scan.png").top())

    Attributes:
      classes: names.
      step: the number of training steps after which the network was saved.
      config: the run's.
      model, variables: the network.
      shape: of the images that it takes, (H, W, channels).
      preprocessing: what is done to pixels first.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        variables: dict[str, Any],
        classes: Sequence[str],
        step: int = 0,
    ):
        self.config, self.model, self.variables = config, trained(model), variables
        self.classes, self.step = tuple(classes), step
        self.preprocessing = Preprocessing.of(config.data)
        self.shape = tuple(config.data.image_shape)
        self._call = jax.jit(probabilities(self.model, self.preprocessing))
        self._on_device = jax.device_put(variables)

    @classmethod
    def from_run(cls, workdir: str | Path, checkpoint: str | int = "best") -> "Predictor":
        """Restores a checkpoint of a run; nothing but its directory is needed.

        Where that doesn't name the classes, the dataset does, and a line on standard error says so.

        Args:
          workdir, checkpoint: as for `train.restore.restore_run`.

        Raises:
          UsageError: there is no such run or checkpoint; the run is from before it recorded the
            names of its classes, and its dataset is gone.
        """
        # Imported here because checkpoints take a second, which `from aim_flax import AiM` doesn't
        # need.
        from aim_flax.train.dataset_record import DATASET, classes_of
        from aim_flax.train.restore import restore_run

        restored = restore_run(workdir, checkpoint)
        classes = classes_of(Path(workdir), restored.config)
        if not (Path(workdir) / DATASET).is_file():
            data = restored.config.data
            # Nothing tells whether a class has had another name in training.
            message = (
                f"{workdir} has no {DATASET}: its classes are named as in"
                f" {data.get('dir') or data.name}, as that is now"
            )
            print(printable(message), file=sys.stderr, flush=True)
        return cls(restored.config, restored.model, restored.variables, classes, restored.step)

    def __call__(self, image: "str | os.PathLike | bytes | np.ndarray | Image.Image") -> Prediction:
        """Returns the prediction for one image; see `pixels`."""
        (found,) = self.probabilities(self.pixels(image)[None])
        return Prediction.of(self.classes, found)

    def pixels(self, image: "str | os.PathLike | bytes | np.ndarray | Image.Image") -> np.ndarray:
        """Returns what the network is given of an image, (H, W, C) uint8, as evaluation does.

        Args:
          image: a file, its bytes, a Pillow image, or an array (any height, any width[, 1 or 3])
            uint8. An array has the values of the dataset's pixels; of the others white is 255.

        Raises:
          UsageError: there is no such file; an array of another shape or dtype.
          DataError: a file that is no whole image, by its name.
        """
        from aim_flax.data.images import ImageError

        name, white = "the image", None
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            try:
                image = Path(image).read_bytes()
            except OSError as error:
                raise UsageError(f"{name} can't be read: {error.strerror}") from None
        elif not isinstance(image, bytes):
            if isinstance(image, np.ndarray | jax.Array):
                image, white = _as_image(np.asarray(image)), 255
            image = _encoded(image)
        preprocessing = self.preprocessing
        if white is not None:
            preprocessing = dataclasses.replace(preprocessing, white=white)
        try:
            return preprocessing.pixels(image)
        except ImageError as error:
            raise DataError(f"{name} {error}") from None

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Returns (B, classes) float32 for (B, H, W, C) uint8 of the network's size.

        Each number of images is compiled once.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.shape:
            raise UsageError(
                f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (images, "
                f"{', '.join(map(str, self.shape))})"
            )
        return np.asarray(self._call(self._on_device, pixels))


def _as_image(pixels: np.ndarray) -> "Image.Image":
    from PIL import Image

    squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    grey_or_color = squeezed.ndim == 2 or (squeezed.ndim == 3 and squeezed.shape[-1] == 3)
    if pixels.dtype != np.uint8 or not grey_or_color or not pixels.size:
        raise UsageError(
            f"the image is {pixels.dtype} {pixels.shape}, expected uint8 (height, width), or with 1"
            " or 3 channels"
        )
    return Image.fromarray(np.ascontiguousarray(squeezed))


def _encoded(image: "Image.Image") -> bytes:
    """Returns an image as a file would have it; PNG keeps every pixel."""
    if not hasattr(image, "save"):
        raise UsageError(f"an image is a file, bytes, a Pillow image or an array, not {image!r}")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
