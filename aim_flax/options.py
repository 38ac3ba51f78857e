"""What the values of a config may be: a condition for each option of configs/base.py.

Types are the config's own to check, and names (of an optimiser, a memory, ...) are checked where
they are looked up.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from aim_flax.errors import UsageError

# More threads than any machine has cores; epochs that no run lives to see.
_MOST_THREADS, _MOST_EPOCHS = 1024, 1_000_000


@dataclasses.dataclass(frozen=True)
class Condition:
    """What an option's value must be.

    Attributes:
      expected: in words, for the message.
      holds: of a value that is not None.
    """

    expected: str
    holds: Callable[[Any], bool]


def _at_least(low: float) -> Condition:
    return Condition(f"at least {low}", lambda value: value >= low)


def _below(high: float) -> Condition:
    return Condition(f"at least 0 and less than {high}", lambda value: 0 <= value < high)


def _up_to(most: int) -> Condition:
    return Condition(f"1 to {most:,}", lambda value: 1 <= value <= most)


def _each(what: str, least: int = 0, most: float = math.inf) -> Condition:
    """Several whole numbers of at least 1; of these `least` to `most`."""

    def holds(values: Sequence[int]) -> bool:
        return least <= len(values) <= most and all(isinstance(v, int) and v >= 1 for v in values)

    return Condition(f"{what}, each at least 1", holds)


def _or_several(one: Condition, several: Condition) -> Condition:
    """A number, or several."""
    return Condition(
        one.expected, lambda value: (one if isinstance(value, int) else several).holds(value)
    )


# Infinity is no number of these.
_NUMBER = Condition("a number of at least 0", lambda value: 0 <= value < math.inf)
_ABOVE_0 = Condition("a number above 0", lambda value: 0 < value < math.inf)
_SHARE = Condition("a share from 0 to 1", lambda value: 0 <= value <= 1)
_COUNT = _at_least(1)
_STAGES = _each("a number for each stage", 1)
# It becomes a part of the default workdir's name.
_NAME = Condition(
    "a name of up to 100 characters, without slashes",
    lambda value: re.fullmatch(r"[^/\\\x00-\x1f]{1,100}", value) and value not in (".", ".."),
)

CONDITIONS: Mapping[str, Condition] = {
    "name": _NAME,
    "arm": _NAME,
    "seed": Condition("0 to 2**32 - 1", lambda value: 0 <= value < 2**32),
    "data.image_shape": _each("height, width, and 3 channels or 1 (grey)", 3, 3),
    "data.scale": _ABOVE_0,
    "data.centre": Condition("a share above 0, at most 1", lambda value: 0 < value <= 1),
    "data.val_fraction": _below(1),
    "data.test_fraction": _below(1),
    "data.train_images": _COUNT,
    "data.in_memory_mb": _at_least(0),
    "data.threads": _up_to(_MOST_THREADS),
    "augment.crop": _SHARE,
    "augment.rotation": _NUMBER,
    "augment.translation": _NUMBER,
    "augment.shift": _NUMBER,
    "augment.contrast": _NUMBER,
    "model.num_classes": _COUNT,
    "model.features": _each("a width for each hidden layer"),
    "model.dropout": _below(1),
    "model.stage_sizes": _STAGES,
    "model.width": _or_several(_COUNT, _STAGES),
    "model.widths": _STAGES,
    "model.dense_sizes": _each("a width for each dense layer"),
    "model.stem_stride": _COUNT,
    "model.stem_width": _COUNT,
    "model.top_width": _COUNT,
    "model.momentum": _SHARE,
    "model.epsilon": _ABOVE_0,
    "memory.read": Condition("a pattern of the layers that read it", bool),
    "memory.per": Condition(
        "beginnings of layers' paths, such as ('stage1','stage2')",
        lambda values: all(isinstance(value, str) and value for value in values),
    ),
    "memory.update_block.features": _each("a number of channels for each layer"),
    "memory.update_block.momentum": _SHARE,
    "memory.update_block.epsilon": _ABOVE_0,
    "memory.learning_rate_scale": _NUMBER,
    "instead.hidden": _each("hidden sizes of the gates"),
    "instead.stddev": _NUMBER,
    "optimizer.learning_rate": _NUMBER,
    "optimizer.b1": _below(1),
    "optimizer.b2": _below(1),
    "optimizer.eps": _ABOVE_0,
    "optimizer.weight_decay": _NUMBER,
    "optimizer.momentum": _below(1),
    "schedule.warmup_epochs": _NUMBER,
    "schedule.plateau_patience": _COUNT,
    "schedule.plateau_factor": _SHARE,
    "schedule.plateau_min_delta": _NUMBER,
    "schedule.reference_batch": _COUNT,
    "train.batch_size": _COUNT,
    "train.accumulate": _COUNT,
    "train.ema_decay": _below(1),
    "train.epochs": _up_to(_MOST_EPOCHS),
    "train.stop_patience": _COUNT,
    "train.stop_min_delta": _NUMBER,
    "train.steps_per_call": _COUNT,
    "train.checkpoint_minutes": _at_least(0),
    "eval.batch_size": _COUNT,
}


def check_values(values: Mapping[str, Any], keys: Collection[str] | None = None) -> None:
    """Raises UsageError for a value that its option can't have.

    Args:
      values: {dotted key: value}. Whether one can be None is the config's own to check, and a
        network from elsewhere has fields of its own.
      keys: those that are checked; None: all.
    """
    own_network = ":" in str(values.get("model.name"))
    for key, value in values.items():
        condition, (group, _, name) = CONDITIONS.get(key), key.partition(".")
        if condition is None or value is None or (keys is not None and key not in keys):
            continue
        if own_network and group == "model" and name != "num_classes":
            continue
        try:
            holds = condition.holds(value)
        except TypeError:  # A config of someone's own may hold any type.
            holds = False
        if not holds:
            shown = value if isinstance(value, int | float) else repr(value)
            raise UsageError(f"{key} is {shown}, expected {condition.expected}")
