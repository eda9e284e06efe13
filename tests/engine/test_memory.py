"""The memory planner against arrays that exist, against the compiler, and as a refusal."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench.programs import programs, tree_bytes
from flax import nnx

from pdllm_jax import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    MaskPredictor,
    MemoryLimitError,
    ModelConfig,
    SelectionConfig,
    encode_document,
    plan_memory,
)
from pdllm_jax.deprecated import ask_ids, encode_text, generate_batch_ids, generate_ids
from pdllm_jax.engine import engine as answer
from pdllm_jax.engine import engine as batch
from pdllm_jax.engine import memory as planner
from pdllm_jax.engine import request as prefilled
from pdllm_jax.engine.memory import plan_shapes, shapes_of
from pdllm_jax.method.chunking import chunk_prompt

LLADA = ModelConfig.llada_8b()
GPU = {"implementation": "xla", "attention": "cudnn"}
CHUNKS = ChunkConfig(chunk_size=16)
SELECT = SelectionConfig(top_k=2, masked_copies=2, encode_batch=2)
DECODE = DecodeConfig(gen_length=8, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, n)


def request_of(document: int = 90, query: int = 7):
    return [253, *tokens(4)], tokens(document, 1), tokens(query, 2)


def planned(config: ModelConfig = LLADA, document: int = 32 * 1023, **settings):
    return plan_memory(config, document, **{**GPU, **settings})


def select(**changes) -> SelectionConfig:
    return SelectionConfig(**changes)


def item(plan, phase: str, start: str) -> int:
    found = [
        i.nbytes
        for kind in ("held", "made", "scratch")
        for i in getattr(plan[phase], kind)
        if i.name.startswith(start)
    ]
    assert len(found) == 1, (phase, start)
    return found[0]


@pytest.mark.parametrize(
    "counts", [{"document": 0}, {"document": 1.5}, {"prefix": -1}, {"batch": 0}, {"questions": 0}]
)
def test_what_is_no_count_is_refused(counts):
    (name,) = counts
    with pytest.raises(ValueError, match=f"{name} must be a number of at least"):
        plan_memory(ModelConfig.tiny(), **{"document": 100, **counts})


def test_figures_worked_out_by_hand():
    """LLaDA-8B in bfloat16: 32 layers of 4 x 4096^2 + 3 x 4096 x 12288, two tables of 126,464."""
    plan = planned(query=32)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 126464 * 4096 + (2 * 32 + 1) * 4096)
    assert item(plan, "load", "weights") == weights == plan.resident == 16_031_162_368
    token = 2 * 32 * 32 * 128 * 2  # K and V of a token
    assert token == 524_288
    assert item(plan, "encode", "KV of the chosen") == 4 * 1024 * token
    # Prefix, query and response have 96 rows, in blocks of 128.
    assert item(plan, "encode", "KV of prefix, query") == 128 * token
    # All 4,192 rows of the joint forward; those around the chunks wait.
    assert item(plan, "encode", "one layer") == (32 + 4 * 1024 + 64) * 2 * (2 * 4096 + 2 * 12288)
    assert item(plan, "encode", "KV of live rows") == (32 + 32 + 32) * token
    # 8 chunks with 4 copies of 36 rows behind each: residual stream, its norm, gate and up.
    rows = 8 * (1024 + 4 * 36)
    assert item(plan, "score", "one layer") == rows * 2 * (2 * 4096 + 2 * 12288)
    streamed = planned(selection=select(encoding="independent"))
    assert item(streamed, "score", "KV of kept") == (4 + 8) * (1024 * token + 4) + 32 * token
    assert item(streamed, "score", "pool in another") == (4 + 8) * 1024 * token // 2


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}, {"n_kv_heads": 4}])
def test_weights_are_those_of_the_model(changes):
    config = dataclasses.replace(ModelConfig.tiny(), **changes)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = nnx.eval_shape(lambda d=dtype: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=d))
        assert planned(config, 90, dtype=dtype).resident == tree_bytes(model)


SETTINGS = {
    "joint": (SELECT, DECODE),
    "streamed": (dataclasses.replace(SELECT, encoding="independent"), DECODE),
    "query-conditioned": (dataclasses.replace(SELECT, encoding="query-conditioned"), DECODE),
    "tokens kept": (dataclasses.replace(SELECT, encoding="independent", keep_tokens=5), DECODE),
    "pool kept": (dataclasses.replace(SELECT, scorer="attention", encoding="bridge"), DECODE),
    "no live KV is read": (SELECT, dataclasses.replace(DECODE, recompute="response")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_results_are_as_large_as_the_arrays_of_an_answer(model, monkeypatch, name):
    selecting, decode = SETTINGS[name]
    seen = {}
    begin = prefilled.init_denoise

    def spy(model, cache, *args, **kwargs):
        seen["cache"], seen["state"] = cache, begin(model, cache, *args, **kwargs)
        return seen["state"]

    monkeypatch.setattr(prefilled, "init_denoise", spy)
    monkeypatch.setattr(answer, "decode", lambda model, cache, state, *_, **__: state)
    prefix, document, query = request_of()
    generate_ids(
        model, prefix, document, query, chunking=CHUNKS, selection=selecting, decode=decode
    )
    plan = planned(
        ModelConfig.tiny(), 90, prefix=5, query=7, dtype=jnp.float32,
        chunking=CHUNKS, selection=selecting, decode=decode,
    )  # fmt: skip
    cache, state = seen["cache"], seen["state"]
    document = [cache.pool, cache.prefix_k, cache.prefix_v]
    assert sum(i.nbytes for i in plan["score"].made if "KV" in i.name) == tree_bytes(document)
    assert item(plan, "encode", "KV of prefix, query") == tree_bytes(state.live)
    pool = [] if state.pool is None else [state.pool.k, state.pool.v]
    assert item(plan, "encode", "KV of the chosen") == tree_bytes(pool)


def test_a_batch_and_questions_hold_what_their_arrays_do(model):
    shapes, _, _ = shapes_of(8 * 15, chunking=CHUNKS, questions=3)
    config = ModelConfig.tiny()
    pool = 2 * 2 * 8 * 16 * 2 * 16 * 4  # K and V, layers, chunks, rows, KV heads, head size
    plan = planned(
        config, 8 * 15, questions=3, dtype=jnp.float32, chunking=CHUNKS, selection=SELECT
    )
    assert shapes.batch == 4
    prompt = chunk_prompt(*request_of(8 * 15), CHUNKS, tight=True)
    cache = jax.eval_shape(lambda m: encode_document(m, prompt, encode_batch=2), model)
    arrays = tree_bytes([cache.pool, cache.prefix_k, cache.prefix_v])
    assert plan.resident == planned(config, 90, dtype=jnp.float32).resident + arrays
    row = pool // (8 * 16)
    assert arrays == pool + 8 * 4 + 32 * row  # with lengths, and the prefix in its bucket
    kept = dataclasses.replace(SELECT, encoding="independent")
    several = planned(config, 8 * 15, batch=3, dtype=jnp.float32, chunking=CHUNKS, selection=kept)
    found = item(several, "score", "KV of the document")
    assert found == 4 * (pool + 8 * 4 + 32 * row)


@pytest.mark.parametrize("name", ["joint", pytest.param("streamed", marks=pytest.mark.slow)])
def test_the_compiler_takes_what_the_plan_says(name):
    """At a size whose rows outweigh what the CPU's products take for themselves, float32."""
    config = ModelConfig(
        d_model=256, n_layers=2, n_heads=4, n_kv_heads=4, mlp_hidden_size=768, vocab_size=512,
        embedding_size=512, mask_token_id=500, eos_token_id=501, pad_token_id=501,
    )  # fmt: skip
    selection, decode = SETTINGS[name]
    shapes, settled, decode = shapes_of(
        8 * 255, chunking=ChunkConfig(256), selection=selection, decode=decode
    )
    plan = plan_shapes(
        config, shapes, settled, decode,
        dtype=jnp.float32, implementation="xla", attention="xla",
    )  # fmt: skip
    seen = []
    for program in programs(config, shapes, settled, decode, dtype=jnp.float32):
        found = program.lower().compile().memory_analysis()
        made = found.output_size_in_bytes - found.alias_size_in_bytes
        phase = plan[program.phase]
        assert sum(i.nbytes for i in phase.held) == pytest.approx(program.held, rel=0.01)
        assert sum(i.nbytes for i in phase.made) == pytest.approx(made, rel=0.01, abs=40_000)
        seen.append((program.held + made + found.temp_size_in_bytes, phase.nbytes))
    assert plan.peak == pytest.approx(max(compiled for compiled, _ in seen), rel=0.25)


