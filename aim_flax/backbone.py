"""What takes a network's place, with something latched on to it from outside."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.core import Scope

from aim_flax.errors import UsageError, nearest

# Part of JAX's cache keys. Without it nn.jit could take its init from a plain network's cache, and
# a latch, which sees only what is traced, would not even know that there is an nn.jit to refuse.
init_context = jax.make_user_context(default_value=False)


class Latched(nn.Module):
    """A Linen network with something latched on to it.

    It takes the backbone's place: paths, methods and the mode argument are those of the network
    within, which is the backbone, or the backbone's own where that is such a module too. Beside the
    backbone each has a field `mode` and a method `call(method, /, *args, train=None, **kwargs)`.

    Attributes:
      backbone: any Linen module.
    """

    backbone: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the backbone with these arguments and returns what it returns: see `call`."""
        return self.call("__call__", *args, **kwargs)

    @property
    def network(self) -> nn.Module:
        """The network within, unbound."""
        backbone = self.backbone
        if isinstance(backbone, Latched):
            return backbone.network
        return backbone.unbind()[0] if backbone.scope is not None else backbone

    @property
    def declared_mode(self) -> str | None:
        """The name of the network's mode argument, where this or one directly inside has it."""
        inner = self.backbone
        return self.mode or (inner.declared_mode if isinstance(inner, Latched) else None)

    @nn.nowrap
    def _run(
        self,
        scope: Scope,
        intercept: Callable[..., Any],
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **inner: Any,
    ) -> Any:
        """Calls a method of the backbone in a scope and returns what it returns.

        Args:
          scope: where the backbone's variables are.
          intercept: is called in place of each of its modules, see `nn.intercept_methods`.
          method: its name.
          args, kwargs: of the call, with the mode in the network's own words.
          **inner: more arguments, for a backbone that is such a module too.
        """
        backbone = self.backbone.unbind()[0]
        if isinstance(backbone, Latched):
            # In a scope like it, for its fields have the same names.
            backbone = backbone.clone(parent=scope.rewound(), mode=self.declared_mode)
            call, kwargs = partial(backbone.call, method), {**kwargs, **inner}
        else:
            call = getattr(backbone.clone(parent=scope), method)
        with init_context(self.is_initializing()), nn.intercept_methods(intercept):
            return call(*args, **kwargs)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` may be one of the network's."""
        method, args = self._method(method, args)
        return super().apply(variables, *args, method=method, **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.init_with_output`; `method` may be one of the network's."""
        method, args = self._method(method, args)
        return super().init_with_output(rngs, *args, method=method, **kwargs)

    @nn.nowrap
    def _method(self, method: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        """Returns the method of this class, and its arguments, that stand for the network's."""
        if not isinstance(self.backbone, nn.Module):
            return method, args
        network = type(self.network)
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        own = getattr(network, name, None)
        if isinstance(method, str) and not hasattr(type(self), name):
            if own is None:
                methods = [n for n, v in vars(network).items() if callable(v)]
                raise UsageError(
                    f"{network.__name__} has no method {name!r}{nearest(name, methods)}"
                )
            return "call", (name, *args)
        if method is not None and own is not None and getattr(method, "__func__", method) is own:
            return "call", (name, *args)
        return method, args


def trace_init(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the shapes of a network's variables; only arrays among its arguments are traced.

    Args:
      args, kwargs: of its call; arrays, or their shapes and dtypes.
    """
    leaves, tree = jax.tree.flatten((args, dict(kwargs)))

    def init(*arrays: jax.Array) -> Any:
        left = iter(arrays)
        given = [next(left) if hasattr(leaf, "shape") else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(tree, given)
        return model.init(jax.random.key(0), *args, **kwargs)

    return jax.eval_shape(init, *(leaf for leaf in leaves if hasattr(leaf, "shape")))


def check_backbone(latch: nn.Module) -> None:
    """Raises UsageError for a `backbone` that is no Linen module, or is in use outside of it."""
    backbone, name = latch.backbone, type(latch).__name__
    if not isinstance(backbone, nn.Module):
        kind = type(backbone).__name__
        is_nnx = any(base.__module__.startswith("flax.nnx") for base in type(backbone).__mro__)
        advice = "expected one"
        if is_nnx:
            advice = (
                f"but an NNX module: write the backbone in Linen, and turn the {name} into NNX"
                f" with nnx.bridge.ToNNX({name.lower()})"
            )
        raise UsageError(f"the backbone, {kind}, is no Linen module, {advice}")
    for module in _modules(backbone):
        if _has_variables_outside(module, latch.scope):
            raise UsageError(
                f"{'/'.join(module.scope.path)!r}, the backbone or a part of it, is called outside"
                f" of its {name} too, where it would have other parameters: call the {name} there,"
                " or give it a backbone of its own"
            )


def _modules(value: Any) -> list[nn.Module]:
    """Returns a module and those that it was given as attributes, at any depth."""
    if isinstance(value, nn.Module):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name")]
        given = [getattr(value, name, None) for name in fields]
        return [value, *(module for one in given for module in _modules(one))]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [module for one in value for module in _modules(one)]
    return []


def _has_variables_outside(module: nn.Module, scope: Scope) -> bool:
    """Whether a module has variables of its own in a place that is not below `scope`."""
    if module.scope is None or module.scope.path[: len(scope.path)] == scope.path:
        return False
    root = module.scope.root
    for tree in root.variables().values():
        for name in module.scope.path[len(root.path) :]:
            tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
        if tree:
            return True
    return False
