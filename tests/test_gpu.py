"""What only a GPU shows: cuDNN's attention as the method uses it, and half precision."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import Norm, all_reduce, chunk_attention, peer_problem, peer_table
from pallas_kernels.chunk_attention.dense import attention, attention_xla, dense_implementation
from pallas_kernels.common import EMPTY_LSE, rms_norm
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.engine import Engine
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.sharding import DATA, TENSOR, make_mesh
from pdllm_jax.network.transformer import MaskPredictor, shard_model
from tests.support.method import answer_with_and_without_prefix
from tests.support.models import relative_error

pytestmark = pytest.mark.gpu
RNG = np.random.default_rng(0)
PARTS = [RNG.integers(0, 250, n) for n in (9, 700, 21)]
WIDE = {"d_model": 256, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 384}
WIDER = {"d_model": 1024, "n_heads": 16, "n_kv_heads": 4, "mlp_hidden_size": 768}


def random_model(dtype, sizes=WIDE) -> MaskPredictor:
    """A model of kernel sizes."""
    config = dataclasses.replace(ModelConfig.tiny(), **sizes)
    return MaskPredictor(config, rngs=nnx.Rngs(0), dtype=dtype)


def answer(model, encoding="joint", implementation=None, *, parts=PARTS, size=128, k=3, **decode):
    """An answer of 32 tokens from `parts`: prefix, document, question."""
    prefix, context, question = parts
    engine = Engine(
        model,
        chunking=ChunkConfig(size),
        selection=SelectionConfig(top_k=k, encoding=encoding),
        decoding=DecodeConfig(gen_length=32, **decode),
        implementation=implementation,
    )
    return engine.answer(context, question, prefix=prefix)


def mesh_of(data: int, tensor: int) -> Mesh:
    """A mesh of GPUs; skips the test where there are fewer."""
    if len(jax.devices("gpu")) < data * tensor:
        pytest.skip("there are fewer GPUs")
    return make_mesh(data, tensor)


@pytest.mark.parametrize("rows", [3, 36, 512])
@pytest.mark.parametrize("lengths", [None, (30, 0, 7)])
def test_causal_cudnn_attention(rows, lengths):
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (6, 2, 2)
    q, k, v = (
        jax.random.normal(key, (3, rows, n, 128), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    given = None if lengths is None else jnp.minimum(jnp.array(lengths), rows)
    got = jax.jit(lambda *x: attention(*x, need_lse=True, causal=True))(q, k, v, given)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = jax.jit(lambda *x: attention_xla(*x, causal=True))(*wide, given)
    assert relative_error(got.out, want.out) < 1e-2
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("rows", [32, 100, 512])
@pytest.mark.parametrize("lengths", [None, (300, 0, 7)])
def test_cudnn_attention_with_log_sum_exp(dim, rows, lengths):
    assert dense_implementation(jnp.bfloat16, dim) == "cudnn"
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (3, rows, 6, dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (3, 300, 2, dim), jnp.bfloat16) for key in keys[1:])
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)
    behind = jnp.zeros((3, 300), bool)
    if lengths is not None:
        behind = jnp.arange(300) >= lengths[:, None]
    k, v = (jnp.where(behind[..., None, None], jnp.nan, x) for x in (k, v))
    got = jax.jit(lambda *x: attention(*x, need_lse=True))(q, k, v, lengths)
    plain = jax.jit(attention)(q, k, v, lengths)  # another function of cuDNN's
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = jax.jit(attention_xla)(*wide, lengths)
    used = np.array([0, 2]) if lengths is not None else np.arange(3)
    assert relative_error(got.out[used], want.out[used]) < 4e-3
    assert relative_error(got.lse[used], want.lse[used]) < 1e-3
    assert relative_error(plain.out[used], want.out[used]) < 4e-3
    assert got.lse.dtype == jnp.float32
    if lengths is not None:
        assert (got.lse[1] == EMPTY_LSE).all()
        assert (got.out[1] == 0).all()
        assert (plain.out[1] == 0).all()


def test_cudnn_attention_has_gradients():
    q = jax.random.normal(jax.random.key(0), (2, 64, 4, 64), jnp.bfloat16)

    def loss(q, attend):
        return (attend(q, q, q, None).out.astype(jnp.float32) ** 2).sum()

    got = jax.grad(loss)(q, attention).astype(jnp.float32)
    want = jax.grad(loss)(q.astype(jnp.float32), attention_xla)
    assert relative_error(got, want) < 2e-2


@pytest.mark.parametrize("encoding", ["joint", "independent"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_generation_runs_and_repeats(encoding, dtype):
    model = random_model(dtype)
    runs = [answer(model, encoding, block_length=16) for _ in range(2)]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].selection == runs[1].selection
    assert np.isfinite(runs[0].selection["scores"]).all()
    assert runs[1].timings["compile"] == 0
    half = dtype == jnp.bfloat16
    assert runs[0].paths["attention"] == ("cudnn" if half else "xla")
    assert runs[0].paths["chunk_attention"] == ("mosaic_gpu" if half else "xla")


@pytest.mark.parametrize("encoding", ["joint", "independent"])
@pytest.mark.parametrize("recompute", ["block", "response"])
def test_the_kernel_gives_the_tokens_of_the_portable_path(encoding, recompute):
    """Each of two blocks in one step. Random weights decide between near ties, so in float16 most
    tokens and not all must agree; the second block depends on the first.
    """
    model = random_model(jnp.float16)
    decode = {"block_length": 16, "steps": 2, "recompute": recompute}
    names = ("mosaic_gpu", "xla", "cudnn")
    runs = {name: answer(model, encoding, name, **decode) for name in names}
    assert all(run.paths["chunk_attention"] == name for name, run in runs.items())
    blocks = {name: np.array(run.tokens).reshape(2, 16) for name, run in runs.items()}
    for name in ("mosaic_gpu", "cudnn"):
        same = blocks[name] == blocks["xla"]
        assert same[0].mean() >= 0.9, (name, same)
        assert same[1].mean() >= 0.9 or not same[0].all(), (name, same)


@pytest.mark.parametrize("implementation", ["cudnn", "mosaic_gpu"])
@pytest.mark.parametrize("encoding", ["joint", "independent", "bridge"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_batch_with_and_without_prefix_equals_each_alone(dim, encoding, implementation):
    """cuDNN is undefined for the prefixes without tokens. float16 decides some near ties."""
    model = random_model(jnp.float16, {**WIDE, "d_model": 4 * dim})
    engine = Engine(
        model,
        chunking=ChunkConfig(128),
        selection=SelectionConfig(top_k=3, encoding=encoding),
        decoding=DecodeConfig(gen_length=32, block_length=32, steps=1),
        implementation=implementation,
        bos_id=253,
    )
    for alone, together in answer_with_and_without_prefix(engine, 700, 21, (0, 40, 9, 0), 2e-2):
        assert np.mean(np.array(together.tokens) == np.array(alone.tokens)) >= 0.9


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("encoding", ["joint", "independent"])
def test_several_gpus_give_the_tokens_of_one(mesh, encoding):
    """Through the kernels under shard_map; float16 sums in parts decide some near ties."""
    devices, tensor = mesh_of(*mesh), mesh[1]
    model = random_model(jnp.float16, WIDER)
    spread = shard_model(model, devices, sums="mosaic_gpu")
    one, several = (answer(each, encoding, block_length=32, steps=1) for each in (model, spread))
    assert several.paths["chunk_attention"] == one.paths["chunk_attention"] == "mosaic_gpu"
    assert several.paths["sums"] == ("mosaic_gpu" if tensor > 1 else "xla")
    assert several.selection["chunks"] == one.selection["chunks"]
    np.testing.assert_allclose(several.selection["scores"], one.selection["scores"], atol=2e-2)
    assert np.mean(np.array(several.tokens) == np.array(one.tokens)) >= 0.9


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_sums_over_several_gpus_are_right_in_any_order_of_calls(mesh, dtype):
    """Calls of four sizes, one behind the other, the devices not at the same pace."""
    if (problem := peer_problem(mesh := mesh_of(*mesh), TENSOR)) is not None:
        pytest.skip(problem)
    weight, kind = jax.random.normal(jax.random.key(1), (1024,), dtype), jnp.finfo(dtype)

    def rounded(x):
        """To the dtype for certain, as XLA would go on with float32; which makes subnormals 0."""
        x = lax.reduce_precision(x, kind.nexp, kind.nmant)
        return jnp.where(jnp.abs(x) < kind.tiny, 0, x)

    def in_order(x):
        """The sum as it is made: in float32, in the order of the devices, rounded."""
        parts = lax.all_gather(x, TENSOR).astype(jnp.float32)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return rounded(total).astype(dtype)

    def run(table):
        rank = lax.axis_index(TENSOR)

        def call(turn, wrong):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), turn), rank)
            late = jnp.where(lax.rem(turn, mesh.shape[TENSOR]) == rank, 40, 0)
            key = lax.fori_loop(0, late, lambda _, key: jax.random.split(key)[0], key)
            given = [jax.random.normal(key, (rows, 1024), dtype) for rows in (32, 1, 128, 33)]
            last, results = jnp.zeros((), dtype), []  # so that each sum waits for the one before
            for x in given:
                (got,) = all_reduce(x + 0 * last, TENSOR, table=table, implementation="mosaic_gpu")
                both = all_reduce(x, TENSOR, table=table, residual=got, norm=Norm(weight, 1e-5))
                last = both[1][0, 0]
                results.append((got, *both))
            for x, (got, total, normed) in zip(given, results, strict=True):
                want = in_order(x + 0 * last)
                added = rounded(got + got)
                scaled = rms_norm(total, weight, 1e-5)
                most = 8 * kind.eps * jnp.maximum(jnp.abs(scaled), kind.tiny)
                off = jnp.abs(normed - scaled) > most
                wrong += (rounded(got) != want).sum() + (rounded(total) != added).sum() + off.sum()
            return wrong

        return lax.fori_loop(0, 200, call, jnp.int32(0))[None, None]

    each = PartitionSpec(DATA, TENSOR)
    run = jax.shard_map(run, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)
    wrong = jax.jit(run)(peer_table(mesh, TENSOR))
    assert not wrong.any(), wrong


@pytest.mark.parametrize("sums", ["mosaic_gpu", "xla"])
def test_programs_of_several_threads_do_not_mix_up_on_a_mesh(sums):
    """Of programs without logits, whose one collective of XLA is the embedding's."""
    if (problem := peer_problem(mesh := mesh_of(1, 2), TENSOR)) is not None:
        pytest.skip(problem)
    model = shard_model(random_model(jnp.bfloat16, WIDER), mesh, sums=sums)
    run = jax.jit(lambda model, ids: model.encode(ids))
    rng = np.random.default_rng(0)
    asked = [jnp.array(rng.integers(0, 250, (1, 24 + i % 2))) for i in range(4)]
    alone = [np.asarray(run(model, ids)) for ids in asked]

    def calls(i):
        return [run(model, asked[i]) for _ in range(400)]

    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(calls, range(4)))
    for results, want in zip(threads, alone, strict=True):
        for got in results:
            np.testing.assert_array_equal(np.asarray(got), want)


