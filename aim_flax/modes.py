"""Whether a network is called in training or in evaluation, in its own words."""

import dataclasses
import inspect
from typing import Any

import jax
from flax import linen as nn

from aim_flax.errors import UsageError, check_choice

# What networks call the argument, and what it means where it is True.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "is_train": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
    "eval": False,
    "is_eval": False,
}
NO_MODE = "none"
_REST = inspect.Parameter.VAR_KEYWORD


def resolve(
    backbone: nn.Module,
    declared: str | None,
    train: bool | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: str = "__call__",
) -> tuple[bool, dict[str, Any]]:
    """Finds out in which mode a network is called, and tells it in its own words.

    Args:
      backbone: the network.
      declared: the name of its mode argument, one of MODES, or "none"; None: the one of them that
        its `__call__` has, or, where that has none, a field of that name.
      train: the mode that the caller asks for; None: that of the backbone's own argument, by
        default its default, and evaluation where there is none.
      args, kwargs: for the network, its mode argument perhaps among them.
      method: the name of what is called.

    Returns:
      Whether it is training, and the keyword arguments, the mode among them where it is asked for.

    Raises:
      UsageError: two arguments, or `**kwargs`, that may be the mode; modes that contradict each
        other; a mode that is not known at tracing.
    """
    backbone, method = _entry(backbone, method)
    if not any(method in vars(base) for base in type(backbone).__mro__):
        own = [name for name, value in vars(type(backbone)).items() if callable(value)]
        own = [name for name in own if not name.startswith("_") and name != "setup"]
        raise UsageError(
            f"{type(backbone).__name__} has no {method}: say what is called, with method=NAME; it"
            f" has {', '.join(own) or 'none'}"
        )
    called = inspect.signature(getattr(type(backbone), method))
    what = f"{type(backbone).__name__}.{method}"
    kinds = {p.kind for p in called.parameters.values()}
    if method != "__call__" and declared not in called.parameters and _REST not in kinds:
        declared = None  # It is what the network's call takes.
    name = _mode_argument(backbone, what, called, declared)
    if name is None:
        fixed = _fixed_by_field(backbone) if declared is None else None
        return _agree(backbone, train, *(fixed or (None, None))), kwargs
    field = getattr(backbone, name, None)
    try:
        bound = called.bind_partial(None, *args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{what} cannot be called so: {error}") from None
    given = bound.arguments.get(name, kwargs.get(name))
    if given is not None:
        return _agree(backbone, train, name, given), kwargs
    if isinstance(field, bool):
        return _agree(backbone, train, name, field), kwargs
    parameter = called.parameters.get(name)
    if train is None and parameter is not None and isinstance(parameter.default, bool):
        return _agree(backbone, None, name, parameter.default), kwargs
    train = _agree(backbone, train, None, None)
    return train, {**kwargs, name: train == MODES[name]}


def _entry(backbone: nn.Module, method: str) -> tuple[nn.Module, str]:
    """Returns the module whose method gets the arguments: of an nn.Sequential, its first."""
    while isinstance(backbone, nn.Sequential) and backbone.layers:
        if not isinstance(backbone.layers[0], nn.Module):
            break
        backbone, method = backbone.layers[0], "__call__"
    return backbone, method


def _mode_argument(
    entry: nn.Module, what: str, called: inspect.Signature, declared: str | None
) -> str | None:
    """Returns the name of the mode argument, None where there is none."""
    if declared == NO_MODE:
        return None
    parameters = called.parameters
    hides = any(p.kind is _REST for p in parameters.values())
    if declared is not None:
        check_choice("mode", declared, (*MODES, NO_MODE))
        if declared not in parameters and not hides:
            raise UsageError(f"mode is {declared!r}, which {what} does not take")
        return declared
    found = [name for name in parameters if name in MODES]
    if len(found) > 1:
        raise UsageError(
            f"{what} takes {' and '.join(found)}: say which of them tells training from"
            f" evaluation, with AiM(..., mode={found[0]!r})"
        )
    if not found and hides and not isinstance(entry, nn.Sequential):
        raise UsageError(
            f"{what} takes **kwargs, behind which its mode argument may be: name it"
            f" with AiM(..., mode='train'), or say that there is none with mode={NO_MODE!r}; a"
            " config's network must have it among its arguments"
        )
    return found[0] if found else None


def _fixed_by_field(backbone: nn.Module) -> tuple[str, bool] | None:
    """Returns a field, such as `deterministic`, that fixes the network's mode, and its value."""
    names = [field.name for field in dataclasses.fields(backbone) if field.name in MODES]
    fixed = [(n, v) for n in names if isinstance(v := getattr(backbone, n, None), bool)]
    return fixed[0] if len(fixed) == 1 else None


def _agree(backbone: nn.Module, train: bool | None, name: str | None, value: Any) -> bool:
    """Returns the one mode that the caller's `train` and the network's own argument mean."""
    for what, mode in (("train", train), (name, value)):
        if isinstance(mode, jax.core.Tracer):
            raise UsageError(
                f"{what} is traced by JAX, but the mode must be known at tracing: make it static,"
                " or close over it"
            )
    if name is None or value is None:
        return bool(train)
    training = bool(value) == MODES[name]
    if train is not None and bool(train) != training:
        raise UsageError(
            f"train={bool(train)} contradicts {name}={bool(value)} of"
            f" {type(backbone).__name__}: give one of them, or both alike"
        )
    return training


class InMode(nn.Module):
    """A network that is told `train`, whatever it calls that itself.

    It takes the network's place, so that paths of parameters stay what they are.

    Attributes:
      network: any Linen module.
    """

    network: nn.Module

    @nn.compact
    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Calls the network in this mode and returns what it returns.

        Raises:
          UsageError: a network whose mode argument is not clear, see `resolve`.
        """
        _, kwargs = resolve(self.network, None, train, args, kwargs)
        return self.network.unbind()[0].clone(parent=self.scope.rewound())(*args, **kwargs)
