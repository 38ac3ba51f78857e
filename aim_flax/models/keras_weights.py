"""Weights of the published Keras network, as variables of ours."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from aim_flax.errors import UsageError, nearest

Weights = Mapping[str, Mapping[str, np.ndarray]]
STAGE_SIZES = (3, 4, 6, 3)
WIDTH = 64
UPDATE_FEATURES = (16, 16, 32)
ROLES = {
    "kernel": ("params", "kernel"),
    "bias": ("params", "bias"),
    "gamma": ("params", "scale"),
    "beta": ("params", "bias"),
    "moving_mean": ("batch_stats", "mean"),
    "moving_variance": ("batch_stats", "var"),
}


class _Weight(NamedTuple):
    """One weight: its Keras layer and role, its place in the Flax variables, its shape."""

    layer: str
    role: str
    place: tuple[str, ...]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.layer}/{self.role}"


def variables_from_keras(weights: Weights) -> dict[str, dict]:
    """Turns weights of the published AiM-ResNet50 into variables of ours.

    The network is `AiM` around `ResNet` with the published patterns and read_mode "concat", for
    the number of classes, the memory's channels and the memory's size that the weights show;
    `split_reads` gives the "add" form.

    Args:
      weights: arrays by layer name and role (kernel, bias, gamma, beta, moving_mean,
        moving_variance).

    Returns:
      {"params": ..., "batch_stats": ...}: the same arrays, dtypes unchanged.

    Raises:
      UsageError: names a weight that is missing, unknown or of the wrong shape.
    """
    shapes = {
        (layer, role): np.shape(array)
        for layer, roles in weights.items()
        for role, array in roles.items()
    }
    expected = {(weight.layer, weight.role): weight for weight in _published(shapes)}
    for key, weight in expected.items():
        if key not in shapes:
            raise UsageError(
                f"the Keras weights lack {weight}, of shape {form(weight.shape)}"
                + nearest(str(weight), ["/".join(k) for k in shapes if k not in expected])
            )
    for layer, role in shapes:
        if (layer, role) not in expected:
            raise UsageError(
                f"the Keras weights have {layer}/{role}, which is none of the published network's"
                + nearest(f"{layer}/{role}", map(str, expected.values()))
            )
    for key, weight in expected.items():
        if shapes[key] != weight.shape:
            raise UsageError(
                f"the Keras weight {weight} has shape {form(shapes[key])}, expected"
                f" {form(weight.shape)}"
            )
    return traverse_util.unflatten_dict(
        {weight.place: weights[weight.layer][weight.role] for weight in expected.values()}
    )


def split_reads(variables: Mapping[str, Any], plain_params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns the variables of a read_mode "concat" network into those of its "add" form.

    In a read's kernel the input channels are the feature map's first, then the memory's: the
    first stay with the layer, the others become the kernel of its `memory_read`.

    Args:
      variables: of the latched network.
      plain_params: parameters of the backbone without memory, or anything else with the same
        tree and shapes (`jax.eval_shape`).

    Returns:
      `variables` with other "params", whose function is the same.

    Raises:
      UsageError: where a parameter of the backbone is missing, or differs from the plain one in
        more than the number of its input channels.
    """
    params = traverse_util.flatten_dict(variables["params"])
    for place, plain in traverse_util.flatten_dict(plain_params).items():
        name = "/".join(place)
        if place not in params:
            raise UsageError(f"the latched network lacks the backbone's parameter {name}")
        joint = params[place]
        if joint.shape == plain.shape:
            continue
        axis = _grown_axis(plain.shape, joint.shape)
        if axis is None or place[-1] != "kernel":
            raise UsageError(
                f"the parameter {name} has shape {form(joint.shape)}, which is not"
                f" {form(plain.shape)} with a memory's channels appended"
            )
        before = (slice(None),) * axis
        params[place] = joint[*before, : plain.shape[axis]]
        params[*place[:-1], "memory_read", "kernel"] = joint[*before, plain.shape[axis] :]
    return {**variables, "params": traverse_util.unflatten_dict(params)}


def read_keras_hdf5(path: str | PathLike) -> dict[str, dict[str, np.ndarray]]:
    """Reads the weights in a Keras HDF5 file, which needs the extra `keras` (h5py).

    Args:
      path: of what Keras 2 writes by `save_weights("x.h5")` or, as a whole model, by
        `save("x.h5")`; Keras 3 still writes the latter. Not the `.weights.h5` of Keras 3.

    Returns:
      {layer name: {role: array}}, without the layers that have no weights.

    Raises:
      UsageError: when the file is absent, damaged or of another layout, or h5py is.
    """
    try:
        import h5py
    except ImportError:
        raise UsageError(
            "reading Keras weights needs h5py: install the extra `keras` (aim_flax[keras])"
        ) from None
    try:
        with h5py.File(path) as file:
            group = file.get("model_weights", file)
            layers = {name: dict(_arrays(group[name])) for name in _names(group, "layer_names")}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    # What h5py raises depends on where the file is damaged.
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UsageError(
            f'{path} holds no weights that Keras 2 wrote by save_weights("x.h5") or save("x.h5"),'
            f" or is damaged: {message}"
        ) from None
    return {layer: arrays for layer, arrays in layers.items() if arrays}


