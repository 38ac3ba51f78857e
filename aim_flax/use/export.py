"""A run's network as one file that needs no aim_flax, and its parameters as safetensors."""

import inspect
import io
import json
import platform
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_flax import files
from aim_flax.errors import UsageError
from aim_flax.names import printable
from aim_flax.use.predictor import Predictor, probabilities

PLATFORMS = ("cpu", "cuda", "tpu")
_README = """\
A network, trained with aim_flax as {name}:{arm}, seed {seed}, step {step}.

    python {file} IMAGE ...

prints the classes of images. In Python:

    import sys

    sys.path.insert(0, "{file}")
    from aim_network import Network

    network = Network("{file}")
    network.classes, network.predict("photo.jpg")
    network(pixels)  # {shape} uint8 -> {classes} probabilities of each image

It runs on CPU, CUDA and TPU with jax {jax} or a later one (jax promises to read such files for at
least six months) and flatbuffers, which jax needs to read them. Images are read with Pillow,
opencv-python-headless and simplejpeg. What is in here: aim_network/__init__.py, how it is loaded;
images.py, how images are decoded; network.jax, the function, by jax.export; network.json, classes
and preprocessing; parameters.safetensors.
"""


def parameters(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns {"params/layer/kernel": array, "batch_stats/...": array, ...}."""
    flat = flatten_dict(variables, sep="/")
    return {name: np.asarray(leaf) for name, leaf in sorted(flat.items())}


def about(predictor: Predictor) -> dict[str, Any]:
    """Returns what a file says of its network: classes and preprocessing first."""
    config, preprocessing = predictor.config, predictor.preprocessing
    return {
        "classes": list(predictor.classes),
        "decoding": preprocessing.decoding,
        "white": preprocessing.white,
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "step": predictor.step,
        "platforms": list(PLATFORMS),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }


def function(predictor: Predictor) -> bytes:
    """Returns ({name: parameter}, pixels (B, H, W, C) uint8) -> (B, classes) float32, for any B and
    all PLATFORMS, as jax.export writes it.

    Raises:
      UsageError: the network can't be compiled for other platforms, or another number of images.
    """
    call = probabilities(predictor.model, predictor.preprocessing)

    def exported(flat: dict[str, Any], pixels: Any) -> Any:
        return call(unflatten_dict(flat, sep="/"), pixels)

    (size,) = jax.export.symbolic_shape("b")
    pixels = jax.ShapeDtypeStruct((size, *predictor.shape), jnp.uint8)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters(predictor.variables)
    )
    try:
        traced = jax.export.export(jax.jit(exported), platforms=PLATFORMS)(given, pixels)
    except Exception as error:  # A network from elsewhere may do what only some platforms can.
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the network can't be exported: {reason}") from error
    return bytes(traced.serialize())


def write_network(place: Path, predictor: Predictor) -> None:
    """Writes a network as a ZIP file that Python runs; it appears whole or not at all."""
    # Imported here because OpenCV takes its time.
    from aim_flax.data import images

    saved = about(predictor)
    words = {key: saved[key] for key in ("name", "arm", "seed", "step")}
    shape = ("images", *predictor.shape)
    words |= {"file": printable(place.name), "shape": shape, "classes": len(saved["classes"])}
    contents = {
        "README.txt": _README.format(**words, jax=jax.__version__),
        "__main__.py": Path(__file__).with_name("exported_main.py").read_text(),
        "aim_network/__init__.py": Path(__file__).with_name("exported_network.py").read_text(),
        "aim_network/images.py": inspect.getsource(images),
        "aim_network/network.json": json.dumps(saved, indent=2),
        "aim_network/network.jax": function(predictor),
        "aim_network/parameters.safetensors": safetensors(predictor),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            # Weights hardly get smaller, and are found in place.
            how = zipfile.ZIP_STORED if name.endswith("safetensors") else zipfile.ZIP_DEFLATED
            # A date of its own would make two files of one network differ.
            archive.writestr(zipfile.ZipInfo(name), content, how)
    _write(place, buffer.getvalue())


def write_parameters(place: Path, predictor: Predictor) -> None:
    """Writes a network's parameters and statistics as safetensors, with what `about` says."""
    _write(place, safetensors(predictor))


def safetensors(predictor: Predictor) -> bytes:
    """Returns the content of a file of a network's parameters and statistics."""
    from safetensors.numpy import save

    # One entry, because several come in any order.
    return save(parameters(predictor.variables), {"about": json.dumps(about(predictor))})


def _write(place: Path, content: bytes) -> None:
    with files.writing(place.absolute().parent):
        files.write_bytes(place, content)
