"""One suite for every implementation of attention over chosen chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    EMPTY_LSE,
    OwnKV,
    Partial,
    Scaled,
    chunk_attention,
    chunk_attention_mass,
    compat,
    merge,
    quantise,
    resolve_implementation,
)
from tests.support.kernels import OLD_JAX, implementations
from tests.support.models import relative_error

HALF = {jnp.bfloat16: 8e-3, jnp.float16: 1e-3}
TOLERANCE = {jnp.float32: 1e-6, **HALF}
IMPLEMENTATIONS = implementations("xla", "reference", gpu=("mosaic_gpu", "cudnn"))
# One program for a case, as the method has it, rather than one for each of its operations.
attend = jax.jit(chunk_attention, static_argnames=("implementation", "scale"))
attend_mass = jax.jit(chunk_attention_mass, static_argnames=("implementation",))
# Ragged and full chunks, empty ones, ids unsorted and repeated, two requests over one pool.
IDS, LENGTHS = [[4, 0, 2], [1, 5, 1]], [128, 128, 70, 0, 1, 128]
NO_KEYS = [[4, 0, 2], [3, -1, 3]]  # the chunks of the second request are empty


def run(implementation, q, k, v, ids=IDS, lengths=LENGTHS, **more):
    ids, lengths = jnp.array(ids), jnp.array(lengths)
    return attend(q, k, v, ids, lengths, implementation=implementation, **more)


def normal(seed, dtype, *shapes):
    """Arrays of these shapes, made on the host: there is nothing to compile."""
    draw = np.random.default_rng(seed).standard_normal
    return [jnp.asarray(draw(shape, np.float32).astype(dtype)) for shape in shapes]


def case(implementation, heads=4, groups=2, dim=64, rows=8, size=128, n=6, dtype=None, layers=None):
    """q, k, v; float32 where the implementation takes it and no dtype is asked for."""
    dtype = dtype or (jnp.float32 if implementation in ("xla", "reference") else jnp.bfloat16)
    pool = (n, groups, size, dim) if layers is None else (layers, n, groups, size, dim)
    k, v, q = normal(0, dtype, pool, pool, (2, 3, rows, heads, dim))
    return q, k, v


def assert_close(got: Partial, want, dtype):
    """Outputs by the Euclidean norm, to the dtype's rounding; log-sum-exps one by one."""
    out, lse = want
    assert got.out.dtype == dtype
    assert got.lse.dtype == jnp.float32
    assert relative_error(got.out, out) < {jnp.float32: 2e-6, jnp.bfloat16: 4e-3}.get(dtype, 1e-3)
    np.testing.assert_allclose(got.lse, lse, atol=2e-5 if dtype == jnp.float32 else 2e-3)


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
    return out, lse.swapaxes(1, 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("heads", "groups", "rows"),
    [(4, 4, 32), (4, 2, 8), (14, 2, 32), (2, 2, 100)],
    ids=["MHA", "GQA", "GQA with a last tile that is not full", "rows that fill no tile"],
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16", "float16"])
def test_against_one_softmax_by_hand(implementation, heads, groups, rows, dtype):
    if dtype == jnp.float32 and implementation not in ("xla", "reference"):
        pytest.skip("takes half precision alone")
    if implementation == "interpret" and (dtype == jnp.float16) != (rows in (8, 100)):
        pytest.skip("interpreted in the other half precision")
    q, k, v = case(implementation, heads, groups, rows=rows, dtype=dtype)
    assert_close(run(implementation, q, k, v), by_hand(q, k, v, IDS, LENGTHS), dtype)


def assert_only_first(got, q, k, v, ids, lengths):
    """The first request's result; the second has no keys."""
    out, lse = by_hand(q, k, v, ids, lengths)
    assert_close(Partial(got.out[:1], got.lse[:1]), (out[:1], lse[:1]), q.dtype.type)
    assert (got.lse[1] == EMPTY_LSE).all()
    assert (got.out[1] == 0).all()


@IMPLEMENTATIONS
def test_ids_and_lengths_outside_are_clipped_and_read_nothing(implementation):
    """Ids outside the pool are empty slots; lengths are clipped to the chunk."""
    q, k, v = case(implementation)
    k, v = (x.at[jnp.array([0, 5])].set(jnp.nan) for x in (k, v))
    ids, lengths = [[-1, 6, 2], [1, 999, -7]], [128, -3, 999, 128, 128, 128]
    assert_only_first(run(implementation, q, k, v, ids, lengths), q, k, v, ids, lengths)


def nan_behind(counts, dtype):
    """[N, 1, C, 1], zero for the first counts[n] keys of a chunk and NaN behind them."""
    valid = jnp.arange(128) < jnp.array(counts)[:, None]
    return jnp.where(valid[:, None, :, None], 0.0, jnp.nan).astype(dtype)


@IMPLEMENTATIONS
def test_nan_in_padding_and_in_other_chunks_changes_nothing(implementation):
    q, k, v = case(implementation)
    ids, lengths = [[4, 2, 3], [2, 4, 2]], [128, 128, 37, 0, 65, 128]
    clean = run(implementation, q, k, v, ids, lengths)
    poison = nan_behind([0, 0, 37, 0, 65, 0], q.dtype)
    dirty = run(implementation, q, k + poison, v + poison, ids, lengths)
    assert np.isfinite(clean.out.astype(jnp.float32)).all()
    np.testing.assert_array_equal(dirty.out, clean.out)
    np.testing.assert_array_equal(dirty.lse, clean.lse)


@IMPLEMENTATIONS
def test_a_layer_of_a_stacked_pool_and_shared_query_rows(implementation):
    q, k, v = case(implementation, layers=3)
    shared = q[:, 0]
    got = run(implementation, shared, k, v, layer=jnp.int32(1))
    repeated = jnp.broadcast_to(shared[:, None], q.shape)
    assert_close(got, by_hand(repeated, k[1], v[1], IDS, LENGTHS), q.dtype.type)


@IMPLEMENTATIONS
@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("size", [128, 70], ids=["whole blocks", "padded"])
def test_own_keys(implementation, rows, size):
    """As one chunk more, of which every request has its own; NaN behind their lengths."""
    if implementation == "interpret" and (rows == 8) == (size == 128):
        pytest.skip("interpreted with the other number of rows")
    q, k, v = case(implementation, heads=6, rows=rows, layers=2)
    live, counts = (2, size, 2, 64), [67, 3]
    own_k, own_v, own_q = normal(1, q.dtype, live, live, (2, 1, *q.shape[2:]))
    behind = (jnp.arange(size) >= jnp.array(counts)[:, None])[..., None, None]
    own_k, own_v = (jnp.where(behind, jnp.nan, x) for x in (own_k, own_v))
    own_kv, q = OwnKV(own_k, own_v, jnp.array(counts)), jnp.concatenate([q, own_q], axis=1)
    got = run(implementation, q, k, v, NO_KEYS, layer=1, own_kv=own_kv)

    def as_chunks(pool, rows):
        rows = jnp.pad(rows.swapaxes(1, 2), ((0, 0), (0, 0), (0, 128 - size), (0, 0)))
        return jnp.concatenate([pool[1], rows])

    ids = np.concatenate([NO_KEYS, [[6], [7]]], axis=1)
    want = by_hand(q, as_chunks(k, own_k), as_chunks(v, own_v), ids, [*LENGTHS, *counts])
    assert_close(got, want, q.dtype.type)


@IMPLEMENTATIONS
def test_a_pool_in_8_bits(implementation):
    """As the pool that values and scales stand for; own keys are in q's dtype, padding is NaN."""
    q, k, v = case(implementation, heads=6, layers=2)
    k, v = (x * jnp.exp2(jnp.arange(6))[:, None, None, None].astype(q.dtype) for x in (k, v))
    (own,) = normal(1, q.dtype, (2, 128, 2, 64))
    pool = [quantise(x, "fp8", 2) for x in (k, v)]
    own_kv, places = OwnKV(own, -own, jnp.array([67, 3])), jnp.concatenate([q, q[:, :1]], axis=1)
    wide = [x.restore(jnp.float32) for x in pool]
    behind = nan_behind([128, 128, 70, 0, 1, 128], jnp.float32)
    dirty = [
        x._replace(values=(x.values.astype(jnp.float32) + behind).astype(x.dtype)) for x in pool
    ]
    got = run(implementation, places, *dirty, layer=1, own_kv=own_kv)
    full = [x.astype(jnp.float32) for x in (places, own, -own)]
    want = run("reference", full[0], *wide, layer=1, own_kv=OwnKV(*full[1:], own_kv.lengths))
    assert_close(got, want, q.dtype.type)


@IMPLEMENTATIONS
def test_own_keys_without_any(implementation):
    q, k, v = case(implementation)
    live = jnp.full((2, 128, 2, 64), jnp.nan, q.dtype)
    own_kv, places = OwnKV(live, live, jnp.array([0, -5])), jnp.concatenate([q, q[:, :1]], axis=1)
    got = run(implementation, places, k, v, NO_KEYS, own_kv=own_kv)
    assert_only_first(got, q, k, v, NO_KEYS, LENGTHS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 8, 3, 64))}, r"own_kv.k must be \[B, S, G, D\] with B = 2, G = 2"),
        ({"v": jnp.zeros((2, 9, 2, 64))}, r"own_kv.v must be .* S = 8, .*got shape \(2, 9"),
        ({"k": jnp.zeros((1, 2, 8, 2, 64))}, "own_kv.k must be"),
        ({"k": jnp.zeros((2, 0, 2, 64)), "v": jnp.zeros((2, 0, 2, 64))}, "got S = 0"),
        ({"lengths": jnp.zeros((3,), jnp.int32)}, r"own_kv.lengths must be \[B\] with B = 2"),
        ({"lengths": jnp.zeros((2,))}, "own_kv.lengths must be integers, got float32"),
        (
            {"k": jnp.zeros((2, 8, 2, 64), jnp.bfloat16), "v": jnp.zeros((2, 8, 2, 64))},
            "q, k, v and own_kv must share a floating dtype, got .*bfloat16",
        ),
    ],
)
def test_own_keys_that_do_not_fit_are_named(change, message):
    q, k, v = case("xla")
    places = jnp.concatenate([q, q[:, :1]], axis=1)
    own_kv = OwnKV(jnp.zeros((2, 8, 2, 64)), jnp.zeros((2, 8, 2, 64)), jnp.array([1, 8]))
    args = k, v, jnp.zeros((2, 3), jnp.int32), jnp.full((6,), 128)
    attend(places, *args, own_kv=own_kv)
    with pytest.raises(ValueError, match=message):
        attend(places, *args, own_kv=own_kv._replace(**change))
    for rows in (q, q[:, 0]):
        with pytest.raises(ValueError, match=r"q with own_kv must be \[B, K \+ 1, T, H, D\]"):
            attend(rows, *args, own_kv=own_kv)


