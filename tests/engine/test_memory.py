"""Memory plans against measured peaks, arrays that exist and the compiler; and refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench.memory import programs, tree_bytes
from flax import nnx

from pdllm_jax import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    Engine,
    MaskPredictor,
    MemoryLimitError,
    ModelConfig,
    Request,
    SelectionConfig,
    encode_document,
    plan_memory,
)
from pdllm_jax.engine import answer, engine, memory
from pdllm_jax.engine import request as prefilled
from pdllm_jax.engine.memory import require_memory
from pdllm_jax.engine.programs import Shapes
from pdllm_jax.method.caches import cache_method
from pdllm_jax.method.caches.published import Plain
from pdllm_jax.method.chunking import chunk_prompt

LLADA = ModelConfig.llada_8b()
RECORD = json.loads((Path(__file__).parents[2] / "benchmarks/memory.json").read_text("utf-8"))
GPU = {"implementation": "xla", "attention": "cudnn"}
CHUNKS = ChunkConfig(chunk_size=16)
SELECT = SelectionConfig(top_k=2, masked_copies=2, encode_batch=2)
HEADS = ((0, 1), (1, 0), (1, 3))
DECODE = DecodeConfig(gen_length=8, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, n)


def request_of(document: int = 90) -> Request:
    return Request(tokens(document, 1), tokens(7, 2), [253, *tokens(4)])


def prompt_of(request: Request, **settings):
    return chunk_prompt(request.prefix, request.context, request.question, CHUNKS, **settings)


engine_of = functools.partial(Engine, chunking=CHUNKS, selection=SELECT, decoding=DECODE)


def planned(config: ModelConfig = LLADA, document: int = 32 * 1023, **settings):
    return plan_memory(config, document, **{**GPU, **settings})


def tiny_plan(document: int = 90, **settings):
    """The plan of `request_of(document)` for the tiny model, by default with SELECT."""
    common = {"prefix": 5, "query": 7, "chunking": CHUNKS, "selection": SELECT, "decode": DECODE}
    return plan_memory(ModelConfig.tiny(), document, dtype=jnp.float32, **{**common, **settings})


def settings_of(kind, row):
    """Settings as a record writes them."""
    make = getattr(kind, "from_flat", kind)
    return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})


@pytest.mark.parametrize("row", RECORD["rows"], ids=lambda row: row["setting"])
def test_a_plan_is_within_10_percent_of_the_measured_peak(row):
    assert settings_of(ModelConfig, RECORD["model"]) == LLADA
    plan = planned(
        document=row["chunks"] * 1023,
        selection=settings_of(SelectionConfig, row["select"]),
        decode=settings_of(DecodeConfig, row["decode"]),
        **{name: row[name] for name in ("query", "batch", "questions", "method")},
    )
    assert 0.9 < plan.peak / row["measured"] < 1.1


@pytest.mark.parametrize(
    "counts", [{"document": 0}, {"document": 1.5}, {"prefix": -1}, {"batch": 0}, {"questions": 0}]
)
def test_a_count_below_its_minimum_is_refused(counts):
    (name,) = counts
    with pytest.raises(ValueError, match=f"{name} must be an integer >= "):
        plan_memory(ModelConfig.tiny(), **{"document": 100, **counts})


def test_figures_of_dream_7b_worked_out_by_hand():
    """28 layers of 2 x 3584^2 + 2 x 512 x 3584 + 3 x 3584 x 18944 and biases, 152,064 words."""
    plan = planned(ModelConfig.dream_7b(), query=32)
    layer = 2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944 + 3584 + 2 * 512
    weights = 2 * (28 * layer + 2 * 152064 * 3584 + (2 * 28 + 1) * 3584)
    assert plan["load"].held["weights"] == weights == 2 * 7_615_616_512
    token = 2 * 28 * 4 * 128 * 2  # K and V of a token: a ninth of LLaDA-8B's
    assert plan["encode"].made["KV of the chosen chunks"] == 4 * (1024 * token + 4)
    assert plan["encode"].made["live KV"] == 128 * token
    row = 2 * (2 * 3584 + 2 * 18944)
    assert plan["encode"].scratch["activations of a layer"] == (32 + 4 * 1024 + 64) * row


def test_figures_worked_out_by_hand():
    """LLaDA-8B in bfloat16: 32 layers of 4 x 4096^2 + 3 x 4096 x 12288, two tables of 126,464."""
    plan = planned(query=32)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 12288) + 2 * 126464 * 4096 + (2 * 32 + 1) * 4096)
    assert plan["load"].held["weights"] == weights == plan.resident == 16_031_162_368
    token = 2 * 32 * 32 * 128 * 2  # K and V of a token
    assert token == 524_288
    encode = plan["encode"]
    assert encode.made["KV of the chosen chunks"] == 4 * (1024 * token + 4)  # and their lengths
    # Prefix, query and response have 96 rows, in blocks of 128.
    assert encode.made["live KV"] == encode.scratch["KV in flight"] == 128 * token
    # All 4,192 rows of the joint forward: residual stream, its norm, gate and up.
    row = 2 * (2 * 4096 + 2 * 12288)
    assert encode.scratch["activations of a layer"] == (32 + 4 * 1024 + 64) * row
    # 8 chunks with 4 copies of 36 rows behind each.
    score = plan["score"]
    assert score.scratch["activations of a layer"] == 8 * (1024 + 4 * 36) * row
    streamed = planned(selection=SelectionConfig(encoding="independent"))["score"]
    assert streamed.made["KV of the document"] == (4 + 8) * (1024 * token + 4) + 32 * token
    # One of K and V: of the pool, copied, and of a group.
    assert streamed.scratch["KV in flight"] == (4 + 8 + 8) * 1024 * token // 2


def test_figures_of_weights_in_8_bits_worked_out_by_hand():
    """A byte for each weight of the layers and 4 for each of their outputs; fits 24 GB."""
    fp8, int8 = (dataclasses.replace(LLADA, weight_format=name) for name in ("fp8", "int8"))
    plan, outputs = planned(fp8, query=32), 4 * 4096 + 2 * 12288 + 4096
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 4 * outputs)
    tables = 2 * (2 * 126464 * 4096 + (2 * 32 + 1) * 4096)
    assert plan["load"].held["weights"] == layers + tables == 9_057_607_680
    rows = 8 * (1024 + 4 * 36)
    assert plan["score"].scratch["rows in fp8"] == rows * 12288  # into the last projection
    assert "rows in fp8" not in plan["decode"].scratch
    assert planned(int8)["score"].scratch["cast of a weight"] == 2 * 4096 * 12288
    half = planned(fp8, mesh={"tensor": 2})
    whole = 32 * 2 * 4 * 4096 + 2 * 65 * 4096  # scales of projections out of a layer, norms
    assert half.resident == (plan.resident - whole) // 2 + whole
    for document in (8 * 1023, 32 * 1023):
        for config in (fp8, int8):
            assert planned(config, document).peak < 13e9
    assert planned(fp8, 8 * 1023, questions=1).peak < 20e9


_CHANGES = [{}, {"weight_tying": True}, {"family": "dream", "weight_format": "int8"}]


@pytest.mark.parametrize("changes", _CHANGES)
def test_weights_are_as_large_as_the_model(changes):
    config = dataclasses.replace(ModelConfig.tiny(), **changes)
    for dtype in (jnp.float32, jnp.bfloat16):
        model = nnx.eval_shape(lambda d=dtype: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=d))
        assert planned(config, 90, dtype=dtype).resident == tree_bytes(model)


SETTINGS = {
    "joint": (SELECT, DECODE),
    "streamed": (dataclasses.replace(SELECT, encoding="independent"), DECODE),
    "query-conditioned": (dataclasses.replace(SELECT, encoding="query-conditioned"), DECODE),
    "tokens kept": (dataclasses.replace(SELECT, encoding="independent", keep_tokens=5), DECODE),
    "layer by layer": (dataclasses.replace(SELECT, scorer="heads", heads=HEADS), DECODE),
    "scored before": (dataclasses.replace(SELECT, scorer="bm25", encoding="bridge"), DECODE),
    "no live KV is read": (SELECT, dataclasses.replace(DECODE, recompute="response")),
}


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "layer by layer"])
def test_results_are_as_large_as_the_arrays_of_an_answer(model, monkeypatch, name):
    selecting, decode = SETTINGS[name]
    seen = {}
    begin = prefilled.init_denoise

    def spy(model, cache, *args, **kwargs):
        seen["cache"], seen["state"] = cache, begin(model, cache, *args, **kwargs)
        return seen["state"]

    monkeypatch.setattr(prefilled, "init_denoise", spy)
    monkeypatch.setattr(answer, "denoise_blocks", lambda model, cache, state, *_, **__: state)
    engine_of(model, selection=selecting, decoding=decode).answer_batch([request_of()])
    plan = tiny_plan(selection=selecting, decode=decode)
    cache, state = seen["cache"], seen["state"]
    arrays = [cache.pool, cache.prefix_k, cache.prefix_v]
    assert plan["score"].made["KV of the document"] == tree_bytes(arrays)
    assert plan["encode"].made["live KV"] == tree_bytes(state.live)
    assert plan["encode"].made["KV of the chosen chunks"] == tree_bytes(state.pool)


@pytest.mark.parametrize(
    "method", ["dllm-cache", "mask-kv:budget=5", "elastic-cache:window=2", "sparse-dllm"]
)
def test_the_memory_of_a_method_is_as_large_as_its_arrays(model, method):
    """Where a layer keeps other arrays than the next, and nothing before the request."""
    plan = tiny_plan(method=method)
    settings = cache_method(method).decode_config(DECODE)
    inputs = model, None, None, jnp.zeros((1, plan.shapes.query), int), settings
    state = jax.eval_shape(lambda: prefilled.init_denoise(*inputs, jax.random.key(0)))
    assert plan["encode"].made["memory of the method"] == tree_bytes(state.memory) > 0
    assert plan["decode"].held["memory of the method"] == tree_bytes(state.memory)


@dataclasses.dataclass(frozen=True)
class Short(Plain):
    """Holds few rows, and takes much beside them."""

    name = "short"
    longest = 64

    def scratch(self, model, config, rows, itemsize):
        return rows * 10**6 * itemsize


def test_a_method_says_what_it_takes_and_what_it_cannot_hold(model):
    plans = [tiny_plan(document=32, method=method) for method in (Short(), "plain")]
    rows = plans[0].shapes.query + 8
    assert plans[0].peak - plans[1].peak == rows * 4 * 10**6
    refusal = "method 'short' holds at most 64 rows of prompt and response, got 112"
    with pytest.raises(ConfigError, match=refusal):
        Engine(model, method=Short(), decoding=DECODE).check([request_of()])
    with pytest.raises(ConfigError, match="method 'short' holds at most 64"):
        tiny_plan(method=Short())


def test_a_batch_and_questions_hold_what_their_arrays_do(model):
    plan = tiny_plan(8 * 15, questions=3)
    assert plan.shapes.requests == 4
    prompt = prompt_of(request_of(8 * 15), tight=True)
    cache = jax.eval_shape(lambda m: encode_document(m, prompt, encode_batch=2), model)
    arrays = tree_bytes([cache.pool, cache.prefix_k, cache.prefix_v])
    assert plan.resident == tiny_plan().resident + arrays
    row = 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, head size
    assert arrays == 8 * (16 * row + 4) + 32 * row  # with lengths, and the prefix in its bucket
    several = tiny_plan(8 * 15, batch=3, selection=SETTINGS["streamed"][0])
    assert several["score"].made["KV of the document"] == 4 * arrays


SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("streamed", "layer by layer"))


@pytest.mark.parametrize("name", ["joint", *SLOW])
def test_the_compiler_takes_what_the_plan_says(name):
    """At a size whose rows outweigh what the CPU's products take for themselves, float32."""
    sizes = {"d_model": 256, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 768}
    config = dataclasses.replace(ModelConfig.tiny(), **sizes)
    selection, decode = SETTINGS[name]
    settings = {"chunking": ChunkConfig(256), "selection": selection, "decode": decode}
    plan = plan_memory(
        config, 8 * 255, dtype=jnp.float32, implementation="xla", attention="xla", **settings
    )
    peaks = []
    settings = plan.shapes, plan.selection, plan.decode
    for program, lowered in programs(config, *settings, dtype=jnp.float32, implementation="xla"):
        compiled = lowered.compile().memory_analysis()
        held = tree_bytes(dict(program.held))
        made = compiled.output_size_in_bytes - compiled.alias_size_in_bytes
        phase = plan[program.phase]
        assert sum(phase.held.values()) == pytest.approx(held, rel=0.01)
        assert sum(phase.made.values()) == pytest.approx(made, rel=0.01, abs=40_000)
        peaks.append(held + made + compiled.temp_size_in_bytes)
    assert plan.peak == pytest.approx(max(peaks), rel=0.25)


