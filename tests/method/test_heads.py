"""Scores by some attention heads, with and without kept KV, and by BM25."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ConfigError, Engine, plan_memory
from pdllm_jax.config import ChunkConfig, SelectionConfig
from pdllm_jax.method.chunking import batch_prompts, chunk_prompt
from pdllm_jax.method.prefill import prefill, prefill_top_k
from pdllm_jax.method.scorers import SCORERS, Response, ScoreRequest
from pdllm_jax.method.scorers.calibration import HEADS_FILE
from pdllm_jax.method.scoring import score_chunks
from pdllm_jax.method.selection import select
from tests.oracles.method import Method
from tests.support.method import BOS, CHUNKS, MASK, widened

HEADS = {"one layer": [(0, 2)], "both layers": [(0, 3), (1, 0), (1, 2)], "all": None}
SELECT = SelectionConfig(top_k=2, encode_batch=2, scorer="heads", heads=HEADS["both layers"])
OPTIONS = {"heads": HEADS["both layers"]}  # scorers without heads ignore them


def config_of(name: str) -> SelectionConfig:
    if HEADS[name] is None:
        return dataclasses.replace(SELECT, scorer="attention")
    return dataclasses.replace(SELECT, heads=HEADS[name])


@functools.partial(jax.jit, static_argnums=0)
def score(scorer, model, cache, question, response):
    request = ScoreRequest(question, cache.lengths > 0, response=response)
    return scorer.scores(model, cache, request)


def defined(model, parts, config: SelectionConfig) -> np.ndarray:
    method = Method(model, CHUNKS, config, BOS)
    method.read(*parts)
    return method.scores()


ONE = pytest.param("one layer", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["both layers", "all", ONE])
def test_scores_are_the_defined_ones_with_and_without_kept_kv(model, parts, name):
    """A batch: one document with and one without a prefix, in padding; short last chunks."""
    config = config_of(name)
    short = [], parts[1][:30], parts[2][:4]
    prompts = [chunk_prompt(*x, CHUNKS, bos_id=BOS) for x in (parts, short)]
    batch = widened(batch_prompts(prompts), chunks=1, query=8, prefix=3)
    cache, scores = prefill(model, batch, config)
    assert cache.pool is None
    pooled, from_pool = prefill(model, batch, config, keep_pool=True)
    again = score_chunks(model, pooled, batch.query, config, query_length=batch.query_length)
    later = score_chunks(model, cache, batch.query, config, query_length=batch.query_length)
    for row, x in enumerate((parts, short)):
        want = defined(model, x, config)
        assert np.ptp(want) > 0.02
        for got in (scores, from_pool, again, later):
            np.testing.assert_allclose(got[row, : len(want)], want, rtol=2e-5)
            assert np.isneginf(got[row, len(want) :]).all()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.02), ("float16", 2e-3)])
def test_scores_in_half_precision(model, parts, prompt, dtype, atol):
    half = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, model)
    want = defined(model, parts, SELECT)
    for keep_pool in (False, True):
        scores = prefill(half, prompt, SELECT, keep_pool=keep_pool)[1][0]
        np.testing.assert_allclose(scores[: len(want)], want, atol=atol)


def test_padding_and_neighbours_change_no_bit(model, prompt):
    want = prefill(model, prompt, SELECT)[1][0, : prompt.n_chunks]
    wide = widened(prompt, chunks=5, query=8, prefix=8)
    batch = batch_prompts([chunk_prompt([BOS], range(40), [1, 2], CHUNKS), wide], 4)
    got = prefill(model, batch, SELECT)[1]
    np.testing.assert_array_equal(got[1, : len(want)], want)
    assert np.isneginf(got[2:]).all()


def test_only_the_layers_up_to_the_last_head_run(model, prompt):
    """Weights behind them may hold NaN, and so may all that the last layer does with values."""
    want = prefill(model, prompt, config_of("one layer"))[1]
    broken = jax.tree.map(jnp.copy, model)
    first, last = broken.blocks
    for matrix in (first.v_proj, first.attn_out, first.gate_proj, first.down_proj, last.k_proj):
        matrix.weight[...] = jnp.full_like(matrix.weight[...], jnp.nan)
    got = prefill(broken, prompt, config_of("one layer"))[1]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("scorer", ["heads", pytest.param("bm25", marks=pytest.mark.slow)])
def test_only_the_chosen_chunks_are_encoded(model, parts, prompt, scorer):
    """As `prefill` and `select` give it, of a batch; of one document in test_prefill.py."""
    settings = {"encoding": "independent", "keep_first": True, **OPTIONS}
    config = dataclasses.replace(SELECT, scorer=scorer, **settings)
    other = chunk_prompt([], parts[1][:30], parts[2][:4], CHUNKS, bos_id=BOS)
    given = batch_prompts([prompt, other])
    whole, scores = prefill(model, given, config)
    want = select(scores, config)
    cache, chosen, streamed = prefill_top_k(model, given, config)
    assert cache.pool.k.shape[1] == chosen.chunk_ids.size == 4
    np.testing.assert_allclose(streamed, scores, rtol=1e-5)
    np.testing.assert_array_equal(chosen.chunk_ids, want.chunk_ids)
    places = whole.places(want.chunk_ids).reshape(-1)
    np.testing.assert_array_equal(chosen.slots.reshape(-1), np.arange(places.size))
    for mine, theirs in ((cache.pool.k, whole.pool.k), (cache.pool.v, whole.pool.v)):
        np.testing.assert_array_equal(mine, theirs[:, places])


def test_response_rows_count_in_reselection(model, parts, prompt):
    """Unmasked slots alone; from the pool, as re-selection reads it, and without it."""
    tokens = jnp.array([[5, MASK, 77, MASK]])
    method = Method(model, CHUNKS, SELECT, BOS)
    method.read(*parts)
    response = Response(tokens, tokens != MASK, jnp.ones(tokens.shape, bool))
    for scorer in (SELECT.scorer, SCORERS["bm25"]()):
        method.selection = dataclasses.replace(SELECT, scorer=scorer)
        want = method.scores(tokens[0].tolist(), range(4))
        for pool in {False, scorer is SELECT.scorer}:
            cache = prefill(model, prompt, SELECT, keep_pool=pool)[0]
            got = score(scorer, model, cache, prompt.question, response)
            np.testing.assert_allclose(got[0, : len(want)], want, rtol=2e-5)


@pytest.mark.parametrize(("k1", "b", "anchors"), [(1.2, 0.75, True), (2.0, 0.0, False)])
def test_bm25_is_the_defined_one(model, k1, b, anchors):
    """Words that occur twice, in no chunk, in all; the query's padding and mask tokens do not."""
    texts = [[1, 2, 3, 1, 9], [4, 4, 4, 2, 9], [5, 6, 9]]
    query = [1, 1, 4, 9, 200, BOS]
    document = [word for text in texts for word in text]
    prompt = chunk_prompt([BOS], document, query, ChunkConfig(5 + anchors, anchors=anchors))
    prompt = widened(prompt, chunks=2, query=3)
    mean, want = 13 / 3, []
    for text in texts:
        total = 0.0
        for word in query:
            df = sum(word in other for other in texts)
            idf = math.log(1 + (3 - df + 0.5) / (df + 0.5))
            tf = text.count(word)
            total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(text) / mean))
        want.append(total)
    config = SelectionConfig(scorer="bm25", bm25_k1=k1, bm25_b=b)
    _, (scores,) = prefill(model, prompt, config)
    np.testing.assert_allclose(scores[:3], want, rtol=1e-5)
    assert np.isneginf(scores[3:]).all()
    assert SelectionConfig.from_flat(**json.loads(json.dumps(config.to_flat()))) == config


