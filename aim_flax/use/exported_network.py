"""A trained network in one file, which this is a part of: without aim_flax, it needs jax and
flatbuffers; and Pillow, opencv-python-headless and simplejpeg to read images.

    import sys

    sys.path.insert(0, "network.zip")
    from aim_network import Network

    network = Network("network.zip")
    print(network.predict("photo.jpg"))
"""

import json
import struct
import zipfile

import jax
import numpy as np
from jax import export


class Network:
    """The network of such a file, on the devices of this machine: CPU, CUDA or TPU.

    Attributes:
      classes: their names.
      shape: (H, W, C) of the images that it takes.
      about: the file's network.json.
    """

    def __init__(self, file):
        with zipfile.ZipFile(file) as archive:
            self.about = json.loads(archive.read("aim_network/network.json"))
            self._parameters = read_safetensors(archive.read("aim_network/parameters.safetensors"))
            exported = export.deserialize(bytearray(archive.read("aim_network/network.jax")))
        self.classes = self.about["classes"]
        self.shape = tuple(self.about["decoding"]["shape"])
        self._parameters = jax.device_put(self._parameters)
        self._call = jax.jit(exported.call)

    def __call__(self, pixels):
        """Returns the classes' probabilities, (B, classes) float32, for (B, H, W, C) uint8."""
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            found = f"{pixels.dtype} {pixels.shape}"
            raise ValueError(f"pixels are {found}, expected uint8 (images, {expected})")
        return np.asarray(self._call(self._parameters, pixels))

    def pixels(self, file):
        """Returns an image file as the network takes it, (H, W, C) uint8."""
        # Imported here because whoever has pixels needs no decoder.
        from aim_network.images import load

        with open(file, "rb") as opened:
            pixels = load(opened.read(), **self.about["decoding"])
        white = self.about["white"]
        return pixels if white == 255 else np.rint(pixels * (white / 255)).astype(np.uint8)

    def predict(self, file):
        """Returns the most probable class of an image file, and its probability."""
        (found,) = self(self.pixels(file)[None])
        best = int(found.argmax())
        return self.classes[best], float(found[best])


def read_safetensors(content):
    """Returns {name: array} of a file of the format safetensors: the length of a header, the
    header (JSON), and the arrays."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    kinds |= {"I16": "<i2", "I8": "i1", "U32": "<u4", "U8": "u1", "BOOL": "?"}
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        kind = jax.numpy.bfloat16 if entry["dtype"] == "BF16" else kinds[entry["dtype"]]
        arrays[name] = np.frombuffer(content[start:stop], kind).reshape(entry["shape"])
    return arrays