def test_more_of_anything_takes_more():
    base = planned(selection=SelectionConfig(top_k=4, encode_batch=8))
    assert planned(selection=SelectionConfig(top_k=8)).peak > base.peak
    # The pass is not the peak of joint encoding, but it grows with the group.
    wider = planned(selection=SelectionConfig(encode_batch=16))
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
    streaming = SelectionConfig(encoding="independent")
    short, long = (planned(document=n * 1023, selection=streaming) for n in (64, 1024))
    assert long.peak - short.peak == 4 * (1024 - 64) * (1025 + 1)  # ids, lengths and scores
    kept = planned(document=64 * 1023, batch=2, selection=streaming)
    assert kept.peak > short.peak + 50e9


def test_a_mesh_divides_heads_and_chunks():
    whole, tensor = planned(), planned(mesh={"tensor": 4})
    norms = 2 * 65 * 4096
    assert tensor.resident == (whole.resident - norms) // 4 + norms
    pool, lengths = "KV of the chosen chunks", 4 * 4
    assert (tensor["encode"].made[pool] - lengths) * 4 == whole["encode"].made[pool] - lengths
    data = planned(mesh={"data": 2})
    assert data.resident == whole.resident
    layer = "activations of a layer"
    assert data["score"].scratch[layer] * 2 == whole["score"].scratch[layer]
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
    request = request_of()
    prompt = prompt_of(request, tight=True)
    cache = jax.eval_shape(lambda m: encode_document(m, prompt), model)
    cache = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), cache)
    for name in ("draft_response", "prefill", "prefill_top_k", "score_chunks", "init_denoise"):
        monkeypatch.setattr(prefilled, name, never)
    monkeypatch.setattr(engine, "encode_document", never)
    plan = tiny_plan()
    message = refused(engine_of(model, memory_limit=plan.peak - 1).answer_batch, [request])
    assert f"phase {plan.largest.name!r} needs {plan.peak / 1e9:.2f} GB" in message
    assert f"the device gives {(plan.peak - 1) / 1e9:.2f} GB" in message
    with pytest.raises(AssertionError, match="computed"):
        engine_of(model, memory_limit=plan.peak).answer_batch([request])
    small = engine_of(model, memory_limit=1000)
    plain = engine_of(model, method="plain", memory_limit=1000)
    assert "no one setting" in refused(small.answer_batch, [request] * 2)
    assert "'prefilling'" in refused(plain.answer_batch, [request])
    refused(small.ask, cache, [request.question])
    message = refused(small.encode, request.context, prefix=request.prefix)
    assert "encode document" in message


