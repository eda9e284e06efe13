"""What only a GPU shows: cuDNN's attention as the method uses it, and half precision."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import merge
from pallas_kernels.partial import EMPTY_LSE
from pdllm_jax.attention import _blocked, attention, dense_implementation
from pdllm_jax.config import ChunkConfig, DecodeConfig, ModelConfig, SelectionConfig
from pdllm_jax.generate import generate_ids
from pdllm_jax.model import LLaDA
from tests.support import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rows", [32, 100, 512])
@pytest.mark.parametrize("lengths", [None, (300, 0, 7)])
def test_cudnn_attention_with_log_sum_exp(dim, rows, lengths):
    assert dense_implementation(jnp.bfloat16, dim) == "cudnn"
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, rows, 6, dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 300, 2, dim), jnp.bfloat16) for key in keys[1:])
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    got = jax.jit(lambda *x: attention(*x, need_lse=True))(q, k, v, lengths)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = jax.jit(_blocked)(*wide, lengths)
    used = np.array([0, 2]) if lengths is not None else np.arange(3)
    assert relative_error(got.out[used], want.out[used]) < 4e-3
    assert relative_error(got.lse[used], want.lse[used]) < 1e-3
    assert got.lse.dtype == jnp.float32
    if lengths is not None:
        assert (got.lse[1] == EMPTY_LSE).all()
        # What has no keys has no weight, whatever its output holds.
        other = jax.jit(lambda *x: attention(*x, need_lse=True))(q, k, v, None)
        both = merge(got, other)
        assert relative_error(both.out[1], other.out[1]) < 1e-6


def test_cudnn_attention_has_gradients():
    q = jax.random.normal(jax.random.key(0), (2, 64, 4, 64), jnp.bfloat16)

    def loss(q, attend):
        return (attend(q, q, q, None).out.astype(jnp.float32) ** 2).sum()

    got = jax.grad(loss)(q, attention).astype(jnp.float32)
    want = jax.grad(loss)(q.astype(jnp.float32), _blocked)
    assert relative_error(got, want) < 2e-2


@pytest.mark.parametrize("encoding", ["joint", "independent"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_generation_runs_and_repeats(encoding, dtype):
    config = dataclasses.replace(
        ModelConfig.tiny(), d_model=256, n_heads=4, n_kv_heads=2, mlp_hidden_size=384
    )
    model = LLaDA(config, rngs=nnx.Rngs(0), dtype=dtype)
    rng = np.random.default_rng(0)
    prefix, context, query = (rng.integers(0, 250, n) for n in (9, 700, 21))
    runs = [
        generate_ids(
            model, prefix, context, query,
            chunking=ChunkConfig(128), selection=SelectionConfig(top_k=3, encoding=encoding),
            decode=DecodeConfig(gen_length=32, block_length=16),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].selection == runs[1].selection
    assert np.isfinite(runs[0].selection["scores"]).all()
    assert runs[1].timings["compile"] == 0
    assert runs[0].paths["attention"] == ("cudnn" if dtype == jnp.bfloat16 else "xla")


@pytest.mark.parametrize("method", ["plain", "prefix-cache", "dual-cache"])
def test_float32_gives_the_tokens_of_the_cpu(method):
    model = LLaDA(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(0, 250, 50)
    decode = DecodeConfig(gen_length=32, block_length=16)
    on_gpu = generate_ids(model, [], [], prompt, method=method, decode=decode)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = generate_ids(
            jax.device_put(model, cpu), [], [], prompt, method=method, decode=decode
        )
    assert on_gpu.tokens == there.tokens
