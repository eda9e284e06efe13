"""Requests and chunks without keys add zeros, in every implementation; garbage stays unused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels import EMPTY_LSE, OwnKV, Partial, chunk_attention, compat, merge
from pallas_kernels.chunk_attention import dense
from pallas_kernels.chunk_attention.cudnn import chunk_attention_cudnn
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_tiling import Tuning
from pallas_kernels.chunk_attention.xla import chunk_attention_xla
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.engine import Engine
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from tests.kernels.test_chunk_attention import assert_close, by_hand, normal
from tests.support.kernels import OLD_JAX
from tests.support.method import answer_with_and_without_prefix

# Chunks and own keys: some empty; none but own; no own; none at all. The last two chunks are empty.
IDS, LENGTHS, OWN_LENGTHS = [[0, 3], [3, -1], [1, 0], [2, 3]], [64, 37, 0, 0], [5, 9, 0, 0]
GARBAGE = pytest.mark.parametrize("garbage", [np.nan, np.inf])
HEAD_SIZES = pytest.mark.parametrize("dim", [64, 128])


def softmax(q, k, v, lengths, scale):
    """cuDNN as it is: undefined without keys, and padding has weight 0 but is multiplied."""
    heads = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, *(jnp.repeat(x, heads, axis=2) for x in (k, v))))
    lengths = jnp.full(len(q), k.shape[1]) if lengths is None else lengths
    valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    scores = jnp.where(valid, jnp.einsum("bthd,bshd->bhts", q, k) * scale, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", jnp.exp(scores - lse[..., None]), v)
    return out, jnp.where(lengths[:, None, None] > 0, lse, jnp.nan)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """`softmax` in place of cuDNN's two functions."""

    def private(q, k, v, *, kv_seqlen, scale, qkv_layout, **settings):
        if qkv_layout == "BNTH":
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out, lse = softmax(q, k, v, kv_seqlen, scale)
        out = out.swapaxes(1, 2) if qkv_layout == "BNTH" else out
        return out.astype(q.dtype), lse

    def public(q, k, v, *, key_value_seq_lengths, scale, implementation):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return softmax(q, k, v, key_value_seq_lengths, scale)[0].astype(q.dtype)

    if jax.default_backend() == "cpu":
        monkeypatch.setattr(dense, "dense_implementation", lambda dtype, dim: "cudnn")
        monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", private)
        monkeypatch.setattr(jax.nn, "dot_product_attention", public)


def undefined(q, k, v, layer, chunk_ids, chunk_lengths, scale):
    """A custom implementation that gives NaN for requests without keys."""
    out, lse = chunk_attention_xla(q, k, v, layer, chunk_ids, chunk_lengths, scale)
    empty = (lse == EMPTY_LSE).swapaxes(1, 2)[..., None]
    return Partial(jnp.where(empty, jnp.nan, out), jnp.where(lse == EMPTY_LSE, jnp.nan, lse))


def through_kernel(*tuning):
    """The interpreted kernel with its own merges: of splits, and of warpgroups that take turns."""

    def run(q, k, v, layer, ids, lengths, scale):
        settings = {"tuning": Tuning(*tuning), "interpret": compat.interpreter()}
        return chunk_attention_hopper(q, k, v, layer, ids, lengths, scale, **settings)

    return run


INTERPRETED = through_kernel(64, 2, 3), through_kernel(64, 4, 3, 2)
CASES = [
    *((run, dtype) for run in ("xla", "reference", undefined) for dtype in ("float32", "bfloat16")),
    *((run, "float16") for run in ("xla", "reference", undefined)),
    *(("cudnn", dtype) for dtype in ("bfloat16", "float16")),
    *(pytest.param(run, "float16", marks=OLD_JAX) for run in ("interpret", INTERPRETED[0])),
    pytest.param(INTERPRETED[1], "bfloat16", marks=OLD_JAX),
    *(pytest.param("mosaic_gpu", x, marks=pytest.mark.gpu) for x in ("bfloat16", "float16")),
    *(pytest.param("cudnn", x, marks=pytest.mark.gpu) for x in ("bfloat16", "float16")),
]


@functools.partial(jax.jit, static_argnames="implementation")
def attend(*args, own_kv, implementation):
    """One program for both kinds of garbage, always with cuDNN's stand-in."""
    return chunk_attention(*args, own_kv=own_kv, implementation=implementation)


def spoils(dim: int, garbage: float) -> bool:
    return (dim == 64) == np.isnan(garbage)


