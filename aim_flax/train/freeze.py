"""Parts of a network that keep their values, and parts with a learning rate of their own."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, path_aware_map

from aim_flax.errors import UsageError, nearest
from aim_flax.layers.of_two import SCOPE as READ

_TRAINED, _FROZEN = "trained", "frozen"


def freezing(
    optimizer: optax.GradientTransformation, pattern: str, reads_from_zero: bool = False
) -> optax.GradientTransformation:
    """Returns an optimiser that leaves parameters alone whose whole path a pattern matches.

    It keeps no state for them, and as nothing asks for their gradients, XLA computes none.

    Args:
      reads_from_zero: whether what reads a memory starts at zero, see `AiM.zero_init`.

    Raises:
      UsageError: when its state is made: the pattern matches no parameter, or all, or all reads of
        a memory, which start at zero.
    """
    frozen = compiled("train.freeze", pattern)

    def labels(params: Mapping[str, Any]) -> dict[str, Any]:
        found = path_aware_map(
            lambda path, _: _FROZEN if frozen.fullmatch("/".join(path)) else _TRAINED, params
        )
        paths = _paths(params)
        if len(kinds := set(jax.tree.leaves(found))) == 1:
            which = "no parameter" if kinds == {_TRAINED} else "all parameters"
            raise UsageError(
                f"train.freeze {pattern!r} matches {which} of the network, such as {paths[0]}"
                + (nearest(pattern, paths) if kinds == {_TRAINED} else "")
            )
        reads = [path for path in paths if f"/{READ}/" in path]
        if reads_from_zero and reads and all(map(frozen.fullmatch, reads)):
            raise UsageError(
                f"train.freeze {pattern!r} matches all that reads the memory, such as {reads[0]},"
                f" which starts at zero: so the memory could do nothing; leave out .*/{READ}/.*"
            )
        return found

    return optax.partition({_TRAINED: optimizer, _FROZEN: optax.set_to_zero()}, labels)


def rescaling(rates: Sequence[str]) -> optax.GradientTransformation:
    """Returns what multiplies changes by the factor of the first pattern that matches the path.

    Args:
      rates: "PATTERN=FACTOR".

    Raises:
      UsageError: something else; when its state is made: a pattern that matches no parameter.
    """
    factors = [_rate(text) for text in rates]

    def factor(path: Sequence[str]) -> float:
        name = "/".join(path)
        return next((number for pattern, number in factors if pattern.fullmatch(name)), 1.0)

    def init(params: Mapping[str, Any]) -> optax.EmptyState:
        paths = _paths(params)
        for pattern, _ in factors:
            if not any(map(pattern.fullmatch, paths)):
                raise UsageError(
                    f"train.rates: {pattern.pattern!r} matches no parameter of the network, such as"
                    f" {paths[0]}{nearest(pattern.pattern, paths)}"
                )
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        return path_aware_map(lambda path, change: _times(change, factor(path)), updates), state

    return optax.GradientTransformation(init, update)


@contextlib.contextmanager
def frozen_norms(pattern: str) -> Iterator[None]:
    """Within it, batch norms whose parameters are all frozen use their running statistics.

    They keep them, too: what is frozen is the same function in training and in evaluation.
    """
    if not pattern:
        yield
        return
    frozen = re.compile(pattern)

    def intercept(
        call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
            params = module.variables.get("params", {})
            # What is latched on to it lies below it.
            own = [name for name, value in params.items() if not isinstance(value, Mapping)]
            path = "/".join(module.path)
            if own and all(frozen.fullmatch(f"{path}/{name}") for name in own):
                if module.use_running_average is None:
                    kwargs = {**kwargs, "use_running_average": True}
                    args = args[:1]
                else:
                    # This instance lives for this call of the network only.
                    object.__setattr__(module, "use_running_average", True)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def _rate(text: str) -> tuple[re.Pattern, float]:
    pattern, _, number = str(text).rpartition("=")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not pattern or not 0 < factor < math.inf:
        raise UsageError(
            f"train.rates has {text!r}, expected 'PATTERN=FACTOR' with a factor above 0;"
            " train.freeze is for what is not trained"
        )
    return compiled("train.rates", pattern), factor


def compiled(key: str, pattern: str) -> re.Pattern:
    """Returns a pattern compiled; UsageError, with its key, for what is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{key}: {pattern!r} is no regular expression: {error}") from None


def _paths(params: Mapping[str, Any]) -> list[str]:
    return ["/".join(path) for path in flatten_dict(params)]


def _times(change: Any, factor: float) -> Any:
    # What is frozen has an empty node in its place.
    return change if factor == 1 or isinstance(change, optax.MaskedNode) else change * factor