def test_more_of_anything_takes_more():
    base = planned(selection=select(top_k=4, encode_batch=8))
    assert planned(selection=select(top_k=8)).peak > base.peak
    # The pass is not the peak of joint encoding, but it grows with the group.
    wider = planned(selection=select(encode_batch=16))
    assert wider["score"].nbytes > base["score"].nbytes
    assert planned(query=500).peak > base.peak
    assert planned(batch=4).peak > base.peak
    assert planned(batch=3).peak == planned(batch=4).peak  # the bucket
    assert planned(decode=DecodeConfig(gen_length=512)).peak > base.peak
    assert planned(dtype=jnp.float32, attention="xla").peak > 1.9 * base.peak
    plain = [planned(document=n, method="plain").peak for n in (4096, 8192, 32768)]
    assert plain == sorted(plain)
    assert plain[0] < plain[2]


def test_a_streamed_document_takes_its_token_ids_alone():
    streaming = select(encoding="independent")
    short, long = (planned(document=n * 1023, selection=streaming) for n in (64, 1024))
    assert long.peak - short.peak == 4 * (1024 - 64) * (1025 + 1)  # ids, lengths and scores
    kept = planned(document=64 * 1023, batch=1, selection=streaming)
    assert kept.peak > short.peak + 20e9


def test_a_mesh_divides_heads_and_chunks():
    whole, tensor = planned(), planned(mesh={"tensor": 4})
    norms = 2 * 65 * 4096
    assert tensor.resident == (whole.resident - norms) // 4 + norms
    assert item(tensor, "encode", "KV of the chosen") * 4 == item(
        whole, "encode", "KV of the chosen"
    )
    data = planned(mesh={"data": 2})
    assert data.resident == whole.resident
    assert item(data, "score", "one layer") * 2 == item(whole, "score", "one layer")
    with pytest.raises(ConfigError, match="tensor 3 does not divide n_heads 32"):
        planned(mesh={"tensor": 3})
    with pytest.raises(ConfigError, match="axes are tensor and data"):
        planned(mesh={"model": 2})


