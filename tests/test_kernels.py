"""One suite for every implementation of attention over chosen chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EMPTY_LSE, Partial, chunk_attention, merge, resolve_implementation

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 8e-3, jnp.float16: 2e-3}


def case(heads=4, groups=2, dim=8, rows=3, size=16, n=6, dtype=jnp.float32, layers=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    pool = (n, groups, size, dim) if layers is None else (layers, n, groups, size, dim)
    k, v = (jax.random.normal(key, pool).astype(dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (2, 3, rows, heads, dim)).astype(dtype)
    return q, k, v


def by_hand(q, k, v, ids, lengths):
    """float64 numpy, one softmax over the rows that count, request by request."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, slots, t, h, d = q.shape
    out, lse = np.zeros((b, t, h, d)), np.full((b, t, h), -np.inf)
    for i in range(b):
        for head in range(h):
            g = head // (h // k.shape[1])
            scores, values = [], []
            for j in range(slots):
                c = int(ids[i][j])
                if not 0 <= c < len(k):
                    continue
                n = min(max(int(lengths[c]), 0), k.shape[2])
                scores.append(q[i, j, :, head] @ k[c, g, :n].T / np.sqrt(d))
                values.append(v[c, g, :n])
            if sum(len(x) for x in values) == 0:
                continue
            s, x = np.concatenate(scores, axis=1), np.concatenate(values)
            peak = s.max(-1, keepdims=True)
            w = np.exp(s - peak)
            out[i, :, head] = w @ x / w.sum(-1, keepdims=True)
            lse[i, :, head] = peak[:, 0] + np.log(w.sum(-1))
    return out, lse


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("heads", "groups"), [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "one KV head"]
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16", "float16"])
def test_against_one_softmax_by_hand(implementation, heads, groups, dtype):
    """Ragged and full chunks, ids unsorted and repeated, two requests over one pool."""
    q, k, v = case(heads, groups, dtype=dtype)
    ids, lengths = [[4, 0, 2], [1, 5, 1]], [16, 16, 7, 0, 1, 16]
    got = chunk_attention(
        q, k, v, jnp.array(ids), jnp.array(lengths), implementation=implementation
    )
    out, lse = by_hand(q, k, v, ids, lengths)
    tolerance = TOLERANCE[dtype]
    assert got.out.dtype == dtype
    assert got.lse.dtype == jnp.float32
    np.testing.assert_allclose(got.out.astype(np.float32), out, atol=4 * tolerance)
    np.testing.assert_allclose(got.lse, lse, atol=4 * tolerance)


@IMPLEMENTATIONS
def test_ids_and_lengths_outside_are_clipped_and_read_nothing(implementation):
    """Ids outside the pool are empty slots; lengths are clipped to the chunk."""
    q, k, v = case()
    k, v = k.at[0].set(jnp.nan).at[5].set(jnp.nan), v.at[0].set(jnp.nan).at[5].set(jnp.nan)
    ids, lengths = [[-1, 6, 2], [1, 999, -7]], [16, -3, 99, 16, 16, 16]
    got = chunk_attention(
        q, k, v, jnp.array(ids), jnp.array(lengths), implementation=implementation
    )
    out, lse = by_hand(q, k, v, ids, lengths)
    np.testing.assert_allclose(got.out, out, atol=4e-6)
    np.testing.assert_allclose(got.lse[0], lse[0], atol=4e-6)
    assert (got.lse[1] == EMPTY_LSE).all()
    assert (got.out[1] == 0).all()


@IMPLEMENTATIONS
def test_nan_in_padding_and_in_other_chunks_changes_nothing(implementation):
    q, k, v = case()
    ids, lengths = jnp.array([[4, 2, 3], [2, 4, 2]]), jnp.array([16, 16, 5, 0, 9, 16])
    clean = chunk_attention(q, k, v, ids, lengths, implementation=implementation)
    used = jnp.array([False, False, True, True, True, False])
    counts = used[:, None] & (jnp.arange(16) < lengths[:, None])
    poison = jnp.where(counts[:, None, :, None], 0.0, jnp.nan)
    dirty = chunk_attention(q, k + poison, v + poison, ids, lengths, implementation=implementation)
    np.testing.assert_array_equal(dirty.out, clean.out)
    np.testing.assert_array_equal(dirty.lse, clean.lse)


