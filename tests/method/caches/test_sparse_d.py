"""SparseD against its definition, token for token."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import DecodeConfig
from pdllm_jax.method.caches.sparse_d import SparseD, _choose, _sparse_attention
from pdllm_jax.rules import ConfigError

pytest.importorskip("torch")

from tests.oracles import generation
from tests.oracles.rivals import sparse_d
from tests.support.sparse import Pair

SLOW = pytest.mark.slow
DEFAULT = {("LLaDA", 0), ("Dream", 1)}
SETTINGS = {
    "small tiles": ({"tile": 4, "select": 0.2, "skip": 0.2}, 16),
    "tiles that nothing divides": ({"tile": 7, "select": 0.3, "skip": 0.0}, 8),
    "one tile of the response": ({"tile": 32, "select": 0.3, "skip": 0.1}, 8),
}


def config_of(family: str, steps: int, method) -> DecodeConfig:
    if family == "Dream":
        return DecodeConfig.dream(
            max_new_tokens=16, steps=steps, alg="maskgit_plus", recompute=method
        )
    return DecodeConfig(gen_length=16, block_length=8, steps=steps, recompute=method)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, i) in DEFAULT else SLOW)
        for family in ("LLaDA", "Dream")
        for i, name in enumerate(SETTINGS)
    ],
)
def test_tokens_and_tiles_are_those_of_the_definition(family, name):
    changes, steps = SETTINGS[name]
    config = config_of(family, steps, SparseD(**changes))
    runs, state = Pair(family).check(
        sparse_d.generate, config, gen_length=16, block_length=8, steps=steps, **changes
    )
    for b, run in enumerate(runs):
        chosen = next(step.chosen for step in run.steps if step.chosen)
        for lists, want in zip(state.memory, chosen, strict=True):
            _, n, keys = want.shape
            got = (jnp.arange(keys) == lists[b, :, :n, :, None]).any(axis=2)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "changes",
    [{"select": 1.0, "skip": 0.0}, pytest.param({"select": 0.1, "skip": 1.0}, marks=SLOW)],
    ids=["all tiles", "no sparse step"],
)
def test_with_its_sparsity_off_it_is_plain(changes):
    pair = Pair("LLaDA")
    want = pair.published(generation.plain, gen_length=16, block_length=8, steps=8)
    got = pair.state(config_of("LLaDA", 8, SparseD(tile=8, **changes)))
    assert got.tokens.tolist() == want


def test_nothing_has_the_size_of_rows_by_rows():
    """In neither choosing nor sparse attention, of one head."""
    rows, tile, q = 1024, 16, jnp.zeros((1, 1024, 1, 4))
    numbers, one = jnp.array([rows]), jnp.ones((1,), jnp.int32)
    choose = functools.partial(_choose, tile=tile, scale=1.0, room=4, most=1)
    lists = jnp.zeros((1, 1, rows // tile, 4), jnp.int32)
    sparse = functools.partial(_sparse_attention, tile=tile)
    for program in (
        jax.make_jaxpr(choose)(q, q, numbers, numbers // tile - 1, one, one),
        jax.make_jaxpr(sparse)(q, q, q, lists, numbers),
    ):
        shapes = re.findall(r"\w\[([\d,]+)\]", str(program))
        sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
        assert tile * rows // 16 <= max(sizes) <= tile * rows


def test_steps_that_fill_nothing_are_refused():
    config = config_of("LLaDA", 32, SparseD())
    with pytest.raises(ConfigError, match="'sparse-d' needs at most one step per token, got 32"):
        Pair("LLaDA").state(config)
    config_of("Dream", 32, SparseD()).cache_method.check(
        Pair("Dream").model.config, config_of("Dream", 32, SparseD()), 40
    )


def test_settings_are_checked():
    assert SparseD.short() == SparseD(tile=32, select=0.5)
    for wrong in ({"tile": 0}, {"select": 0.0}, {"skip": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SparseD(**wrong)