def test_a_plan_is_printed_with_its_peak():
    plan = planned()
    lines = str(plan).splitlines()
    (peak,) = [line for line in lines if line.endswith("<- peak")]
    assert peak.split()[:3] == ["encode", f"{plan.peak / 1e9:.3f}", "GB"]
    assert sum(not line.startswith(" ") for line in lines) == len(plan.phases)
    with pytest.raises(KeyError, match="sleep"):
        plan["sleep"]
    with pytest.raises(ValueError, match="exclude each other"):
        planned(batch=2, questions=2)


def refused(call, *args, **settings) -> str:
    with pytest.raises(MemoryLimitError) as caught:
        call(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def never(*args, **kwargs):
    raise AssertionError("computed something")


def test_an_answer_that_does_not_fit_is_refused_before_anything_runs(model, monkeypatch):
    for name in ("draft_response", "prefill", "prefill_top_k", "score_chunks", "init_denoise"):
        monkeypatch.setattr(prefilled, name, never)
    monkeypatch.setattr(sys.modules["pdllm_jax.engine.engine"], "init_denoise", never)
    common = {"decode": DECODE, "selection": SELECT}
    request = request_of()
    plan = plan_memory(
        model.config, 90, prefix=5, query=7, dtype=jnp.float32, chunking=CHUNKS, **common
    )
    limit = plan.peak - 1
    message = refused(generate_ids, model, *request, chunking=CHUNKS, memory_limit=limit, **common)
    assert f"{plan.peak / 1e9:.2f} GB" in message
    assert f"the device gives {limit / 1e9:.2f} GB" in message
    assert f"phase {plan.largest.name!r}" in message
    with pytest.raises(AssertionError, match="computed"):
        generate_ids(model, *request, chunking=CHUNKS, memory_limit=plan.peak, **common)
    small = {"memory_limit": 1000, **common}
    assert "no one setting" in refused(
        generate_batch_ids, model, [request] * 2, chunking=CHUNKS, **small
    )
    assert "'prefilling'" in refused(
        generate_ids, model, *request, method="plain", decode=DECODE, memory_limit=1000
    )
    prompt = chunk_prompt(*request, CHUNKS, tight=True)
    cache = jax.eval_shape(lambda m: encode_document(m, prompt), model)
    cache = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), cache)
    refused(ask_ids, model, cache, [request[2]], **small)
    monkeypatch.setattr(batch, "encode_document", never)
    words = types.SimpleNamespace(
        around_document=lambda *_: (request[0], request[2]),
        encode=lambda text: request[1],
        bos_id=253,
    )
    message = refused(encode_text, model, words, "text", chunking=CHUNKS, memory_limit=1000)
    assert "encode document" in message