def _arrays(layer: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (role, array) for each weight of a layer's HDF5 group."""
    for name in _names(layer, "weight_names"):
        # Such as "conv1/kernel:0"; Keras 3 leaves out the ":0".
        yield name.split("/")[-1].partition(":")[0], layer[name][()]


def _names(group: Any, attribute: str) -> list[str]:
    names = group.attrs[attribute]
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _published(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> Iterator[_Weight]:
    """Yields every weight of the published network, sized as most of the given shapes show."""
    classes = _deduce(shapes, [("fc1000", "kernel", 2), ("fc1000", "bias", 1)], "classes")
    memories = ["mem_init", "mem_global", *(f"Memory{stage}a_branch" for stage in (2, 3, 4))]
    ends = [(layer, *end) for layer in memories for end in (("kernel", 4), ("bias", 1))]
    depth = _deduce(shapes, ends, "D")
    yield from _layer("conv1", ("stem", "conv"), (7, 7, 3, WIDTH))
    yield from _norm("bn_conv1", ("stem", "norm"), WIDTH)
    for layer, name in ("mem_init", "memory"), ("mem_global", "memory_initial"):
        yield from _layer(layer, (name, "conv"), (1, 1, depth, depth))
    inputs = WIDTH
    # The stem's map is as large as stage 1's, so the memory has as many channels there.
    memory = _memory_channels(shapes, 1)
    for stage, blocks in enumerate(STAGE_SIZES, start=1):
        features = WIDTH * 2 ** (stage - 1)
        for block in range(1, blocks + 1):
            layer, name = f"{stage + 1}{'abcdef'[block - 1]}", f"stage{stage}_block{block}"
            kernels = [(1, 1, _sum(inputs, memory), features), (3, 3, features, features)]
            kernels.append((1, 1, features, 4 * features))
            for i, kernel in enumerate(kernels):
                branch = f"{layer}_branch2{'abc'[i]}"
                yield from _layer(f"res{branch}", (name, f"conv{i + 1}"), kernel)
                yield from _norm(f"bn{branch}", (name, f"norm{i + 1}"), kernel[-1])
            if block == 1:
                kernel = (1, 1, inputs, 4 * features)
                yield from _layer(f"res{layer}_branch1", (name, "shortcut"), kernel)
                yield from _norm(f"bn{layer}_branch1", (name, "shortcut_norm"), kernel[-1])
                memory = _memory_channels(shapes, stage)
            inputs = 4 * features
            if block == 1 and stage < len(STAGE_SIZES):
                yield from _update(layer, (name, "memory_update"), _sum(inputs, memory), depth)
    yield from _layer("fc1000", ("head",), (inputs, classes))


def _update(
    block: str, place: tuple[str, ...], inputs: int | str, depth: int | str
) -> Iterator[_Weight]:
    for i, features in enumerate(UPDATE_FEATURES):
        kernel = (3, 3, inputs, features)
        yield from _layer(f"mem_conv{block}_branch_{'abc'[i]}", (*place, f"conv{i + 1}"), kernel)
        yield from _norm(f"mem_bn{block}_branch_2{'abc'[i]}", (*place, f"norm{i + 1}"), features)
        inputs = features
    yield from _layer(f"Memory{block}_branch", (*place, "output"), (1, 1, inputs, depth))


def _layer(name: str, place: tuple[str, ...], kernel: tuple[int | str, ...]) -> Iterator[_Weight]:
    yield from _weights(name, place, kernel=kernel, bias=kernel[-1:])


def _norm(name: str, place: tuple[str, ...], features: int) -> Iterator[_Weight]:
    roles = ("gamma", "beta", "moving_mean", "moving_variance")
    yield from _weights(name, place, **dict.fromkeys(roles, (features,)))


def _weights(
    name: str, place: tuple[str, ...], **roles: tuple[int | str, ...]
) -> Iterator[_Weight]:
    for role, shape in roles.items():
        collection, parameter = ROLES[role]
        yield _Weight(name, role, (collection, *place, parameter), shape)


def _memory_channels(shapes: Mapping[tuple[str, str], tuple[int, ...]], stage: int) -> int | str:
    """Deduces how many channels the memory has on the maps that `stage` puts out."""
    inputs = 4 * WIDTH * 2 ** (stage - 1)
    layers = [f"res{stage + 1}{block}_branch2a" for block in "bcdef"[: STAGE_SIZES[stage - 1] - 1]]
    if stage < len(STAGE_SIZES):
        layers += [f"res{stage + 2}a_branch2a", f"mem_conv{stage + 1}a_branch_a"]
    reads = [(layer, "kernel", 4) for layer in layers]
    return _deduce(shapes, reads, "memory", axis=-2, front=inputs)


def _deduce(
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    readings: Iterable[tuple[str, str, int]],
    unknown: str,
    axis: int = -1,
    front: int = 0,
) -> int | str:
    """Returns the commonest size along `axis`, less `front`, of weights (layer, role, rank).

    Where none shows a positive one, returns `unknown`, which then stands in the error's shape.
    """
    sizes: Counter[int] = Counter()
    for layer, role, rank in readings:
        shape = shapes.get((layer, role), ())
        if len(shape) == rank and shape[axis] > front:
            sizes[shape[axis] - front] += 1
    return sizes.most_common(1)[0][0] if sizes else unknown


def _sum(inputs: int, memory: int | str) -> int | str:
    return inputs + memory if isinstance(memory, int) else f"{inputs} + {memory}"


def _grown_axis(plain: tuple[int, ...], joint: tuple[int, ...]) -> int | None:
    """Returns the only axis along which `joint` is longer than `plain`, None if there is none."""
    if len(plain) != len(joint):
        return None
    differing = [i for i, n in enumerate(plain) if joint[i] != n]
    if len(differing) != 1 or joint[differing[0]] < plain[differing[0]]:
        return None
    return differing[0]


def form(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