@IMPLEMENTATIONS
def test_the_share_of_every_chunk(implementation):
    q, k, v = case(implementation)
    arrays = q, k, v, jnp.array(NO_KEYS), jnp.array(LENGTHS)
    got = attend_mass(*arrays, implementation=implementation)
    union = run(implementation, q, k, v, NO_KEYS)
    np.testing.assert_allclose(got.attention.lse, union.lse, atol=1e-5)
    lse = by_hand(q, k, v, IDS, LENGTHS)[1]
    for slot in range(3):
        alone = by_hand(q[:, slot : slot + 1], k, v, [[IDS[0][slot]], [0]], LENGTHS)[1]
        share = np.exp(alone[0] - lse[0])
        np.testing.assert_allclose(got.mass[0, ..., slot], share, atol=2e-3)
    np.testing.assert_allclose(got.mass[0].sum(-1), 1, atol=1e-5)
    assert (got.mass[1] == 0).all()  # of chunks without keys


@IMPLEMENTATIONS
def test_scores_that_overflow_an_exponential(implementation):
    q, k, v = case(implementation)
    got = run(implementation, q * 100, k * 10, v, lengths=[128] * 6)
    out, _ = by_hand(q * 100, k * 10, v, IDS, [128] * 6)
    np.testing.assert_allclose(got.out.astype(jnp.float32), out, atol=2e-2)