def llada_8b_inputs(layers, chunks=4, rows=32):
    """A pool, selection and query rows at LLaDA-8B's head shapes."""
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (layers, 8, 32, 1024, 128), jnp.bfloat16) for key in keys[:2])
    q = jax.random.normal(keys[2], (1, chunks, rows, 32, 128), jnp.bfloat16)
    return q, k, v, jnp.array([[6, 1, 3, 0][:chunks]]), jnp.array([1024, 1024, 7, 700] + [1024] * 4)


@pytest.mark.parametrize("rows", [32, 64, 128])
def test_the_kernel_repeats_itself_bit_for_bit(rows):
    q, k, v, ids, lengths = llada_8b_inputs(1, rows=rows)
    run = jax.jit(lambda *x: chunk_attention(*x, layer=0, implementation="mosaic_gpu"))
    first = run(q, k, v, ids, lengths)
    differs = jnp.zeros((), bool)
    for _ in range(1000):
        repeat = run(q, k, v, ids, lengths)
        differs |= (repeat.out != first.out).any() | (repeat.lse != first.lse).any()
    assert not differs


def test_the_kernel_makes_no_copy_of_the_pool():
    args = llada_8b_inputs(4)

    def layers(*x):
        return [chunk_attention(*x, layer=i, implementation="mosaic_gpu").out for i in range(4)]

    compiled = jax.jit(layers).lower(*args).compile()
    chosen = 2 * 4 * 32 * 1024 * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < chosen / 10


