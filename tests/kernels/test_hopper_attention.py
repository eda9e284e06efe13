"""The Hopper kernel beyond the common suite: its schedule, races, and lowering without a GPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import OwnKV, compat
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_schedule import SLOT_SHIFT, VALID_BITS, block_table
from pallas_kernels.chunk_attention.hopper_tiling import Tuning, choose, shared_memory
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.selection import select_top_k
from pdllm_jax.network import sharding as sharded
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from tests.kernels.test_chunk_attention import OLD_JAX, by_hand, case
from tests.support.models import relative_error

IDS, LENGTHS = [[4, 0, 2], [1, 5, 1]], [128, 128, 70, 0, 1, 128]


def test_block_table_holds_every_block_with_keys_once_in_order():
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch, slots, splits = (int(rng.integers(1, n)) for n in (4, 6, 7))
        ids = rng.integers(0, 9, (batch, slots))
        lengths = rng.choice([0, 1, 63, 64, 65, 200, 256], (batch, slots))
        by_chunk = bool(rng.integers(2))
        near_blocks = int(rng.integers(4))
        near = rng.integers(0, 64 * near_blocks + 1, batch)
        make = functools.partial(
            block_table, chunk_size=256, block_keys=64, splits=splits, by_chunk=by_chunk,
            own_blocks=near_blocks,
        )  # fmt: skip
        counts = jnp.array(near) if near_blocks else None
        table = jax.jit(lambda *x, near, make=make: make(*x, own_lengths=near))(
            jnp.array(ids), jnp.array(lengths), near=counts
        )
        units = np.asarray(table.units).reshape(-1, 3)
        blocks, facts = (np.asarray(x).reshape(len(units), -1) for x in (table.blocks, table.facts))
        assert blocks.shape[1] == -(-(slots * 4 + near_blocks) // splits)
        found = {
            (b, s): list(zip(blocks[i, :n].tolist(), facts[i, :n].tolist(), strict=True))
            for i, (b, s, n) in enumerate(units.tolist())
        }
        assert sorted(found) == [(b, s) for b in range(batch) for s in range(splits)]
        for b in range(batch):
            want = []
            for slot in range(slots):
                n = -(-int(lengths[b, slot]) // 64)
                for block in range(n):
                    valid = min(64, int(lengths[b, slot]) - 64 * block)
                    want.append((int(ids[b, slot]) * 4 + block, valid | slot << SLOT_SHIFT))
            for block in range(-(-int(near[b]) // 64)):
                valid = min(64, int(near[b]) - 64 * block)
                want.append((-1 - block, valid | slots << SLOT_SHIFT))
            got = [found[b, s] for s in range(splits)]
            assert [one for unit in got for one in unit] == want
            sizes = [len(unit) for unit in got]
            assert max(sizes) - min(sizes) <= 1
        behind = np.arange(blocks.shape[1]) >= units[:, 2:]
        assert not (facts[behind] & VALID_BITS).any()
        assert blocks.min() >= -near_blocks  # inside, even where nobody asks
        assert blocks.max() < 9 * 4
        if by_chunk:
            assert (np.diff(blocks[:, 0]) >= 0).all()
        else:
            assert sorted(units[:, :2].tolist()) == units[:, :2].tolist()
    assert VALID_BITS >= 128


@OLD_JAX
@pytest.mark.parametrize(
    ("heads", "rows", "shared", "tuning", "sms"),
    [
        (4, 32, False, Tuning(64, 2, 3), 3),
        (14, 32, False, Tuning(64, 3, 2), 2),
        (2, 64, True, Tuning(128, 2, 1), 5),
        (2, 128, False, Tuning(64, 2, 2), 3),
        (2, 8, False, Tuning(64, 2, 10), 4),
        (4, 32, False, Tuning(64, 4, 3, 2), 3),
        (2, 64, True, Tuning(64, 2, 1, 2), 1),
        (2, 32, False, Tuning(128, 2, 1, 2), 2),
        # These join what is above one by one.
        pytest.param(4, 32, False, Tuning(128, 2, 2, 2), 3, marks=pytest.mark.slow),
        pytest.param(2, 128, False, Tuning(128, 2, 2), 2, marks=pytest.mark.slow),
    ],
    ids=[
        "three items a block of threads",
        "two tiles, the last in part",
        "one unit",
        "two tiles of a head",
        "more splits than the merge has buffers",
        "two warpgroups take turns",
        "taking turns, shared rows, one block of threads for all",
        "taking turns, large blocks",
        "taking turns, several items",
        "two tiles, large blocks",
    ],
)
def test_the_interpreter_finds_no_race(heads, rows, shared, tuning, sms, monkeypatch):
    """Several work items a block of threads, units that begin inside a chunk, partial blocks."""
    monkeypatch.setattr(compat, "sm_count", lambda: sms)
    q, k, v = case("interpret", heads=heads, groups=2, rows=rows, layers=2)
    ids, lengths, near = np.array(IDS), LENGTHS, None
    whole_k, whole_v = k[1], v[1]
    if shared:
        queries = jnp.broadcast_to(q[:, :1], q.shape)
    else:
        # Near keys: for the oracle two chunks more, of one request each.
        queries = jnp.concatenate([q, q[:, :1] * 0.5], axis=1)
        near = OwnKV(k[1, 4:].swapaxes(1, 2), v[1, 4:].swapaxes(1, 2), jnp.array([100, 40]))
        ids, lengths = np.concatenate([ids, [[6], [7]]], axis=1), [*LENGTHS, 100, 40]
        whole_k, whole_v = (jnp.concatenate([x, x[4:]]) for x in (whole_k, whole_v))
    got = chunk_attention_hopper(
        queries[:, :1] if shared else queries,
        k,
        v,
        1,
        jnp.array(IDS),
        jnp.array(LENGTHS),
        64**-0.5,
        near,
        tuning=tuning,
        interpret=compat.interpreter(detect_races=True),
    )
    out, lse = by_hand(queries, whole_k, whole_v, ids, lengths)
    assert relative_error(got.out, out) < 4e-3
    np.testing.assert_allclose(got.lse, lse, atol=1e-4)
    assert not compat.races_found()


@OLD_JAX
@pytest.mark.parametrize("encoding", ["joint", "independent"])
def test_a_denoising_step_through_the_kernel(encoding):
    """Chunks, rows rotated for each chunk and live KV as the method has them; float16."""
    config = dataclasses.replace(
        ModelConfig.tiny(), d_model=128, n_heads=2, n_kv_heads=1, mlp_hidden_size=64, n_layers=2
    )
    model = MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.float16)
    rng = np.random.default_rng(0)
    prefix, context, query = (rng.integers(0, 250, n) for n in (5, 170, 7))
    prompt = chunk_prompt(prefix, context, query, ChunkConfig(64))
    select = SelectionConfig(top_k=2, scorer="last", encoding=encoding)
    cache, scores = prefill(model, prompt, select)
    decode = DecodeConfig(gen_length=8, block_length=8, steps=2)
    after = {}
    for name in ("xla", "interpret"):
        state = init_denoise(
            model, cache, select_top_k(scores, 2), prompt.query, decode, jax.random.key(0),
            query_length=prompt.query_length,
        )  # fmt: skip
        after[name] = denoise_step(model, cache, state, config=decode, implementation=name)
    np.testing.assert_array_equal(after["xla"].tokens, after["interpret"].tokens)
    # Values of the second layer come from what attention gave in the first.
    assert relative_error(after["interpret"].live.v[1], after["xla"].live.v[1]) < 2e-3
    assert (after["xla"].tokens != config.mask_token_id).sum() == 4


def lowered(batch, slots, rows, heads, kv_heads, dim, dtype=jnp.bfloat16, near=0, **more):
    def spec(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    pool = spec(4, 64, kv_heads, 1024, dim)
    args = (
        spec(batch, slots + 1 if near else 1, rows, heads, dim), pool, pool,
        spec(batch, slots, dtype=jnp.int32), spec(64, dtype=jnp.int32),
    )  # fmt: skip
    if near:
        live = spec(batch, near, kv_heads, dim)
        args = (*args, OwnKV(live, live, spec(batch, dtype=jnp.int32)))

    def run(q, k, v, ids, lengths, near=None):
        return [
            chunk_attention_hopper(q, k, v, layer, ids, lengths, dim**-0.5, near, **more)
            for layer in range(4)
        ]

    return jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))


@OLD_JAX
@pytest.mark.parametrize(
    ("rows", "near"),
    [(5, 200), (32, 0), (32, 128), (32, 200), (64, 128), (100, 0), (100, 200), (128, 128)],
)
def test_lowers_for_hopper_at_llada_shapes(rows, near):
    """Shared memory, tiles and layouts are checked on the way. One kernel for all layers; without
    near keys all slots share the rows.
    """
    text = lowered(1, 4, rows, 32, 32, 128, near=near).as_text()
    assert text.count("func.func private @_launch") == 1


@OLD_JAX
@pytest.mark.parametrize(
    ("batch", "slots", "heads", "kv_heads", "dim", "dtype"),
    [
        (8, 4, 32, 32, 128, jnp.bfloat16),
        (1, 4, 28, 4, 128, jnp.float16),
        (1, 32, 32, 32, 128, jnp.bfloat16),
        (2, 8, 9, 3, 64, jnp.bfloat16),
        (2, 8, 9, 3, 64, jnp.float16),
    ],
    ids=["batch of 8", "28 heads over 4", "32 chunks", "head size 64", "head size 64, float16"],
)
def test_lowers_for_other_shapes(batch, slots, heads, kv_heads, dim, dtype):
    assert (
        "mosaic_gpu" in lowered(batch, slots, 32, heads, kv_heads, dim, dtype, near=128).as_text()
    )


@OLD_JAX
def test_lowers_on_a_mesh_with_a_devices_own_heads_and_columns(monkeypatch):
    """As on Hopper GPUs, a batch of 4 on a mesh of 2 x 4: under shard_map the kernels see parts."""
    monkeypatch.setattr(compat, "compute_capability", lambda: "9.0")
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh((2, 4), ("data", "tensor"), axis_types=axes)

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def layer(q, pool, ids, lengths, near, x, gate, down):
        seen = sharded.chunk_attention(mesh, q, pool, pool, ids, lengths, layer=0, near=near)
        (h,) = sharded.project_columns(mesh, x, gate, gate, activation="swiglu")
        return seen.out, sharded.add_projected(mesh, x, h, down, None)

    live, counts = spec(4, 128, 32, 128), spec(4, dtype=jnp.int32)
    args = (
        spec(4, 5, 32, 32, 128), spec(2, 64, 32, 1024, 128), spec(4, 4, dtype=jnp.int32),
        spec(64, dtype=jnp.int32), OwnKV(live, live, counts), spec(4, 32, 4096), spec(12288, 4096),
        spec(4096, 12288),
    )  # fmt: skip
    text = jax.jit(layer).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    launches = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    taken = [line.rpartition(" : (")[2] for line in launches]
    wanted = ["2x64x8x1024x128xbf16", "64x4096xbf16>, tensor<3072x4096xbf16", "4096x3072xbf16"]
    assert [any(shape in line for line in taken) for shape in wanted] == [True] * 3, taken
    assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("rows", [8, 32, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", [1, 2, 8, 64])
@pytest.mark.parametrize("columns", [1, 4, 8, 32])
def test_the_rule_for_block_sizes_stays_inside_the_device(rows, dim, batch, columns):
    for slots in (1, 4, 32):
        tiles = 2 if rows > 64 else 1
        settings = choose(
            batch=batch, slots=slots, columns=columns, chunk_size=1024, dim=dim, tiles=tiles,
            sms=132,
        )  # fmt: skip
        warpgroups = tiles * settings.key_groups
        assert warpgroups <= 2
        used = shared_memory(settings.block_keys, settings.stages, warpgroups, dim)
        assert used <= compat.SHARED_MEMORY
        assert settings.stages * settings.block_keys >= 256
        assert settings.splits <= slots * 1024 // settings.block_keys


def test_settings_are_checked():
    for wrong in (
        {"block_keys": 32},
        {"stages": 1},
        {"splits": 0},
        {"key_groups": 3},
        {"stages": 3},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(Tuning(64, 4, 1, 2), **wrong)