def test_merge_is_attention_over_the_union():
    q, k, v = case("xla")
    ids, lengths = jnp.array([[4, 0, 2], [1, 5, 3]]), jnp.array([128, 3, 70, 128, 1, 128])
    union = attend(q, k, v, ids, lengths)
    parts = [attend(q[:, j : j + 1], k, v, ids[:, j : j + 1], lengths) for j in range(3)]
    nothing = attend(q[:, :1], k, v, jnp.full((2, 1), -1), lengths)
    got = merge(nothing, *parts)
    np.testing.assert_allclose(got.out, union.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, union.lse, atol=1e-6)
    empty = merge(nothing, nothing)
    assert isinstance(empty, Partial)
    assert np.isfinite(empty.out).all()


def test_the_chosen_chunks_are_not_gathered():
    """No temporary of the size of the chosen KV: chunks are read one at a time."""
    q, k, v = case("xla", size=512, n=64)
    ids = jnp.tile(jnp.arange(32), (2, 1))
    q = jnp.tile(q[:, :1], (1, 32, 1, 1, 1))
    program = attend.lower(q, k, v, ids, jnp.full((64,), 512), implementation="xla")
    temporary = program.compile().memory_analysis().temp_size_in_bytes
    chosen = 2 * 32 * 2 * 2 * 512 * 64 * 4
    assert temporary < chosen / 4, (temporary, chosen)