@IMPLEMENTATIONS
def test_a_layer_of_a_stacked_pool_and_shared_query_rows(implementation):
    q, k, v = case(layers=3)
    ids, lengths = jnp.array([[4, 0, 2], [1, 5, 1]]), jnp.full((6,), 16)
    shared = q[:, 0]

    def run(layer):
        return chunk_attention(
            shared, k, v, ids, lengths, layer=layer, implementation=implementation
        )

    got = jax.jit(run)(jnp.int32(1))
    repeated = jnp.broadcast_to(shared[:, None], q.shape)
    out, lse = by_hand(repeated, k[1], v[1], ids, lengths)
    np.testing.assert_allclose(got.out, out, atol=4e-6)
    np.testing.assert_allclose(got.lse, lse, atol=4e-6)


def test_scores_that_overflow_an_exponential():
    q, k, v = case()
    ids, lengths = [[4, 0, 2], [1, 5, 1]], [16] * 6
    got = chunk_attention(q * 100, k * 10, v, jnp.array(ids), jnp.array(lengths))
    out, _ = by_hand(q * 100, k * 10, v, ids, lengths)
    np.testing.assert_allclose(got.out, out, atol=2e-3)


def test_merge_is_attention_over_the_union():
    q, k, v = case()
    ids, lengths = jnp.array([[4, 0, 2], [1, 5, 3]]), jnp.array([16, 3, 7, 16, 1, 16])
    whole = chunk_attention(q, k, v, ids, lengths)
    parts = [chunk_attention(q[:, j : j + 1], k, v, ids[:, j : j + 1], lengths) for j in range(3)]
    nothing = chunk_attention(q[:, :1], k, v, jnp.full((2, 1), -1), lengths)
    got = merge(nothing, *parts)
    np.testing.assert_allclose(got.out, whole.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, whole.lse, atol=1e-6)
    empty = merge(nothing, nothing)
    assert isinstance(empty, Partial)
    assert np.isfinite(empty.out).all()


def test_the_chosen_chunks_are_not_gathered():
    """No temporary of the size of the chosen KV: chunks are read one at a time."""
    q, k, v = case(size=512, n=64, dim=64)
    ids = jnp.tile(jnp.arange(32), (2, 1))
    q = jnp.tile(q[:, :1], (1, 32, 1, 1, 1))
    run = jax.jit(lambda *x: chunk_attention(*x, implementation="xla"))
    compiled = run.lower(q, k, v, ids, jnp.full((64,), 512)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    chosen = 2 * 32 * 2 * 2 * 512 * 64 * 4
    assert temporary < chosen / 4, (temporary, chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4))}, "q must be"),
        ({"q": jnp.zeros((2, 3, 3, 4, 16))}, "head size"),
        ({"q": jnp.zeros((2, 3, 3, 3, 8))}, "no multiple of 2 KV heads"),
        ({"q": jnp.zeros((2, 4, 3, 4, 8))}, "4 chunk slots"),
        ({"q": jnp.zeros((2, 3, 3, 4, 8), jnp.bfloat16)}, "share a dtype"),
        ({"v": jnp.zeros((6, 2, 15, 8))}, "differ in shape"),
        ({"k": jnp.zeros((1, 6, 2, 16, 8))}, "without a layer index"),
        ({"chunk_ids": jnp.zeros((2, 3))}, "chunk_ids must be integers"),
        ({"chunk_ids": jnp.zeros((3, 3), jnp.int32)}, r"chunk_ids must be \[B, K\] with B = 2"),
        ({"chunk_ids": jnp.zeros((2, 0), jnp.int32)}, "no chunk"),
        ({"chunk_lengths": jnp.zeros((5,), jnp.int32)}, r"chunk_lengths must be \[6\]"),
        ({"implementation": "triton"}, "'triton' is not known"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, v = case()
    fine = {
        "q": q, "k": k, "v": v,
        "chunk_ids": jnp.zeros((2, 3), jnp.int32), "chunk_lengths": jnp.full((6,), 16),
    }  # fmt: skip
    chunk_attention(**fine)
    with pytest.raises(ValueError, match=message):
        chunk_attention(**{**fine, **change})


def test_the_path_used_can_be_asked_for():
    assert resolve_implementation(None) == "xla"
    assert resolve_implementation("reference") == "reference"
