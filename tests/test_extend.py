"""Scorer, sampling rule and attention of a user's own, against the library's, which stays as it is.

docs/research.md shows them to a reader, and tests/test_docs.py runs that.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import EMPTY_LSE, Partial, chunk_attention, resolve_implementation
from pdllm_jax import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    Engine,
    MaskPredictor,
    SelectionConfig,
    SnapshotError,
    chunk_prompt,
    denoise,
    encode_document,
    save_request,
    select_top_k,
)
from tests.support.method import first_state, sharp_model

CHUNKS = ChunkConfig(16)
RNG = np.random.default_rng(0)
PREFIX, DOCUMENT, QUERY = [253, 1, 2], RNG.integers(0, 250, 90), RNG.integers(0, 250, 7)
SELECT = SelectionConfig(top_k=2, scorer="oracle", encoding="independent")
DECODE = DecodeConfig(gen_length=8, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharp_model()


def engine_of(model, decode=DECODE, **settings) -> Engine:
    return Engine(model, chunking=CHUNKS, selection=SELECT, decoding=decode, **settings)


def answer(model, decode=DECODE, query=QUERY, chunks=(0, 4), **settings):
    engine = engine_of(model, decode, **settings)
    return engine.answer(DOCUMENT, query, prefix=PREFIX, oracle=chunks)


def test_a_scorer(model):
    """The chunk whose tokens the question shares is kept, as counted by hand."""
    prompt = chunk_prompt(PREFIX, DOCUMENT, DOCUMENT[33:40], CHUNKS)
    cache = encode_document(model, prompt)
    valid = np.arange(16) < np.asarray(cache.lengths)[..., None]
    shared = (jnp.isin(cache.tokens, prompt.query[0, :7]) & valid).sum(2)
    scores = jnp.where(cache.lengths > 0, shared * 1.0, -jnp.inf)
    selection = select_top_k(scores, 2)
    pieces = [set(DOCUMENT[i : i + 15].tolist()) for i in range(0, 90, 15)]
    counted = [len(set(DOCUMENT[33:40].tolist()) & piece) for piece in pieces]
    assert int(np.argmax(counted)) == 2
    kept = selection.chunk_ids[0].tolist()
    assert 2 in kept
    state = first_state(model, cache, selection, prompt, DECODE, settings=SELECT)
    tokens = denoise(model, cache, state, config=DECODE).tokens[0].tolist()
    assert answer(model, query=DOCUMENT[33:40], chunks=kept).tokens == tokens


def probability(logits, tokens, key):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]


@dataclasses.dataclass(frozen=True)
class AtLeast:
    threshold: float

    def __call__(self, confidence, step):
        return (confidence == confidence.max()) | (confidence >= jnp.log(self.threshold))


def best_then_all(confidence, step):
    return (step > 0) | (confidence == confidence.max())


def test_a_sampling_rule(model):
    """The threshold rule written again gives its tokens and evaluations; another gives its own."""
    rule = dataclasses.replace(DECODE, remasking=probability, unmask=AtLeast(0.2))
    want = answer(model, dataclasses.replace(DECODE, threshold=0.2))
    got = answer(model, rule)
    assert got.tokens == want.tokens
    assert 2 < got.evaluations == want.evaluations < 8
    assert answer(model, dataclasses.replace(DECODE, unmask=best_then_all)).evaluations == 2 * 2
    equal = dataclasses.replace(DECODE, unmask=AtLeast(0.2), remasking=probability)
    assert hash(equal) == hash(rule)
    for other in ({"threshold": 0.5}, {"factor": 1.0}, {"steps": 2}):
        with pytest.raises(ConfigError, match="unmask excludes"):
            dataclasses.replace(rule, **other)
    with pytest.raises(ConfigError, match="unmask must be a function"):
        DecodeConfig(unmask=3)


def test_a_snapshot_holds_no_code(model, tmp_path):
    engine = engine_of(model)
    ready = engine.prefill(DOCUMENT, QUERY, prefix=PREFIX, oracle=[0, 4], encode=False)
    for decode in (DecodeConfig(unmask=best_then_all), DecodeConfig(remasking=probability)):
        holding = dataclasses.replace(ready, decoding=decode)
        with pytest.raises(SnapshotError, match=r"decoding holds a custom function .* no code$"):
            save_request(tmp_path / "s", model, holding, chunking=CHUNKS)
    assert not (tmp_path / "s").exists()


def gathered(q, k, v, layer, chunk_ids, chunk_lengths, scale):
    """One softmax over a copy of the chosen chunks."""
    b, _, t, h, d = q.shape
    n, g, c = k.shape[1:4]
    there = (chunk_ids >= 0) & (chunk_ids < n)
    at = jnp.where(there, chunk_ids, 0)
    valid = there[..., None] & (jnp.arange(c) < chunk_lengths[at][..., None])
    heads = q.reshape(b, -1, t, g, h // g, d)
    scores = jnp.einsum("bktgrd,bkgcd->bgrtkc", heads, k[layer, at]) * scale
    scores = jnp.where(valid[:, None, None, None], scores, EMPTY_LSE)
    lse = jax.nn.logsumexp(scores, axis=(-2, -1))
    weights = jnp.exp(scores - lse[..., None, None])
    out = jnp.einsum("bgrtkc,bkgcd->btgrd", weights, v[layer, at]).reshape(b, t, h, d)
    return Partial(out.astype(q.dtype), lse.reshape(b, h, t))


def upside_down(q, k, v, *rest):
    return gathered(q, k, -v, *rest)


@pytest.mark.slow  # docs/research.md runs one too
def test_an_attention_implementation(model):
    want = answer(model, implementation="xla")
    got = answer(model, implementation=gathered)
    assert got.tokens == want.tokens
    assert got.paths["chunk_attention"] == "gathered"
    assert answer(model, implementation=upside_down).tokens != want.tokens, "it is what runs"
    keys = [jax.random.normal(jax.random.key(i), (2, 5, 2, 16, 8)) for i in range(2)]
    q = jax.random.normal(jax.random.key(2), (1, 3, 4, 4, 8))
    call = (q, *keys, jnp.array([[4, 0, -1]]), jnp.array([16, 16, 3, 0, 9]))
    mine = chunk_attention(*call, layer=1, implementation=gathered)
    reference = chunk_attention(*call, layer=1, implementation="reference")
    for x, y in zip(mine, reference, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    settings = {"dtype": jnp.dtype("int8"), "head_size": 3, "chunk_size": 1}
    assert resolve_implementation(gathered, **settings) is gathered, "its inputs are its own affair"
