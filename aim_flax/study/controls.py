"""Controls that isolate a memory: variants of a config, each without one thing the memory adds.

A network with a memory has more parameters and does more arithmetic than the plain network. Its
memory is worth what it gains over controls that have as much of both, over memories that are not
learned or hold nothing, and over what is known to do as much without a memory: to tell a layer
where it is, to bring a summary of the image to every place, and to change what a layer computes.
"""

import copy
import re
from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from aim_flax.errors import UsageError, check_choice
from aim_flax.memory import Memory, check_memory
from aim_flax.models.build import build_model, trained
from aim_flax.models.describe import multiply_adds
from aim_flax.models.resnet import stage_widths

TOLERANCE = 0.01


def derive(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the config of a control, a locked copy with `arm` set to its name; all else is equal.

    - `control`: the plain network.
    - `control_params`: a wider plain network with as many trainable parameters, within 1 %.
    - `control_compute`: a wider plain network with as many multiply-adds, per image of a training
      batch's forward pass, within 1 %.
    - `coords`, `position_bias`: the plain network whose layers, where they could read the memory,
      see their coordinates, or have a bias of their own at each position: see `Instead`. Layers of
      vectors, which have no positions, stay as they are.
    - `squeeze_excite`, `low_rank`: the plain network with gates after all these layers, or with
      changes of low rank to their kernels, of such sizes that there are as many trainable
      parameters, within 1 %.
    - `memory_frozen`: a memory that keeps its initial values; reads and updates are trained.
    - `memory_noise`, `memory_zero`: a memory of that kind, which holds nothing learned.
    - `memory_half`, `memory_double`: half and twice the floats, by its channels.

    Args:
      config: of a network with a memory.
      name: one of CONTROLS.

    Raises:
      UsageError: an unknown name; a config without memory; a size that cannot be reached.
    """
    check_choice("the control", name, CONTROLS)
    if config.memory is None:
        raise UsageError(f"{config.name}:{config.arm} has no memory to derive {name} from")
    control = copy.deepcopy(config)
    with control.unlocked():
        CONTROLS[name](control)
        control.arm = name
    return control.lock()


def count(config: ConfigDict) -> tuple[int, int]:
    """Returns the size of a config's network; nothing is compiled or allocated.

    Returns:
      The trainable parameters, and the multiply-adds per image of the forward pass of a training
      batch, rounded: what a memory brings once for the whole batch counts once, as it is computed.
    """
    batch_size = config.train.batch_size
    images = _images(config, batch_size)
    # One trace for both: what draws the initial values multiplies no matrices.
    trace = jax.make_jaxpr(build_model(config).init, return_shape=True)
    jaxpr, variables = trace(jax.random.key(0), images)
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return params, round(multiply_adds(jaxpr.jaxpr) / batch_size)


def _images(config: ConfigDict, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *config.data.image_shape), jnp.float32)


def _take_memory_away(config: ConfigDict) -> None:
    config.memory = None


def _know_positions(config: ConfigDict, kind: str) -> None:
    """Puts coordinates, or a bias per position, where the memory is read."""
    places = trained(build_model(config)).places(_images(config, 1))
    reads = {place.path: place.shape for place in places if place.what == "read"}
    with_positions = [path for path, shape in reads.items() if len(shape) > 2]
    if not with_positions:
        raise UsageError(
            f"{config.name}:{config.arm} reads its memory in layers of vectors only, which have no"
            " positions"
        )
    at = _pattern_of_reads(config)
    if len(with_positions) < len(reads):
        at = "|".join(map(re.escape, with_positions))
    _put_instead(config, kind, at)


def _sized(config: ConfigDict, kind: str) -> None:
    """Puts something where the memory is read that has as many parameters as all of the memory."""
    goal, _ = count(config)
    _put_instead(config, kind, _pattern_of_reads(config))
    layers = build_model(config).places(_images(config, 1))
    channels = [layer.channels for layer in layers]
    # Each of its matrices has `hidden` rows or columns.
    config.instead.hidden = (1,)
    alone, each = _sizes_by_layer(config, [layer.path for layer in layers])

    def size(hidden: tuple[int, ...]) -> int:
        return alone + sum(n * h for n, h in zip(each, hidden, strict=True))

    def scaled(units: int) -> tuple[int, ...]:
        return tuple(max(1, round(units * c / max(channels))) for c in channels)

    hidden = _match(size, scaled, max(channels), goal)
    if abs(size(hidden) - goal) > TOLERANCE * goal:
        raise UsageError(
            f"no hidden sizes have the {goal:,} trainable parameters of {config.name}:{config.arm}"
            f" within {TOLERANCE:.0%}; nearest: {size(hidden):,} with {hidden}"
        )
    config.instead.hidden = hidden


def _sizes_by_layer(config: ConfigDict, layers: Sequence[str]) -> tuple[int, list[int]]:
    """Returns the parameters of the network alone, and of what is latched on to each layer."""
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), _images(config, 1))
    params = flatten_dict(shapes["params"], sep="/")
    sizes = {
        path: sum(leaf.size for leaf in jax.tree.leaves(value)) for path, value in params.items()
    }
    starts = [f"{layer}/{config.instead.kind}/" for layer in layers]
    each = [sum(n for path, n in sizes.items() if path.startswith(start)) for start in starts]
    return sum(sizes.values()) - sum(each), each


def _pattern_of_reads(config: ConfigDict) -> str:
    """Returns the pattern of the layers that read the memory: `read_initial` are some of them."""
    patterns = config.memory.read
    if isinstance(patterns, str):
        return patterns
    return "|".join(f"(?:{pattern})" for pattern in patterns if pattern)


def _put_instead(config: ConfigDict, kind: str, at: str) -> None:
    config.memory = None
    config.instead = ConfigDict(
        {"kind": kind, "at": at, "hidden": (), "stddev": 0.0, "zero_init": False}
    )


def _widen(config: ConfigDict, which: int, what: str) -> None:
    """Takes the memory away and widens the network until it has as much of `count(...)[which]`."""
    if config.model.get("pretrained") is not None:
        raise UsageError(
            f"{config.name}:{config.arm} starts from {config.model.pretrained}, which fits no wider"
            " network: derive it with --config.model.pretrained=None"
        )
    goal = count(config)[which]
    config.memory = None

    @cache
    def size(widths: tuple[int, ...]) -> int:
        _set_widths(config, widths)
        return count(config)[which]

    start = _widths(config)
    if not start:
        raise UsageError(f"{config.name}:{config.arm} has no hidden layer that can be widened")
    widest = max(start)

    def scaled(units: int) -> tuple[int, ...]:
        return tuple(width + round(width * units / widest) for width in start)

    widths = _match(size, scaled, widest, goal)
    if abs(size(widths) - goal) > TOLERANCE * goal:
        raise UsageError(
            f"no widths of {config.model.name} have the {goal:,} {what} of"
            f" {config.name}:{config.arm} within {TOLERANCE:.0%}; nearest: {size(widths):,}"
            f" with {widths}"
        )
    _set_widths(config, widths)


def _match(
    size: Callable[[tuple[int, ...]], int],
    scaled: Callable[[int], tuple[int, ...]],
    limit: int,
    goal: int,
) -> tuple[int, ...]:
    """Returns widths whose size is within TOLERANCE of the goal, or near it.

    All are widened in proportion as far as the goal allows; the rest goes to single layers, those
    with the largest units first.

    Args:
      size: of the network with these widths.
      scaled: from a number of units, at least 0, to the widths with as many more, in proportion.
      limit: a first guess at a number of units that is too large.
    """

    def wider(widths: tuple[int, ...], layer: int, units: int) -> tuple[int, ...]:
        return tuple(width + units * (i == layer) for i, width in enumerate(widths))

    def distance(widths: tuple[int, ...]) -> int:
        return abs(size(widths) - goal)

    widths = scaled(_most(lambda units: size(scaled(units)), goal, limit))
    if distance(widths) <= TOLERANCE * goal:
        return widths
    layers = range(len(widths))
    for layer in sorted(layers, key=lambda i: size(wider(widths, i, 1)), reverse=True):
        grow = partial(wider, widths, layer)
        widths = grow(_most(lambda units, grow=grow: size(grow(units)), goal, 1))
        if distance(widths) <= TOLERANCE * goal:
            return widths
    return min(widths, *(wider(widths, layer, 1) for layer in layers), key=distance)


def _most(size: Callable[[int], int], goal: int, limit: int) -> int:
    """Returns the most units, at least 0, whose size (which grows with them) is within the goal.

    `limit` is a first guess at a number that is too large.
    """
    if size(0) >= goal:
        return 0
    while size(limit) <= goal:
        limit *= 2
    # Imported here because it takes a while, and few studies have these controls.
    from scipy.optimize import brentq

    # Sizes are nearly quadratic in the units: this takes few steps, bisection many.
    root = brentq(lambda units: size(int(units)) - goal, 0, limit, xtol=1)
    units = int(root) + 1
    while size(units) > goal:
        units -= 1
    return units


def _widths(config: ConfigDict) -> tuple[int, ...]:
    """Returns the widths of the layers between image and head, in their order."""
    model = config.model
    if model.name == "mlp":
        return tuple(model.features)
    if model.name == "vgg":
        return (*model.widths, *model.dense_sizes)
    if model.name == "resnet":
        return stage_widths(model.width, model.stage_sizes)
    if model.name == "efficientnet_lite":
        return (model.stem_width, *model.widths, model.top_width)
    widths = model.get(_own_field(model))
    return tuple(widths) if isinstance(widths, Sequence) else (widths,)


def _own_field(model: ConfigDict) -> str:
    """Returns the field of a network from elsewhere that has its widths."""
    fields = [field for field in ("features", "widths", "width") if model.get(field) is not None]
    if len(fields) != 1:
        raise UsageError(
            f"{model.name} can be widened where its config has one of model.features, model.widths"
            f" and model.width, a number or several; it has {', '.join(fields) or 'none'}"
        )
    return fields[0]


def _set_widths(config: ConfigDict, widths: tuple[int, ...]) -> None:
    model = config.model
    with model.ignore_type():  # A ResNet's width is one number; a saved config has lists.
        if model.name == "mlp":
            model.features = widths
        elif model.name == "vgg":
            stages = len(model.stage_sizes)
            model.widths, model.dense_sizes = widths[:stages], widths[stages:]
        elif model.name == "resnet":
            model.width = widths
        elif model.name == "efficientnet_lite":
            model.stem_width, *stages, model.top_width = widths
            model.widths = tuple(stages)
        else:
            field = _own_field(model)
            model[field] = widths if isinstance(model[field], Sequence) else widths[0]


def _memory(**values: float | str) -> Callable[[ConfigDict], None]:
    return lambda config: config.memory.update(values)


def _scale_channels(config: ConfigDict, factor: float) -> None:
    memory = config.memory
    *rest, channels = check_memory(memory.shape, memory.get("kind", Memory.kind))
    scaled = factor * channels
    if scaled % 1:
        raise UsageError(f"memory.shape is {memory.shape}: {channels} channels cannot be halved")
    with memory.ignore_type():  # A number is a shape, too; a saved config has lists.
        memory.shape = (*rest, int(scaled))


CONTROLS: dict[str, Callable[[ConfigDict], None]] = {
    "control": _take_memory_away,
    "control_params": partial(_widen, which=0, what="trainable parameters"),
    "control_compute": partial(_widen, which=1, what="multiply-adds"),
    "coords": partial(_know_positions, kind="coords"),
    "position_bias": partial(_know_positions, kind="position_bias"),
    "squeeze_excite": partial(_sized, kind="squeeze_excite"),
    "low_rank": partial(_sized, kind="low_rank"),
    "memory_frozen": _memory(learning_rate_scale=0.0),
    "memory_noise": _memory(kind="noise"),
    "memory_zero": _memory(kind="zero"),
    "memory_half": partial(_scale_channels, factor=0.5),
    "memory_double": partial(_scale_channels, factor=2),
}
