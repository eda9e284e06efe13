"""Functions of a model that are not flattened at every call: they see what jax.jit sees."""

import functools
import gc
import weakref

import jax.numpy as jnp
from flax import nnx

from pdllm_jax.network.dispatch import ModelFunction
from tests.support.method import flax_flattens


class Part(nnx.Module):
    def __init__(self, value):
        self.weight = nnx.Param(jnp.full((3,), value))
        self.factor = 2.0


class Whole(nnx.Module):
    def __init__(self):
        self.parts = nnx.List([Part(1.0), Part(10.0)])
        self.offset = 0.5


class WithList(Whole):
    def __init__(self):
        super().__init__()
        self.extra = nnx.data([])


def value(model, x, *, sign):
    total = sum(part.factor * part.weight[...].sum() for part in model.parts)
    for extra in getattr(model, "extra", ()):
        total += extra[...].sum()
    return sign * (x + total + model.offset)


def weight(number, dtype=jnp.float32):
    return nnx.Param(jnp.full((3,), number, dtype))


CHANGES = {
    "the array of a weight": (Whole, lambda m: m.parts[0].weight.set_value(jnp.full((3,), 7.0))),
    "its dtype": (Whole, lambda m: m.parts[1].weight.set_value(jnp.full((3,), 7))),
    "a weight": (Whole, lambda m: setattr(m.parts[0], "weight", weight(5.0))),
    "a setting": (Whole, lambda m: setattr(m.parts[1], "factor", 3.0)),
    "a setting of the root": (Whole, lambda m: setattr(m, "offset", 4.0)),
    "a module": (Whole, lambda m: m.parts.__setitem__(1, Part(100.0))),
    "one more module": (Whole, lambda m: m.parts.append(Part(1000.0))),
    "a new attribute": (Whole, lambda m: setattr(m, "extra", nnx.List([weight(9.0)]))),
    "one module less": (Whole, lambda m: m.parts.pop()),
    "what a list holds": (WithList, lambda m: m.extra.append(weight(9.0))),
}


def test_a_call_sees_every_change_of_the_model():
    function = ModelFunction(value, static_argnames=("sign",))
    x = jnp.float32(1.0)
    for name, (kind, change) in CHANGES.items():
        model = kind()
        before = function(model, x, sign=-1)
        again = functools.partial(function, model, x, sign=-1)
        assert (flax_flattens(again) == 0) == (kind is Whole), name
        change(model)
        after = function(model=model, x=x, sign=-1)
        assert after == value(model, x, sign=-1) != before, name


def test_models_of_one_structure_share_a_program_and_are_freed():
    function = ModelFunction(value, static_argnames=("sign",), donate_argnames=("x",))
    models = [Whole(), Whole()]
    for model in models * 2:
        x = jnp.float32(1.0)
        assert function(model, x, sign=1) == value(model, 1.0, sign=1)
        assert x.is_deleted()
        assert not model.parts[0].weight[...].is_deleted()
    assert function._cache_size() == 1
    compiled = function.lower(models[0], jnp.float32(1.0), sign=1).compile()
    assert compiled(models[1], jnp.float32(1.0)) == value(models[1], 1.0, sign=1)
    weights = [weakref.ref(model.parts[0].weight[...]) for model in models]
    models[0].parts[0].weight.set_value(jnp.zeros(3))
    del model, models
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