def test_what_the_refusal_advises_fits(model):
    """The least change of each kind, and it is enough."""
    selecting = dataclasses.replace(SELECT, top_k=4, encode_batch=8, encoding="independent")
    request = request_of(300)
    settings = {
        "prefix": 5, "query": 7, "dtype": jnp.float32, "chunking": CHUNKS, "decode": DECODE,
    }  # fmt: skip

    def peak(**changes) -> int:
        changed = dataclasses.replace(selecting, **changes)
        return plan_memory(model.config, 300, selection=changed, **settings).peak

    assert peak(encode_batch=2) < peak(encode_batch=4) < peak()
    message = refused(
        generate_ids, model, *request, chunking=CHUNKS, selection=selecting, decode=DECODE,
        memory_limit=peak(encode_batch=4),
    )  # fmt: skip
    assert "; fits with encode_batch=4" in message
    assert "encode_batch=2" not in message


def test_the_devices_own_limit_counts_what_it_holds(model, monkeypatch):
    plan = plan_memory(
        model.config, 90, prefix=5, query=7, dtype=jnp.float32, chunking=CHUNKS,
        selection=SELECT, decode=DECODE,
    )  # fmt: skip
    stats = {"bytes_limit": plan.peak + 2**30, "bytes_in_use": plan.resident}
    monkeypatch.setattr(planner, "device_stats", lambda model: stats)
    monkeypatch.setattr(prefilled, "draft_response", never)
    common = {"chunking": CHUNKS, "selection": SELECT, "decode": DECODE}
    with pytest.raises(AssertionError, match="computed"):
        generate_ids(model, *request_of(), **common)
    stats["bytes_in_use"] += 2**30 + 1
    assert "1.07 of them held already" in refused(generate_ids, model, *request_of(), **common)
    stats.clear()  # as on the CPU: nothing is known and nothing refused
    with pytest.raises(AssertionError, match="computed"):
        generate_ids(model, *request_of(), **common)
