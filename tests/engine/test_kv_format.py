"""KV of chunks in fp8: what is decoded is what the restored KV would give in full."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ConfigError, Engine, SelectionConfig, plan_memory
from pdllm_jax.config import DecodeConfig
from pdllm_jax.engine.offload import encode_offloaded, offload, select_offloaded
from pdllm_jax.engine.request import drop_other_chunks
from pdllm_jax.method.cache import ChunkPool
from pdllm_jax.method.chunking import batch_prompts, chunk_prompt
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.prefill import encode_document, prefill_top_k
from pdllm_jax.method.selection import select_top_k
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage.snapshot import load_document, load_request, save_document, save_request
from pdllm_jax.storage.store import DocumentStore
from tests.support.method import BOS, CHUNKS, copy, first_state, prompt_parts, sharp_model, widened

FULL = SelectionConfig(top_k=2, scorer="query", encode_batch=2, encoding="independent")
FP8 = dataclasses.replace(FULL, kv_format="fp8")
DECODE = DecodeConfig(gen_length=4, block_length=4)
PREFIX, DOCUMENT, QUERY = prompt_parts()
MODEL = sharp_model()
ENGINE = Engine(MODEL, chunking=CHUNKS, selection=FP8, decoding=DECODE, bos_id=BOS)


@pytest.fixture(scope="module")
def prompt():
    """Of five chunks, the last one short."""
    return chunk_prompt(PREFIX, DOCUMENT, QUERY, CHUNKS, tight=True)


@pytest.fixture(scope="module")
def cache(prompt):
    return encode_document(MODEL, prompt, encode_batch=2, kv_format="fp8")


def restored(pool: ChunkPool) -> ChunkPool:
    """The pool in full, of the values that it stands for."""
    k, v = (x.restore(jnp.float32) for x in (pool.k, pool.v))
    return dataclasses.replace(pool, k=k, v=v)


def valid_rows(pool: ChunkPool) -> tuple[np.ndarray, ...]:
    """K and V in float32, zeros behind the valid rows."""
    valid = (jnp.arange(pool.k.shape[3]) < pool.lengths[:, None])[None, :, None, :, None]
    full = pool if pool.kv_format == "full" else restored(pool)
    return tuple(np.asarray(jnp.where(valid, x, 0)) for x in (full.k, full.v))


def assert_equal(x, y) -> None:
    """Equal trees of arrays, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, x, y)


def assert_nearest(pool: ChunkPool, want: ChunkPool) -> None:
    """fp8 has three bits behind the leading one; what is less than 2^-6 loses more of them.

    A scale is a chunk's largest magnitude over 448.
    """
    for x, got, rows in zip((pool.k, pool.v), valid_rows(pool), valid_rows(want), strict=True):
        largest = np.abs(rows).max(axis=(-2, -1))
        np.testing.assert_allclose(x.scale, np.where(largest > 0, largest / 448, 1), rtol=1e-6)
        step = np.asarray(x.scale)[..., None, None] * 2.0**-9
        assert (np.abs(got - rows) <= np.maximum(np.abs(rows) * 2**-4, step / 2) * 1.001).all()


def test_a_pool_holds_the_nearest_values_in_half_the_bytes(prompt, cache):
    want = encode_document(MODEL, prompt, encode_batch=2).pool
    assert_nearest(cache.pool, want)
    scales = cache.pool.k.size // CHUNKS.chunk_size // MODEL.config.head_dim
    assert cache.pool.k.nbytes == want.k.size + 4 * scales