@pytest.mark.slow
def test_at_llada_8b_shapes_the_kernel_gives_the_tokens_of_the_portable_path():
    """Random weights decide between near ties, so most tokens and not all must agree."""
    model = MaskPredictor(ModelConfig.llada_8b(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    settings = {"parts": [rng.integers(0, 126_000, n) for n in (16, 8000, 32)], "size": 1024}
    settings |= {"k": 4, "block_length": 32, "steps": 1}
    kernel, xla = (answer(model, implementation=x, **settings) for x in ("mosaic_gpu", "xla"))
    assert kernel.selection == xla.selection
    same = np.mean(np.array(kernel.tokens) == np.array(xla.tokens))
    assert same >= 0.9, same


@pytest.mark.parametrize("method", ["plain", "prefix-cache", "dual-cache"])
def test_float32_gives_the_tokens_of_the_cpu(method):
    model = MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(0, 250, 50)
    engine = Engine(model, method=method, decoding=DecodeConfig(gen_length=32, block_length=16))
    on_gpu = engine.answer([], prompt)
    with jax.default_device(cpu := jax.devices("cpu")[0]):
        moved = dataclasses.replace(engine, model=jax.device_put(model, cpu))
        assert on_gpu.tokens == moved.answer([], prompt).tokens


def test_the_compiler_spills_and_warns_of_nothing():
    from bench.compiled import compiled

    rows = compiled()
    assert len(rows) > 10
    assert [row["case"] for row in rows if row["warnings"]] == []
    assert [k for row in rows for k in row["kernels"] if k["spilled_bytes"]] == []