REFUSED = {
    "no heads": (None, r"needs the model's retrieval heads: scripts/calibrate.py CHECKPOINT"),
    "a layer too many": ([(2, 0)], "2 layers of 4 heads, got layer 2, head 0"),
    "a head too many": ([(0, 0), (1, 4)], "2 layers of 4 heads, got layer 1, head 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_the_model_does_not_have_are_refused(model, prompt, name):
    heads, message = REFUSED[name]
    config = SelectionConfig(scorer="heads", heads=heads)
    for call in (
        lambda: Engine(model, selection=config),
        lambda: plan_memory(model.config, 100, selection=config),
        lambda: prefill(model, prompt, config),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", [[], [(0,)], [(0, -1)], [(0, True)], "ab", [0, 1], 3])
def test_heads_are_pairs(heads):
    with pytest.raises(ConfigError, match="heads must be pairs"):
        SelectionConfig(scorer="heads", heads=heads)


def test_heads_go_with_settings_and_come_from_a_checkpoint(tmp_path):
    config = SelectionConfig(scorer="heads", heads=[[1, 2], [0, 3], [1, 2]])
    assert config.scorer.heads == ((0, 3), (1, 2))
    assert SelectionConfig.from_flat(**json.loads(json.dumps(config.to_flat()))) == config
    assert SelectionConfig(heads=[(0, 1)]) == SelectionConfig()  # an option of other scorers
    bare, path = SCORERS["heads"](), tmp_path / HEADS_FILE
    assert bare.calibrated(tmp_path) == bare
    path.write_text(json.dumps({"version": 1, "heads": [[1, 2], [0, 3]], "layers": 2}))
    assert bare.calibrated(tmp_path) == config.scorer
    own = dataclasses.replace(bare, heads=((0, 0),))
    assert own.calibrated(tmp_path) == own
    for content in ("", "[]", '{"version": 2, "heads": [[0, 1]]}', '{"version": 1, "heads": [[]]}'):
        path.write_text(content)
        with pytest.raises(ConfigError, match="does not hold retrieval heads") as caught:
            bare.calibrated(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_plan_holds_no_chunk_but_those_of_a_group(model):
    """At 8 and 16 chunks: what scoring takes grows by token ids and scores alone."""
    settings = {"query": 32, "chunking": ChunkConfig(64), "dtype": jnp.float32}
    grown = {}
    for name in ("heads", "query"):
        config = dataclasses.replace(SELECT, scorer=name, **OPTIONS)
        plans = [
            plan_memory(model.config, n * 63, selection=config, **settings)["score"]
            for n in (8, 16)
        ]
        grown[name] = plans[1].nbytes - plans[0].nbytes
    assert 8 * 64 * 4 <= grown["heads"] == grown["query"] < 2 * 8 * 64 * 4
