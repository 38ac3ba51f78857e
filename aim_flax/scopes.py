"""Marks in Flax scopes: which calls belong to a backbone, and which to what was latched on to it.

Flags go from a scope to all below it, through lifted transformations too. The scope of a network
that is applied to variables of its own, `net.apply(fixed, x)`, has none: it is not the backbone's.
"""

from typing import Any

from flax import linen as nn
from flax.core import Scope, freeze

_BACKBONES, _LATCHED_ON = "aim_flax_backbones", "aim_flax_latched_on"


def with_backbone(flags: Any, token: object) -> Any:
    """Returns the flags of a backbone's scope; `token` is that of one pass."""
    return freeze({**flags, _BACKBONES: (*flags.get(_BACKBONES, ()), token)})


def is_in_backbone(module: nn.Module, token: object) -> bool:
    """Whether a bound module belongs to that backbone, and was not latched on to it."""
    flags = module.scope.flags
    return token in flags.get(_BACKBONES, ()) and not flags.get(_LATCHED_ON, False)


def latches(module: nn.Module) -> tuple[Any, ...]:
    """Returns the tokens of the backbones, outermost first, that a bound module belongs to; none of
    what was latched on to one."""
    flags = module.scope.flags
    return () if flags.get(_LATCHED_ON, False) else flags.get(_BACKBONES, ())


def transformations(module: nn.Module, place: Scope) -> list[str]:
    """Returns the Flax transformations that a bound module runs inside, from a scope around it on.

    Each in Flax's own words, such as "remat(block)".
    """
    outer = place.debug_path + module.path[len(place.path) :]
    return [a for a, b in zip(module.scope.debug_path, outer, strict=False) if a != b]


def push_latched_on(scope: Scope, name: str) -> Scope:
    """Returns the scope `name` below another, for what is latched on there."""
    child = scope.push(name, reuse=True)
    child.flags = freeze({**child.flags, _LATCHED_ON: True})
    return child