def require(model, limit=None, document: int = 90, selection: SelectionConfig = SELECT) -> None:
    shapes = Shapes.of(prompt_of(request_of(document)))
    require_memory(model, shapes, selection, DECODE, implementation="xla", limit=limit)


def test_the_refusal_advises_the_smallest_changes_that_fit(model):
    selecting = dataclasses.replace(SELECT, top_k=4, encode_batch=8, encoding="independent")

    def peak(**changes) -> int:
        return tiny_plan(300, selection=dataclasses.replace(selecting, **changes)).peak

    assert peak(encode_batch=2) < peak(encode_batch=4) < peak()
    message = refused(require, model, peak(encode_batch=4), 300, selecting)
    assert "; fits with encode_batch=4" in message
    assert "encode_batch=2" not in message
    advised = [value for value in (1, 2) if f"top_k={value}" in message]
    fitting = [value for value in (1, 2) if peak(top_k=value) <= peak(encode_batch=4)]
    assert advised == fitting[-1:]


def test_the_limit_of_the_device_counts_what_it_holds(model, monkeypatch):
    plan = tiny_plan()
    stats = {"bytes_limit": plan.peak + 2**30, "bytes_in_use": plan.resident}
    monkeypatch.setattr(memory, "device_stats", lambda model: stats)
    require(model)
    stats["bytes_in_use"] += 2**30 + 1
    assert "1.07 of them held already" in refused(require, model)
    stats.clear()  # as on the CPU, which reports nothing
    require(model)