NARROW = Scaled(jnp.zeros((6, 2, 128, 64), jnp.float8_e4m3fn), jnp.ones((6, 2)))
INTEGERS = {"q": (2, 3, 8, 4, 64), "k": (6, 2, 128, 64), "v": (6, 2, 128, 64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4))}, "q must be"),
        ({"q": jnp.zeros((2, 3, 8, 4, 16))}, r"q must be .* D = 64, got shape \(2, 3, 8, 4, 16"),
        ({"q": jnp.zeros((2, 3, 8, 3, 64))}, "multiple of the pool's 2 KV heads, got H = 3"),
        ({"q": jnp.zeros((2, 4, 8, 4, 64))}, r"q must be \[B, K, T, H, D\] with B = 2, K = 3"),
        ({"q": jnp.zeros((2, 3, 8, 4, 64), jnp.bfloat16)}, "dtype, got bfloat16, float32"),
        ({x: jnp.zeros(s, jnp.int32) for x, s in INTEGERS.items()}, "share a floating dtype"),
        ({"v": jnp.zeros((6, 2, 15, 64))}, r"v must be \[N, G, C, D\] with N = 6.* C = 128"),
        ({"k": jnp.zeros((1, 6, 2, 128, 64))}, r"k without layer must be \[N, G, C, D\]"),
        ({"chunk_ids": jnp.zeros((2, 3))}, "chunk_ids must be integers"),
        ({"chunk_ids": jnp.zeros((3, 3), jnp.int32)}, r"q must be \[B, K, T, H, D\] with B = 3"),
        ({"chunk_ids": jnp.zeros((3,), jnp.int32)}, r"chunk_ids must be \[B, K\], got"),
        ({"chunk_lengths": jnp.zeros((6,))}, "chunk_lengths must be integers"),
        ({"chunk_ids": jnp.zeros((2, 0), jnp.int32)}, "at least one chunk, got K = 0"),
        ({"chunk_lengths": jnp.zeros((5,), jnp.int32)}, r"chunk_lengths must be \[N\] with N = 6"),
        ({"implementation": "triton"}, "'triton' is not known"),
        ({"k": NARROW}, "q, k and v must share .* got float32, float8_e4m3fn, float32"),
        ({"k": NARROW, "v": NARROW._replace(scale=jnp.zeros((6, 1)))}, r"v.scale must be \[N, G\]"),
        ({"scale": -1.0}, "scale must be a positive number, got -1.0"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, v = case("xla")
    fine = {"q": q, "k": k, "v": v, "chunk_ids": jnp.zeros((2, 3), jnp.int32)}
    fine["chunk_lengths"] = jnp.full((6,), 128)
    attend(**fine)
    for function in (chunk_attention, chunk_attention_mass):
        with pytest.raises(ValueError, match=message):
            function(**{**fine, **change})


TAKES = {"dtype": jnp.bfloat16, "head_size": 128, "chunk_size": 1024}


def test_the_path_used_can_be_asked_for():
    for cpu in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(cpu):
            assert compat.default_device() == jax.devices("cpu")[0]
            assert resolve_implementation(None, **TAKES) == "xla"
    assert resolve_implementation("reference", **TAKES) == "reference"


@OLD_JAX
@pytest.mark.parametrize(
    ("capability", "change", "path"),
    [
        ("9.0", {}, "mosaic_gpu"),
        ("9.0", {"dtype": jnp.float16, "head_size": 64}, "mosaic_gpu"),
        ("9.0", {"dtype": jnp.float32}, "xla"),
        ("9.0", {"pool_dtype": jnp.float8_e4m3fn}, "mosaic_gpu"),
        ("9.0", {"pool_dtype": jnp.int8}, "xla"),
        ("9.0", {"chunk_size": 1000}, "xla"),
        ("8.0", {}, "xla"),
        ("10.0", {}, "xla"),
        (None, {}, "xla"),
    ],
)
def test_the_kernel_is_chosen_where_it_runs(capability, change, path, monkeypatch):
    monkeypatch.setattr(compat, "compute_capability", lambda: capability)
    assert resolve_implementation(None, **{**TAKES, **change}) == path


@OLD_JAX
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "bfloat16 and float16, got float32"),
        ({"head_size": 96}, "head sizes 64 and 128, got 96"),
        ({"chunk_size": 1000}, "multiples of 64, got 1000"),
        ({"pool_dtype": jnp.int8}, "16 bits or float8_e4m3fn, got int8"),
    ],
)
def test_a_named_kernel_is_not_replaced(change, message):
    with pytest.raises(ValueError, match=f"'mosaic_gpu'.*{message}"):
        resolve_implementation("mosaic_gpu", **{**TAKES, **change})