@pytest.mark.usefixtures("cudnn_on_cpu")
@pytest.mark.parametrize(("implementation", "dtype"), CASES)
@pytest.mark.parametrize("own", [False, True], ids=["chunks", "own keys"])
@HEAD_SIZES
@GARBAGE
def test_chunk_attention(implementation, dtype, own, dim, garbage):
    few = {"interpret": (64, 128)} | dict(zip(INTERPRETED, ((64,), (128,)), strict=True))
    if implementation in few and not (own and dim in few[implementation] and spoils(dim, garbage)):
        pytest.skip("slow: interpreted with own keys, each head size with one kind of garbage")
    dtype = jnp.dtype(dtype).type
    pool, live = (4, 2, 64, dim), (4, 64, 2, dim)
    k, v, own_k, own_v, q = normal(0, dtype, pool, pool, live, live, (4, 3, 8, 4, dim))

    def spoil(x, lengths, axis):
        valid = jnp.arange(64) < jnp.array(lengths)[:, None]
        return jnp.where(jnp.expand_dims(valid, (axis, 3)), x, garbage).astype(dtype)

    k, v = (spoil(x, LENGTHS, 1) for x in (k, v))
    own_k, own_v = (spoil(x, OWN_LENGTHS, 2) for x in (own_k, own_v))
    own_kv = OwnKV(own_k, own_v, jnp.array(OWN_LENGTHS)) if own else None
    q = q if own else q[:, :2]
    args = q, k, v, jnp.array(IDS), jnp.array(LENGTHS)
    got = attend(*args, own_kv=own_kv, implementation=implementation)
    ids, lengths = IDS, LENGTHS
    if own:  # as one chunk more, of which every request has its own
        ids = [[*row, 4 + i] for i, row in enumerate(IDS)]
        k, v = (jnp.concatenate([x, y.swapaxes(1, 2)]) for x, y in ((k, own_k), (v, own_v)))
        lengths = [*LENGTHS, *OWN_LENGTHS]
    out, lse = by_hand(q, k, v, ids, lengths)
    empty = np.isneginf(lse).all(axis=(1, 2))
    assert empty.tolist() == [False, not own, False, True]
    assert (got.out[empty] == 0).all()
    assert (got.lse[empty] == EMPTY_LSE).all()
    assert_close(Partial(got.out[~empty], got.lse[~empty]), (out[~empty], lse[~empty]), dtype)


@functools.partial(jax.jit, static_argnames="path")
def attend_dense(*args, path):
    """`path` is static, so that what is patched for one path is traced for that one alone."""
    return dense.attention(*args, need_lse=path != "no lse")


@pytest.mark.usefixtures("cudnn_on_cpu")
@pytest.mark.parametrize("path", ["xla", "lse", "no lse"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@HEAD_SIZES
@GARBAGE
def test_dense_attention(path, dtype, dim, garbage, monkeypatch):
    if path == "xla":
        monkeypatch.setattr(dense, "dense_implementation", lambda dtype, dim: "xla")
    elif dtype == "float32":
        pytest.skip("cuDNN takes half precision alone")
    q, k, v = normal(1, jnp.dtype(dtype).type, (3, 8, 4, dim), (3, 40, 2, dim), (3, 40, 2, dim))
    lengths = jnp.array([7, 0, 40])
    behind = (jnp.arange(40) >= lengths[:, None])[..., None, None]
    k, v = (jnp.where(behind, garbage, x).astype(dtype) for x in (k, v))
    got = attend_dense(q, k, v, lengths, path=path)
    pool = (x.swapaxes(1, 2) for x in (k, v))
    out, lse = by_hand(q[:, None], *pool, [[0], [1], [2]], lengths)
    used = np.array([0, 2])
    lse = got.lse[used] if path == "no lse" else lse[used]
    assert_close(Partial(got.out[used], got.lse[used]), (out[used], lse), jnp.dtype(dtype).type)
    assert (got.out[1] == 0).all()
    assert (got.lse[1] == EMPTY_LSE).all()


@pytest.mark.parametrize("lse", [EMPTY_LSE, -np.inf])
@GARBAGE
def test_merge_drops_the_output_of_a_part_without_keys(lse, garbage):
    q = normal(2, jnp.float32, (1, 3, 2, 8))[0]
    part = Partial(q, q.sum(-1).swapaxes(1, 2))
    empty = Partial(jnp.full_like(q, garbage), jnp.full_like(part.lse, lse))
    for parts in ((part,), (empty, part), (part, empty), (empty, part, empty)):
        got = merge(*parts)
        np.testing.assert_array_equal(got.out, part.out)
        np.testing.assert_array_equal(got.lse, part.lse)
    for parts in ((empty,), (empty, empty)):
        got = merge(*parts)
        assert (got.out == 0).all()
        assert (got.lse == EMPTY_LSE).all()
    wrong = merge(part, part._replace(out=q * np.nan, lse=part.lse * np.nan))
    assert np.isnan(wrong.out).all(), "an error in a part with keys stays visible"


@pytest.mark.usefixtures("cudnn_on_cpu")
@pytest.mark.slow  # test_combinations.py mixes prefixes by default, through XLA
@pytest.mark.parametrize("encoding", ["independent", "joint", "bridge"])
def test_a_batch_with_and_without_prefix_equals_each_alone(encoding):
    """Through cuDNN's stand-in, prefill to answer; sizes that no other test compiles for."""
    sizes = {"d_model": 128, "n_heads": 2, "n_kv_heads": 1, "mlp_hidden_size": 72}
    model = MaskPredictor(
        dataclasses.replace(ModelConfig.tiny(), **sizes), rngs=nnx.Rngs(0), dtype=jnp.float16
    )
    engine = Engine(
        model,
        chunking=ChunkConfig(16),
        selection=SelectionConfig(top_k=2, encoding=encoding),
        decoding=DecodeConfig(gen_length=8, block_length=8, steps=2),
        implementation=chunk_attention_cudnn,
        bos_id=253,
    )
    for alone, together in answer_with_and_without_prefix(engine, 60, 5, (0, 20, 3, 0), 5e-3):
        assert together.tokens == alone.tokens
