"""A document in host memory: the KV, scores and tokens that it has on the device."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import Engine
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine import offload as module
from pdllm_jax.engine.memory import MemoryLimitError
from pdllm_jax.engine.offload import (
    encode_offloaded,
    fetch,
    host_memory,
    offload,
    score_offloaded,
    select_offloaded,
)
from pdllm_jax.method.chunking import batch_prompts, chunk_prompt
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.method.scoring import score_chunks
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.snapshot import load_document, save_document
from tests.support import workers
from tests.support.method import sharp_model

SELECT = SelectionConfig(top_k=2, masked_copies=1, scorer="query", encode_batch=2)
DECODE = DecodeConfig(gen_length=4, block_length=4)
QUERY = [7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharp_model()


@pytest.fixture(scope="module")
def prompt():
    """Of seven chunks, the last one short."""
    document = np.random.default_rng(0).integers(0, 250, 100)
    return chunk_prompt([253, 1, 2], document, QUERY, ChunkConfig(16), tight=True)


@pytest.fixture(scope="module")
def cache(model, prompt):
    return encode_document(model, prompt, encode_batch=2)


@pytest.fixture(scope="module")
def document(model, prompt):
    return encode_offloaded(model, prompt, encode_batch=2)


def test_the_kv_lies_in_host_memory_and_is_the_device_s(document, cache):
    device = jax.devices()[0]
    assert "pinned_host" in {memory.kind for memory in device.addressable_memories()}
    assert {x.sharding.memory_kind for x in (*document.k, *document.v)} == {"pinned_host"}
    assert len(document.k) == 7
    for i in range(7):
        np.testing.assert_array_equal(document.k[i], cache.pool.k[:, i])
        np.testing.assert_array_equal(document.v[i], cache.pool.v[:, i])
    assert document.cache.pool is None
    assert document.nbytes == 7 * 2 * cache.pool.k[:, 0].nbytes
    again = offload(cache)
    for x, y in zip((*again.k, *again.v), (*document.k, *document.v), strict=True):
        np.testing.assert_array_equal(x, y)


def test_more_than_xla_pins_is_refused_before_anything_is_encoded(monkeypatch):
    device = SimpleNamespace(platform="gpu")
    host = SimpleNamespace(device_set=[device], memory_kind="pinned_host")
    whole = 128 * 2 * 32 * 32 * 1024 * 128 * 2  # 64 GiB: 128 chunks of 1,024 tokens of LLaDA-8B
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    module.check_host_memory(host, whole // 2)
    with pytest.raises(MemoryLimitError, match=r"takes 64\.0 GiB .* limit is 64: .*LIMIT_GB=66 "):
        module.check_host_memory(host, whole)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "66")
    module.check_host_memory(host, whole)
    device.platform = "cpu"
    module.check_host_memory(host, 100 * whole)


def test_a_snapshot_is_restored_to_host_memory(tmp_path):
    want = workers.document()
    save_document(tmp_path / "s", workers.IDENTITY, want, chunking=workers.CHUNKS)
    device = jax.device_put(0).sharding
    host = host_memory(device)
    restored = load_document(
        tmp_path / "s", workers.IDENTITY,
        placement=lambda name: host if name in ("cache.pool.k", "cache.pool.v") else device,
    ).cache  # fmt: skip
    assert restored.pool.k.sharding.memory_kind == "pinned_host"
    found = offload(restored)
    assert {x.sharding.memory_kind for x in (*found.k, *found.v)} == {"pinned_host"}
    for i in range(5):
        np.testing.assert_array_equal(found.k[i], want.pool.k[:, i])
        np.testing.assert_array_equal(found.v[i], want.pool.v[:, i])


def test_only_the_chosen_chunks_come_over(document, cache, monkeypatch):
    moved = []
    real = jax.device_put

    def put(x, *where):
        moved.append(x.nbytes)
        return real(x, *where)

    monkeypatch.setattr(module.jax, "device_put", put)
    pool = fetch(document, [1, 6, -1])
    monkeypatch.undo()
    assert pool.k.sharding.memory_kind == jax.devices()[0].default_memory().kind
    np.testing.assert_array_equal(pool.k[:, :2], cache.pool.k[:, jnp.array([1, 6])])
    np.testing.assert_array_equal(pool.v[:, :2], cache.pool.v[:, jnp.array([1, 6])])
    assert pool.lengths.tolist() == [16, int(cache.lengths[0, 6]), 0]
    assert moved == [document.k[0].nbytes] * 6


@pytest.mark.parametrize("scorer", ["query", "random"])
def test_scores_of_later_questions_are_those_on_the_device(model, document, cache, prompt, scorer):
    config = dataclasses.replace(SELECT, scorer=scorer)
    inputs = {"query_length": prompt.query_length, "key": jax.random.key(1)}
    want = score_chunks(model, cache, prompt.query, config, **inputs)
    got = score_offloaded(model, document, prompt.query, config, group=3, **inputs)
    np.testing.assert_allclose(got[0, :7], want[0, :7], atol=2e-4)
    assert np.isneginf(got[0, 7:]).all()
    assert got.shape == want.shape


@pytest.mark.parametrize("encoding", [pytest.param("independent", marks=pytest.mark.slow), "joint"])
def test_answers_are_those_of_the_device(model, document, cache, encoding):
    selecting = dataclasses.replace(SELECT, encoding=encoding)
    engine = Engine(model, selection=selecting, decoding=DECODE)
    (want,) = engine.ask(cache, [QUERY], seeds=[5])
    chosen = select_offloaded(model, document, QUERY, selecting, seed=5, group=4)
    (got,) = engine.decode(chosen)
    assert got.tokens == want.tokens
    assert got.selection["chunks"] == want.selection["chunks"]
    np.testing.assert_allclose(got.selection["scores"], want.selection["scores"], atol=2e-4)
    adaptive = dataclasses.replace(selecting, max_k=4, margin=0.0)
    trimmed = select_offloaded(model, document, QUERY, adaptive, seed=5, group=4)
    assert trimmed.selection.chunk_ids.shape == (1, 2)
    pool = chosen.cache.pool
    assert (None if pool is None else pool.k.shape[1]) == (None if encoding == "joint" else 2)


def test_what_can_not_be_streamed_is_refused(model, document, cache, prompt):
    for change, message in (
        ({"reselect": "block"}, "re-selection reads all"),
        ({"scorer": "oracle"}, "needs the ids"),
    ):
        selecting = dataclasses.replace(SELECT, **change)
        with pytest.raises(ValueError, match=message):
            select_offloaded(model, document, QUERY, selecting)
    with pytest.raises(ValueError, match="query is empty"):
        select_offloaded(model, document, [], SELECT)
    with pytest.raises(ValueError, match="one document is offloaded"):
        encode_offloaded(model, batch_prompts([prompt, prompt]))
    with pytest.raises(ValueError, match="only one document's cache"):
        offload(cache.without_pool())
    assert host_memory(jax.device_put(0).sharding).memory_kind == "pinned_host"
