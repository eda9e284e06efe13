"""The denoising step as a jitted function: what compiles, what is consumed, what stays apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.deprecated import generate_ids
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import prefill
from pdllm_jax.method.selection import select_top_k
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.rules import ConfigError
from tests.support.method import first_state, flax_flattens

MASK = ModelConfig.tiny().mask_token_id
DECODE = DecodeConfig(gen_length=8, block_length=4)
SELECT = SelectionConfig(top_k=2, scorer="query", masked_copies=2)
CHUNKS = ChunkConfig(12)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


def start(model, encoding, seed=0):
    prompt = chunk_prompt(ids(5, seed), ids(50, seed + 1), ids(7, seed + 2), CHUNKS)
    cache, scores = prefill(model, prompt, dataclasses.replace(SELECT, encoding=encoding))
    return cache, first_state(model, cache, select_top_k(scores, 2), prompt, DECODE)


def answer(model, method, *parts, decode=DECODE, selection=SELECT, seed=0):
    settings = {"chunking": CHUNKS, "selection": selection, "decode": decode}
    return generate_ids(model, *parts, method=method, seed=seed, **settings)


@pytest.mark.parametrize("encoding", ["joint", pytest.param("independent", marks=pytest.mark.slow)])
def test_compiles_once_and_consumes_its_state(model, encoding):
    traces = []
    original = MaskPredictor.run

    def counted(self, *args):
        traces.append(1)
        return original(self, *args)

    cache, state = start(model, encoding)
    other_cache, other = start(model, encoding, seed=10)
    config = dataclasses.replace(DECODE, temperature=0.0, steps=8)
    MaskPredictor.run = counted
    try:
        before = denoise_step._cache_size()
        for _ in range(3):
            consumed = state
            state = denoise_step(model, cache, state, config=config)
            assert consumed.tokens.is_deleted()
            assert consumed.live.k[0].is_deleted()
        traced = len(traces)
        assert traced > 0
        # Another document of the same bucket, other chunks, other steps: the same program.
        for _ in range(3):
            other = denoise_step(model, other_cache, other, config=config)
        assert len(traces) == traced
        assert denoise_step._cache_size() == before + 1
        assert flax_flattens(lambda: denoise_step(model, other_cache, other, config=config)) == 0
    finally:
        MaskPredictor.run = original
    assert int((state.tokens != MASK).sum()) == 3
    # The document's cache is nobody's to consume.
    assert not cache.tokens.is_deleted()
    assert not jax.tree.leaves(model)[0].is_deleted()


@pytest.mark.parametrize(
    "method",
    [
        "prefilling",
        "dual-cache",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "prefix-cache")),
    ],
)
def test_a_second_generate_of_the_same_bucket_compiles_nothing(model, method):
    def run(n_context, n_query, seed):
        parts = ids(5), ids(n_context, seed), ids(n_query, seed)
        draft = dataclasses.replace(SELECT, scorer="draft")
        return answer(model, method, *parts, selection=draft, seed=seed)

    first, second = run(44, 6, 1), run(41, 7, 2)
    assert first.timings["compile"] > 0
    assert second.timings["compile"] == 0
    assert first.tokens != second.tokens


@pytest.mark.parametrize("encoding", ["joint", "independent"])
def test_the_loop_on_the_device_equals_single_steps(model, encoding):
    cache, state = start(model, encoding)
    for _ in range(8):
        state = denoise_step(model, cache, state, config=DECODE)
    other_cache, other = start(model, encoding)
    other = denoise(model, other_cache, other, config=DECODE)
    np.testing.assert_array_equal(state.tokens, other.tokens)
    assert state.block.tolist() == other.block.tolist() == [2]
    # A step after the end changes nothing.
    tokens = np.asarray(state.tokens)
    state = denoise_step(model, cache, state, config=DECODE)
    np.testing.assert_array_equal(state.tokens, tokens)
    assert state.evaluations.tolist() == [8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "rule"),
    [
        ("joint", {}),
        ("independent", {"threshold": 0.02}),
        ("independent", {}),
        ("joint", {"threshold": 0.02}),
    ],
    ids=lambda value: value if isinstance(value, str) else "threshold" if value else "schedule",
)
def test_requests_of_a_batch_do_not_touch_each_other(model, encoding, rule):
    """Two questions about one document, alone and together, out of step with each other."""
    config = dataclasses.replace(DECODE, **rule)
    select = dataclasses.replace(SELECT, encoding=encoding)
    prompt = chunk_prompt(ids(5), ids(50, 1), ids(7, 2), CHUNKS)
    cache, scores = prefill(model, prompt, select)
    questions = np.array([[*ids(6, 3), 0, 0], ids(8, 4)])
    lengths = np.array([6, 8])
    selections = [select_top_k(s, 2) for s in (scores, -scores.at[:, 5:].set(jnp.inf))]

    def run(rows):
        chosen = jax.tree.map(lambda *x: jnp.concatenate(x), *[selections[r] for r in rows])
        asked = dataclasses.replace(prompt, query=jnp.asarray(questions[rows]))
        state = first_state(model, cache, chosen, asked, config, query_length=lengths[rows])
        return denoise(model, cache, state, config=config)

    together = run([0, 1])
    for row in (0, 1):
        alone = run([row])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        assert int(together.evaluations[row]) == int(alone.evaluations[0])
    assert together.tokens[0].tolist() != together.tokens[1].tolist()


@pytest.mark.parametrize(
    "method", ["prefilling", "plain", pytest.param("dual-cache", marks=pytest.mark.slow)]
)
def test_a_stop_token_ends_the_text_with_its_block(model, method):
    config = DecodeConfig(gen_length=16, block_length=4, temperature=2.0)  # tokens that differ

    def run(stop_ids):
        decode = dataclasses.replace(config, stop_ids=stop_ids)
        return answer(model, method, ids(5), ids(50, 1), ids(7, 2), decode=decode)

    whole = run(())
    second = whole.tokens[4:8]
    stop = next(token for token in second if token not in whole.tokens[:4])
    stopped = run((stop, 249))
    assert stopped.tokens[:8] == whole.tokens[:8]
    assert stopped.tokens[8:] == [model.config.eos_token_id] * 8
    assert (whole.evaluations, stopped.evaluations) == (16, 8)
    if method == "plain":
        absent = next(token for token in range(250) if token not in whole.tokens)
        assert run((absent,)).tokens == whole.tokens


def test_seeds_give_the_same_tokens_every_time(model):
    config = DecodeConfig(gen_length=8, block_length=8, temperature=1.0)

    def run(seed):
        return answer(model, "plain", [], [], ids(9), decode=config, seed=seed).tokens

    assert run(3) == run(3)
    assert len({tuple(run(seed)) for seed in range(4)}) == 4


def test_what_does_not_go_together_is_refused(model):
    prompt = chunk_prompt(ids(5), ids(50), ids(7), CHUNKS)
    cache, scores = prefill(model, prompt, SELECT)
    with pytest.raises(ValueError, match="give both or neither"):
        first_state(model, cache, None, prompt, DECODE)
    guided = DecodeConfig(guidance=1.0, recompute="response")
    with pytest.raises(ConfigError, match="guidance"):
        first_state(model, cache, select_top_k(scores, 2), prompt, guided)
    cache, state = start(model, "independent")
    with pytest.raises(ValueError, match="pass the one it was made with"):
        denoise_step(model, None, state, config=DECODE)


def test_no_temporary_of_the_size_of_the_vocabulary_by_all_rows(model):
    """A step's logits are those of its block: 4 rows of 8, and of no prompt row."""
    wide = dataclasses.replace(ModelConfig.tiny(), vocab_size=1 << 16, embedding_size=1 << 16)
    large = MaskPredictor(wide, rngs=nnx.Rngs(0))
    state = init_denoise(large, None, None, jnp.array([ids(90)]), DECODE, jax.random.key(0))
    compiled = denoise_step.lower(large, None, state, config=DECODE).compile()
    rows = 8 * (1 << 16) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows
    everything = 98 * (1 << 16) * 4
    assert 4 * rows < everything / 2
