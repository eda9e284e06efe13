"""The Hopper kernel beyond the common suite: its schedule, races, and lowering without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import OwnKV, compat, quantise, restored
from pallas_kernels.chunk_attention.hopper import chunk_attention_hopper
from pallas_kernels.chunk_attention.hopper_schedule import SLOT_SHIFT, VALID_BITS, block_table
from pallas_kernels.chunk_attention.hopper_tiling import (
    Geometry,
    Shape,
    Tuning,
    choose,
    shared_memory,
)
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.selection import select_top_k
from pdllm_jax.network import sharding as sharded
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from tests.kernels.test_chunk_attention import IDS, LENGTHS, by_hand, case
from tests.support.kernels import MESH, OLD_JAX, integers, launches, lowered, spec
from tests.support.models import relative_error


def blocks_of(length, first, slot, step=1):
    """(block, fact) of each block of 64 keys with valid keys, counted by hand."""
    counts = [min(64, length - 64 * i) for i in range(-(-length // 64))]
    return [(first + step * i, valid | slot << SLOT_SHIFT) for i, valid in enumerate(counts)]


@pytest.mark.parametrize("seed", range(6))
def test_block_table_holds_every_block_with_keys_once_in_order(seed):
    rng = np.random.default_rng(seed)
    low, high = (1 + (seed > 0), 1, 1, 0), (2 + 3 * (seed > 0), 6, 7, 4)
    batch, slots, splits, own_blocks = rng.integers(low, high).tolist()
    ids = rng.integers(0, 9, (batch, slots))
    lengths = rng.choice([0, 1, 63, 64, 65, 200, 256], (batch, slots))
    own_lengths = rng.integers(0, 64 * own_blocks + 1, batch)
    sizes = Shape(batch, slots, 64, 1, 1, 64, 256, 132)
    settings = {"query_slots": True, "own_keys": 64 * own_blocks, "scale": 1.0}
    geo = Geometry(**vars(sizes), tuning=Tuning(64, 2, splits), **settings)
    counts = jnp.array(own_lengths) if own_blocks else None
    make = jax.jit(block_table, static_argnums=0)
    table = make(geo, jnp.array(ids), jnp.array(lengths), counts)
    units = np.asarray(table.units).reshape(-1, 3)
    blocks, facts = (np.asarray(x).reshape(len(units), -1) for x in (table.blocks, table.facts))
    assert blocks.shape[1] == -(-(slots * 4 + own_blocks) // splits)
    units_of = {
        (b, s): list(zip(blocks[i, :n].tolist(), facts[i, :n].tolist(), strict=True))
        for i, (b, s, n) in enumerate(units.tolist())
    }
    assert sorted(units_of) == [(b, s) for b in range(batch) for s in range(splits)]
    for b in range(batch):
        want = []
        for slot in range(slots):
            want += blocks_of(int(lengths[b, slot]), 4 * int(ids[b, slot]), slot)
        want += blocks_of(int(own_lengths[b]), -1, slots, step=-1)
        got = [units_of[b, s] for s in range(splits)]
        assert list(itertools.chain(*got)) == want
        sizes = [len(unit) for unit in got]
        assert max(sizes) - min(sizes) <= 1
    behind = np.arange(blocks.shape[1]) >= units[:, 2:]
    assert not (facts[behind] & VALID_BITS).any()
    assert blocks.min() >= -own_blocks  # inside, even where nobody asks
    assert blocks.max() < 9 * 4
    if batch > 1:
        assert (np.diff(blocks[:, 0]) >= 0).all()
    else:
        assert sorted(units[:, :2].tolist()) == units[:, :2].tolist()
    assert VALID_BITS >= 128


@OLD_JAX
@pytest.mark.parametrize(
    ("heads", "rows", "shared", "tuning", "sms"),
    [
        (4, 32, False, Tuning(64, 2, 3), 3),  # three items for each CTA
        (14, 32, False, Tuning(64, 3, 2), 2),  # two tiles, the last in part
        (2, 64, True, Tuning(128, 2, 1), 5),  # one unit
        (2, 128, False, Tuning(64, 2, 2), 3),  # two tiles of a head
        (2, 8, False, Tuning(64, 2, 10), 4),  # more splits than the merge has buffers
        (4, 32, False, Tuning(64, 4, 3, 2), 3),  # two warpgroups take turns
        (2, 64, True, Tuning(64, 2, 1, 2), 1),  # taking turns, shared rows, one CTA for all
        (2, 32, False, Tuning(128, 2, 1, 2), 2),  # taking turns, large blocks
        (4, 32, False, Tuning(64, 3, 3, 2, 1), 3),  # fp8, taking turns with one tile
        (14, 32, False, Tuning(64, 2, 2, 1, 2), 2),  # fp8, two tiles of queries share two of keys
        # These join what is above one by one: taking turns, several items; two tiles, large blocks.
        pytest.param(4, 32, False, Tuning(128, 2, 2, 2), 3, marks=pytest.mark.slow),
        pytest.param(2, 128, False, Tuning(128, 2, 2), 2, marks=pytest.mark.slow),
        pytest.param(2, 64, True, Tuning(128, 2, 1, 1, 1), 5, marks=pytest.mark.slow),
        pytest.param(2, 8, False, Tuning(64, 3, 10, 2, 2), 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_interpreter_finds_no_race(heads, rows, shared, tuning, sms, monkeypatch):
    """Several work items for each CTA, units that begin inside a chunk, partial blocks."""
    monkeypatch.setattr(compat, "sm_count", lambda: sms)
    q, k, v = case("interpret", heads=heads, groups=2, rows=rows, layers=2)
    ids, lengths, own_kv = np.array(IDS), LENGTHS, None
    pool = [quantise(x, "fp8", 2) if tuning.tile_stages else x for x in (k, v)]
    all_k, all_v = (restored(x, jnp.float32)[1] for x in pool)
    if shared:
        queries = jnp.broadcast_to(q[:, :1], q.shape)
    else:
        # Own keys: for the oracle two chunks more, of one request each.
        queries = jnp.concatenate([q, q[:, :1] * 0.5], axis=1)
        own_kv = OwnKV(k[1, 4:].swapaxes(1, 2), v[1, 4:].swapaxes(1, 2), jnp.array([100, 40]))
        ids, lengths = np.concatenate([ids, [[6], [7]]], axis=1), [*LENGTHS, 100, 40]
        all_k, all_v = (jnp.concatenate([x, y[1, 4:]]) for x, y in ((all_k, k), (all_v, v)))
    given = queries[:, :1] if shared else queries
    args = given, *pool, 1, jnp.array(IDS), jnp.array(LENGTHS), 64**-0.5, own_kv
    interpret = compat.interpreter(detect_races=True)
    got = chunk_attention_hopper(*args, tuning=tuning, interpret=interpret)
    out, lse = by_hand(queries, all_k, all_v, ids, lengths)
    assert relative_error(got.out, out) < 4e-3
    np.testing.assert_allclose(got.lse, lse, atol=1e-4)
    assert not compat.races_found()


@OLD_JAX
@pytest.mark.parametrize("encoding", ["joint", "independent"])
def test_a_denoising_step_through_the_kernel(encoding):
    """Chunks, rows rotated for each chunk and live KV as the method has them; float16."""
    config = dataclasses.replace(
        ModelConfig.tiny(), d_model=128, n_heads=2, n_kv_heads=1, mlp_hidden_size=64
    )
    model = MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.float16)
    rng = np.random.default_rng(0)
    prompt = chunk_prompt(*(rng.integers(0, 250, n) for n in (5, 170, 7)), ChunkConfig(64))
    cache, scores = prefill(
        model, prompt, SelectionConfig(top_k=2, scorer="last", encoding=encoding)
    )
    decode = DecodeConfig(gen_length=8, block_length=8, steps=2)
    request = cache, select_top_k(scores, 2), prompt.query, decode, jax.random.key(0)
    after = {}
    for name in ("xla", "interpret"):
        state = init_denoise(model, *request, query_length=prompt.query_length)
        after[name] = denoise_step(model, cache, state, config=decode, implementation=name)
    np.testing.assert_array_equal(after["xla"].tokens, after["interpret"].tokens)
    # Values of the second layer come from what attention gave in the first.
    assert relative_error(after["interpret"].live.v[1], after["xla"].live.v[1]) < 2e-3
    assert (after["xla"].tokens != config.mask_token_id).sum() == 4


# Rows and own keys at LLaDA's shape; without own keys all slots share the rows.
LLADA = [(5, 200), (32, 0), (32, 128), (32, 200), (64, 128), (100, 0), (100, 200), (128, 128)]


@OLD_JAX
@pytest.mark.parametrize(
    ("batch", "slots", "rows", "heads", "kv_heads", "dim", "dtype", "own_keys"),
    [
        *((1, 4, rows, 32, 32, 128, jnp.bfloat16, keys) for rows, keys in LLADA),
        (8, 4, 32, 32, 32, 128, jnp.bfloat16, 128),
        (1, 4, 32, 28, 4, 128, jnp.float16, 128),
        (1, 32, 32, 32, 32, 128, jnp.bfloat16, 128),
        (2, 8, 32, 9, 3, 64, jnp.bfloat16, 128),
        (2, 8, 32, 9, 3, 64, jnp.float16, 128),
    ],
)
def test_lowers_for_hopper(batch, slots, rows, heads, kv_heads, dim, dtype, own_keys):
    """One kernel for all layers."""
    pool = spec(4, 64, kv_heads, 1024, dim, dtype=dtype)
    live = spec(batch, own_keys, kv_heads, dim, dtype=dtype)
    own_kv = OwnKV(live, live, integers(batch)) if own_keys else None
    q = spec(batch, slots + 1 if own_keys else 1, rows, heads, dim, dtype=dtype)

    def run(q, k, v, ids, lengths, own_kv):
        args = ids, lengths, dim**-0.5, own_kv
        return [chunk_attention_hopper(q, k, v, layer, *args) for layer in range(4)]

    text = lowered(run, q, pool, pool, integers(batch, slots), integers(64), own_kv)
    assert text.count("func.func private @_launch") == 1
    assert launches(text)


@OLD_JAX
def test_lowers_on_a_mesh_with_a_devices_own_heads_and_columns(monkeypatch):
    """As on Hopper GPUs, a batch of 4 on a mesh of 2 x 4: under shard_map the kernels see parts."""
    monkeypatch.setattr(compat, "compute_capability", lambda: "9.0")

    def layer(q, pool, ids, lengths, own_kv, x, gate, down):
        args = q, pool, pool, ids, lengths
        seen = sharded.chunk_attention(MESH, *args, layer=0, own_kv=own_kv)
        (h,) = sharded.project_columns(MESH, x, gate, gate, activation="swiglu")
        return seen.out, sharded.add_projected(MESH, x, h, down, None)

    live = spec(4, 128, 32, 128)
    attention = spec(4, 5, 32, 32, 128), spec(2, 64, 32, 1024, 128), integers(4, 4), integers(64)
    products = spec(4, 32, 4096), spec(12288, 4096), spec(4096, 12288)
    text = lowered(layer, *attention, OwnKV(live, live, integers(4)), *products)
    taken = [line.rpartition(" : (")[2] for line in launches(text)]
    wanted = ["2x64x8x1024x128xbf16", "64x4096xbf16>, tensor<3072x4096xbf16", "4096x3072xbf16"]
    assert [any(shape in line for line in taken) for shape in wanted] == [True] * 3, taken
    assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("rows", [32, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", [1, 2, 8, 64])
@pytest.mark.parametrize("columns", [1, 4, 8, 32])
def test_the_rule_for_block_sizes_stays_inside_the_device(rows, dim, batch, columns):
    for slots in (1, 4, 32):
        shape = Shape(batch, slots, rows, columns, columns, dim, 1024, 132)
        settings = choose(shape)
        warpgroups = (2 if rows > 64 else 1) * settings.key_groups
        assert warpgroups <= 2
        used = shared_memory(settings.block_keys, settings.stages, warpgroups, dim)
        assert used <= compat.SHARED_MEMORY
        assert settings.stages * settings.block_keys >= 256
        assert settings.splits <= slots * 1024 // settings.block_keys


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_keys", 32), ("stages", 1), ("splits", 0), ("key_groups", 3), ("stages", 3)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        dataclasses.replace(Tuning(64, 4, 1, 2), **{name: value})
