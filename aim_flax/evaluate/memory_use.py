"""How much of each layer's output comes from the memory."""

import warnings
from collections import OrderedDict
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from aim_flax.latch import AiM
from aim_flax.modes import MODES


def memory_use(
    model: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, dict[str, Any]]:
    """Returns how much of each layer's output the memory makes up, on these inputs.

    Args:
      *args, **kwargs: what the network is called with, its mode aside: in evaluation, with
        train=False where it is not said otherwise.

    Returns:
      {"read LAYER": {"share": ..., "own": ...}}: L2 norms per example of the memory's share and
      of the layer's own output, averaged over the batch; and {"update BLOCK": ...}, the norms of
      the change and of the memory before it. Layers that are called several times are averaged.
      Empty for a plain network.

    Warns of layers whose use cannot be measured: what is recorded within an nn.scan or nn.vmap is
    lost, unless `intermediates` is among its `variable_axes`.
    """
    if not MODES.keys() & kwargs.keys():
        kwargs["train"] = False
    places: dict[str, None] = {}
    if isinstance(model, AiM):
        model = model.watched(lambda place: places.setdefault(f"{place.what} {place.path}"))
    _, recorded = model.apply(variables, *args, **kwargs, mutable=["intermediates"])
    kinds = {"memory_use": "read", "memory_update_use": "update"}
    # In the order of the calls: jax.jit would sort the keys of a plain dict.
    uses = OrderedDict()
    for path, calls in flatten_dict(recorded.get("intermediates", {})).items():
        if path[-1] in kinds:
            name = f"{kinds[path[-1]]} {'/'.join(path[:-1])}"
            uses[name] = jax.tree.map(lambda *norms: sum(norms) / len(norms), *calls)
    if lost := [place for place in places if place not in uses]:
        warnings.warn(
            f"the use of memory is not measured in {', '.join(lost)}: within nn.scan and nn.vmap"
            ' that takes variable_axes={"intermediates": 0}',
            stacklevel=2,
        )
    return uses
