"""Properties of cache, sampling and conversion on whatever hypothesis thinks of.

Chunking, settings and selection have theirs in test_chunking.py, test_config.py and
test_selection.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import convert, reverse
from pdllm_jax.config import DecodeConfig
from pdllm_jax.method.cache import init_live, init_pool, write_chunks
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.method.unmasking import transfer
from pdllm_jax.network.config import ModelConfig
from tests.support import convert_sources as sources

TINY = ModelConfig.tiny()
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    writes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 120), st.booleans()), max_size=5),
)
def test_live_rows_are_those_written_last(seed, writes):
    """Any order of writes, at any row of either request, some rows kept: against NumPy."""
    rng, rows = np.random.default_rng(seed), 8
    live = init_live(TINY, 2, 128, jnp.float32)
    want = np.zeros((TINY.n_layers, 2, 128, TINY.n_kv_heads, TINY.head_dim), np.float32)
    for layer, first, some in writes:
        new = rng.standard_normal((2, rows, TINY.n_kv_heads, TINY.head_dim)).astype(np.float32)
        start = np.array([first, int(rng.integers(0, 121))])
        keep = rng.random((2, rows)) < 0.5 if some else np.zeros((2, rows), bool)
        mask = jnp.asarray(keep) if some else None
        live = live.write(layer, jnp.asarray(new), -jnp.asarray(new), jnp.asarray(start), mask)
        for b, row in zip(*np.nonzero(~keep), strict=True):
            want[layer, b, start[b] + row] = new[b, row]
    np.testing.assert_array_equal(np.stack(live.k), want)
    np.testing.assert_array_equal(np.stack(live.v), -want)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, places=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
def test_a_pool_holds_chunks_where_they_were_put(seed, places):
    """At named places, and one after the other: no other chunk and no other layer changes."""
    rng = np.random.default_rng(seed)
    shape = (len(places), 4, TINY.n_kv_heads, TINY.head_dim)
    rows = rng.standard_normal(shape).astype(np.float32)
    layer, first = int(rng.integers(TINY.n_layers)), int(rng.integers(0, 7 - len(places)))
    pool = init_pool(TINY, 6, 4, jnp.float32)
    following = [*range(first, first + len(places))]
    for where, targets in ((jnp.asarray(places), places), (first, following)):
        want = np.zeros(pool.k.shape, np.float32)
        want[layer, targets] = rows.transpose(0, 2, 1, 3)
        kv = jnp.asarray(rows), -jnp.asarray(rows)
        got = write_chunks(pool, layer, *kv, jnp.full(len(places), 4), where)
        np.testing.assert_array_equal(got.k, want)
        np.testing.assert_array_equal(got.v, -want)


LOGP = st.sampled_from([-np.inf, -1e30, -7.0, -0.5, -0.1, -1e-9, 0.0])
STEPS = [{}, {"steps": 3}, {"steps": 1}]
RULES = [*STEPS, {"threshold": 0.9}, {"threshold": 1.0}, {"factor": 0.5}, {"factor": 4.0}]


@settings(max_examples=150, deadline=None)
@given(
    confidence=st.lists(LOGP, min_size=8, max_size=8),
    rule=st.sampled_from(RULES),
    step=st.integers(0, 7),
)
def test_every_step_unmasks_its_best_candidates(confidence, rule, step):
    """The slots taken are candidates, at least one where there is any, and none is better."""
    config = DecodeConfig(gen_length=8, block_length=8, **rule)
    step = min(step, config.steps_per_block - 1)
    c = np.asarray(confidence)
    take = np.asarray(transfer(jnp.asarray(c), jnp.asarray(step), config.unmasking))
    candidate = c > -np.inf
    assert not (take & ~candidate).any()
    assert take.any() == candidate.any()
    if take.any() and (candidate & ~take).any():
        assert c[take].min() >= c[candidate & ~take].max()
    if config.threshold is not None:
        sure = c >= np.log(np.float32(config.threshold))
        assert take.sum() == max(sure.sum(), candidate.any())
    elif config.factor is None:
        base, more = divmod(8, config.steps_per_block)
        assert take.sum() == min(base + (step < more), candidate.sum())


@settings(max_examples=100, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]), size=st.just(11))
def test_log_probabilities_are_those_of_a_softmax(seed, scale, size):
    """Never above 0, never NaN; together they sum to 1, in the order of the logits."""
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    rows = jnp.tile(jnp.asarray(logits), (size, 1))
    got = np.asarray(log_probability(rows, jnp.arange(size)), np.float64)
    assert (got <= 0).all()
    np.testing.assert_allclose(np.exp(got).sum(), 1.0, rtol=1e-5)
    order = np.argsort(logits, kind="stable")
    assert (np.diff(got[order]) >= 0).all()


@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    head_dim=st.sampled_from([2, 6, 8]),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 40),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shards=st.sampled_from([None, 2, 3]),
    seed=seeds,
)
def test_any_checkpoint_comes_back_bit_for_bit(
    heads, head_dim, layers, hidden, tied, dtype, shards, seed
):
    sizes = {"d_model": heads[0] * head_dim, "n_heads": heads[0], "n_kv_heads": heads[1]}
    sizes |= {"n_layers": layers, "mlp_hidden_size": hidden}
    model = sources.config(**sizes, weight_tying=tied)
    values = sources.tensors(model, dtype, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources.write(folder / "source", values, model, shards=shards)
        convert(folder / "source", folder / "converted")
        reverse(folder / "converted", folder / "back", shard_bytes=2000)
        back = sources.read_folder(folder / "back")
    assert jax.tree.map(sources.bits, back) == jax.tree.map(sources.bits, values)