def test_neither_padding_nor_the_batch_changes_a_value(prompt, cache):
    """Rows behind a chunk's end, other chunks of its group, other documents, streaming."""
    length = int(prompt.chunk_lengths[0, 4])
    ids = prompt.chunks.at[0, 4, length:].set(77)
    padded = widened(dataclasses.replace(prompt, chunks=ids), chunks=2, prefix=3)
    other = chunk_prompt(PREFIX[:2], DOCUMENT[:30], QUERY, CHUNKS)
    batch = batch_prompts([other, padded])
    first, five = batch.chunks.shape[1], jnp.arange(5)
    wide = encode_document(MODEL, batch, encode_batch=3, kv_format="fp8").pool
    lengths = cache.pool.lengths[:5]
    assert_equal(wide.take(first + five, lengths), cache.pool.take(five, lengths))
    streamed, selection, _ = prefill_top_k(MODEL, prompt, FP8)
    ids, slots = selection.chunk_ids[0], selection.slots[0]
    lengths = cache.pool.lengths[ids]
    assert_equal(streamed.pool.take(slots, lengths), cache.pool.take(ids, lengths))


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": "joint"},
        {"encoding": "bridge", "bridge_tokens": "attention"},
        {"keep_tokens": 5},
        pytest.param({"encoding": "query-conditioned"}, marks=pytest.mark.slow),
        pytest.param({"encoding": "bridge", "keep_tokens": 5}, marks=pytest.mark.slow),
        pytest.param({"encoding": "joint", "keep_tokens": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_chosen_chunks_are_decoded_as_restored(prompt, cache, change):
    """The state's pool is near the one in full, and attention reads the values it stands for."""
    scores = jnp.array([[0.0, 3.0, 0.0, 0.0, 1.0]])
    args = select_top_k(scores, 2), prompt, DECODE
    config = dataclasses.replace(FP8, **change)
    state = first_state(MODEL, cache, *args, settings=config)
    assert state.pool.kv_format == "fp8"
    if config.encoding.name != "bridge" and change.keys() != {"encoding", "keep_tokens"}:
        source = dataclasses.replace(cache, pool=restored(cache.pool))
        full = dataclasses.replace(config, kv_format="full")
        want = first_state(MODEL, source, *args, settings=full).pool
        if "keep_tokens" in change:  # values and scales are kept as they are
            assert_equal(valid_rows(state.pool), valid_rows(want))
        else:
            assert_nearest(state.pool, want)
    other = copy(dataclasses.replace(state, pool=restored(state.pool)))
    got, want = (denoise(MODEL, None, x, config=DECODE) for x in (state, other))
    assert_equal((got.tokens, got.probability), (want.tokens, want.probability))


def test_questions_about_a_document_that_was_stored(prompt, cache, tmp_path):
    """On the device, from a snapshot, from a store and from host memory, with one answer."""
    ids = {"prefix_ids": PREFIX, "context_ids": DOCUMENT}
    encoded = ENGINE.encode(DOCUMENT, prefix=PREFIX)
    assert_equal(encoded.pool, cache.pool)
    (want,) = ENGINE.ask(encoded, [QUERY])
    save_document(tmp_path / "document", MODEL, encoded, chunking=CHUNKS)
    restored = load_document(tmp_path / "document", MODEL).cache
    assert_equal(restored, encoded)
    store = DocumentStore(tmp_path / "store", MODEL)
    given = {**ids, "chunking": CHUNKS, "bos_id": BOS, "encode_batch": 2}
    store.encode_ids(**given)
    assert_equal(store.encode_ids(**given, kv_format="fp8"), encoded)
    assert len(store.keys()) == 2
    for document in (
        encode_offloaded(MODEL, prompt, encode_batch=2, kv_format="fp8"),
        offload(restored),
    ):
        assert document.nbytes == 2 * cache.pool.k.nbytes // 6 * 5  # a sixth is no chunk
        (got,) = ENGINE.decode(select_offloaded(MODEL, document, QUERY, FP8))
        assert got.tokens == want.tokens
    refused = r"KV is in format 'fp8', .* kv_format is 'full': .* set kv_format='fp8'"
    with pytest.raises(ConfigError, match=refused):
        dataclasses.replace(ENGINE, selection=FULL).ask(restored, [QUERY])
    with pytest.raises(ConfigError, match=refused):
        select_offloaded(MODEL, document, QUERY, FULL)


@pytest.mark.slow
def test_a_request_is_decoded_elsewhere(tmp_path):
    (want,) = ENGINE.answer_batch([(DOCUMENT, QUERY)])
    for name, encode in {"selection": False, "state": True}.items():
        request = drop_other_chunks(ENGINE.prefill(DOCUMENT, QUERY, encode=encode))
        save_request(tmp_path / name, MODEL, request, chunking=CHUNKS)
        loaded = load_request(tmp_path / name, MODEL)
        assert loaded.config.kv_format == "fp8"
        assert ENGINE.decode(loaded)[0].tokens == want.tokens


def test_the_plan_counts_bytes_and_scales():
    """Of LLaDA-8B: 36 chunks of 1,024 rows of 32 heads of 128, in 32 layers."""
    made = {}
    for config in (FULL, FP8):
        plan = plan_memory(ModelConfig.llada_8b(), 33_000, questions=1, selection=config)
        (phase,) = (phase for phase in plan.phases if phase.name == "encode document")
        made[config.kv_format] = phase.made["KV of the document"]
    pool = 2 * 32 * 36 * 32 * 1024 * 128
    scales = 2 * 32 * 36 * 32 * 4
    assert made["full"] - made["fp8"] == pool - scales


def test_another_format_is_refused():
    with pytest.raises(ConfigError, match=r"kv_format .*'int8'"):
        SelectionConfig(kv_format="int8")
