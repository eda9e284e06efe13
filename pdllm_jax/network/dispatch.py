"""Jitted functions of a model that flatten its modules once, not at every call.

`jax.jit` flattens its arguments at every call. For a model of 32 layers that is 950 calls of Flax's
Python functions and 1 to 2 ms: more time than two GPUs leave the host in a denoising step.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
from flax import nnx

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Structure:
    """A model without its arrays, static under jit. Compared with itself at once."""

    def __init__(self, tree: Any):
        self.tree, self.hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)


class _FlatModel(NamedTuple):
    """A model's arrays, and the structure to restore it. One node of a pytree."""

    arrays: list[Any]
    structure: _Structure


jax.tree_util.register_pytree_node(
    _FlatModel, lambda flat: flat, lambda structure, arrays: _FlatModel(list(arrays), structure)
)


class _Layout(NamedTuple):
    """Where a model's arrays are, while no attribute of its modules is set or deleted.

    Holds Variables, not their arrays, so that memory of replaced weights is freed at once.

    attributes, values: the attributes of each module; all their values when it was flattened.
    """

    structure: _Structure
    variables: list[nnx.Variable]
    attributes: list[dict[str, Any]]
    values: list[Any]

    @property
    def valid(self) -> bool:
        """Whether every attribute of every module is the same object as before."""
        values = _values(self.attributes)
        return len(values) == len(self.values) and all(map(operator.is_, values, self.values))


def _values(attributes: Iterable[dict[str, Any]]) -> list[Any]:
    return [*itertools.chain.from_iterable(map(dict.values, attributes))]


_layouts: weakref.WeakKeyDictionary[nnx.Module, _Layout] = weakref.WeakKeyDictionary()


def _flatten(model: nnx.Module) -> _FlatModel:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    layout = _layouts.get(model)
    if layout is not None and layout.valid:
        return _FlatModel([x.get_raw_value() for x in layout.variables], layout.structure)
    nodes: list[Any] = []

    def is_variable(node: Any) -> bool:
        nodes.append(node)
        return isinstance(node, nnx.Variable)

    variables = jax.tree.leaves(model, is_leaf=is_variable)
    arrays, tree = jax.tree.flatten(model)
    structure = _Structure(tree)
    others = [node for node in nodes if not isinstance(node, nnx.Pytree | nnx.Variable)]
    mutable = any(isinstance(node, list | dict) for node in others) or jax.tree.leaves(others)
    # Changes inside of other containers would not be seen.
    if len(variables) == len(arrays) and not mutable:
        attributes = [vars(node) for node in nodes if isinstance(node, nnx.Pytree)]
        _layouts[model] = _Layout(structure, variables, attributes, _values(attributes))
    return _FlatModel(arrays, structure)


class ModelFunction(Generic[Arguments, Result]):
    """`jax.jit` of a function whose first argument, `model`, is an NNX module; same settings.

    A call sees new values of the model's Variables and new attributes of its modules. It does not
    see changes of a Variable's metadata after the first call. `lower`, `trace` and
    `eval_shape` are those of `jax.jit`: what they compile takes the module itself.
    """

    def __init__(self, function: Callable[Arguments, Result], **settings: Any):
        @functools.wraps(function)
        def restore_and_call(model: _FlatModel, *args: Any, **kwargs: Any) -> Result:
            module = jax.tree.unflatten(model.structure.tree, model.arrays)
            return function(module, *args, **kwargs)

        functools.update_wrapper(self, function)
        plain: Any = jax.jit(function, **settings)
        jitted: Any = jax.jit(restore_and_call, **settings)
        self._jitted, self.clear_cache = jitted, jitted.clear_cache
        self._cache_size = jitted._cache_size
        self.lower, self.trace, self.eval_shape = plain.lower, plain.trace, plain.eval_shape

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Result:
        """Calls the function; see `jax.jit`."""
        return self._jitted(_flatten(model), *args, **kwargs)
