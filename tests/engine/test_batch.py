"""Batches of ragged requests and questions about one document: every row as if it were alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ChunkConfig, DecodeConfig, Engine, MaskPredictor, Request, SelectionConfig
from pdllm_jax.method.chunking import batch_prompts, batch_size, chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scoring import draft_response, score_chunks
from pdllm_jax.method.selection import select
from tests.support.method import BOS, CHUNKS, answer_both, copy, first_state, sharp_model

SELECT = SelectionConfig(top_k=2, masked_copies=3, encode_batch=3)
DECODE = DecodeConfig(gen_length=8, block_length=4)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharp_model()


def request_of(prefix: int, context: int, query: int, seed: int = 0) -> Request:
    rng = np.random.default_rng(seed)
    first = [BOS, *rng.integers(0, 250, prefix - 1)]
    return Request(rng.integers(0, 250, context), rng.integers(0, 250, query), first, seed=seed)


# Of 5, 1, 11 and 5 chunks; queries in two buckets. The first and the last have the same buckets.
SIZES = [(5, 53, 7), (9, 8, 40), (3, 120, 20), (12, 50, 11)]
RAGGED = [request_of(*sizes, seed) for seed, sizes in enumerate(SIZES)]
engine_of = functools.partial(Engine, chunking=CHUNKS, selection=SELECT, decoding=DECODE)


def prompt_of(request: Request, chunking: ChunkConfig = CHUNKS):
    return chunk_prompt(request.prefix, request.context, request.question, chunking)


def answer(engine: Engine, request: Request, **settings):
    return engine.answer(**request._asdict(), **settings)


@pytest.mark.parametrize(
    "encoding",
    [
        "joint",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("independent", "query-conditioned", "bridge")
        ),
    ],
)
def test_ragged_requests_are_answered_as_if_each_were_alone(model, encoding):
    """Identity 5: other documents, lengths, questions; tokens, chunks and scores bit for bit."""
    engine = engine_of(model, selection=dataclasses.replace(SELECT, encoding=encoding))
    pairs = answer_both(engine, RAGGED)
    for alone, together in pairs:
        assert together.tokens == alone.tokens
        assert together.evaluations == alone.evaluations
        assert together.selection["chunks"] == alone.selection["chunks"]
        if alone.selection["scores"] is not None:  # one document is kept whole: nothing to score
            assert together.selection["scores"] == alone.selection["scores"]
    assert len({tuple(alone.tokens) for alone, _ in pairs}) == len(RAGGED)
    second, first = answer(engine, RAGGED[0]), pairs[0][0]
    assert (second.tokens, second.selection) == (first.tokens, first.selection), "another run"


# test_combinations.py has more of them, greedy, against the definition.
CHOICES = [
    {"scorer": "all"},  # identity 1: for one request in tests/method/test_prefill.py
    {"encoding": "independent", "top_k": 11, "keep_tokens": 12},  # identity 6
    {"scorer": "confidence", "positions": "absolute", "max_k": 4, "margin": 1.0},
    {"scorer": "attention", "encoding": "independent"},
    {"scorer": "random", "encoding": "independent", "keep_tokens": 8},
    {"reselect": "step"},
    {"encoding": "independent", "reselect": "block"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", CHOICES, ids=lambda change: "+".join(f"{k}={v}" for k, v in change.items())
)
def test_every_choice_is_the_same_in_a_batch(model, change):
    """Of two documents that have to be chosen from; one that is kept whole is above."""
    selecting = dataclasses.replace(SELECT, **change)
    decode = dataclasses.replace(DECODE, threshold=0.05, temperature=0.5)
    for alone, together in answer_both(
        engine_of(model, selection=selecting, decoding=decode), RAGGED[::3]
    ):
        assert together.tokens == alone.tokens
        assert together.evaluations == alone.evaluations
        assert together.selection["chunks"] == alone.selection["chunks"]
        assert together.selection.get("chunks_at_end") is not None or "reselect" not in change


def test_padding_and_buckets_change_no_bit(model):
    """A prompt in larger buckets of every axis, in the batch with another: scores and KV."""
    prompt = prompt_of(RAGGED[0])
    wider = dataclasses.replace(
        prompt,
        prefix=jnp.pad(prompt.prefix, ((0, 0), (0, 16)), constant_values=9),
        chunks=jnp.pad(prompt.chunks, ((0, 0), (0, 3), (0, 0)), constant_values=9),
        chunk_lengths=jnp.pad(prompt.chunk_lengths, ((0, 0), (0, 3))),
        query=jnp.pad(prompt.query, ((0, 0), (0, 16)), constant_values=9),
    )
    other = prompt_of(RAGGED[2])
    selecting = dataclasses.replace(SELECT, encoding="independent")
    cache, scores = prefill(model, prompt, selecting)
    n = prompt.n_chunks
    for batch in (batch_prompts([wider]), batch_prompts([other, wider], 4)):
        row = 0 if batch.chunks.shape[0] == 1 else 1
        got, found = prefill(model, batch, selecting)
        np.testing.assert_array_equal(found[row, :n], scores[0, :n])
        assert np.isneginf(found[row, n:]).all()
        if row:
            assert np.isneginf(found[2:]).all()  # requests that are filling
        first = row * batch.chunks.shape[1]
        for i, length in enumerate(np.asarray(prompt.chunk_lengths[0, :n])):
            for mine, theirs in ((cache.pool.k, got.pool.k), (cache.pool.v, got.pool.v)):
                padded = theirs[:, first + i, :, :length]
                np.testing.assert_array_equal(mine[:, i, :, :length], padded)
        alone, draft = (draft_response(model, x, selecting).tokens for x in (prompt, batch))
        np.testing.assert_array_equal(draft[row], alone[0])


@pytest.mark.slow
def test_documents_of_a_batch_can_be_asked_again(model):
    """Scores of later questions, one for each document, from the batch's one pool."""
    prompts = [prompt_of(request) for request in RAGGED[:3]]
    cache = encode_document(model, batch_prompts(prompts))
    later = [prompt_of(x._replace(question=RAGGED[3].question)) for x in RAGGED[:3]]
    query = jnp.concatenate([prompt.query for prompt in later])
    lengths = jnp.concatenate([prompt.query_length for prompt in later])
    got = score_chunks(model, cache, query, SELECT, query_length=lengths)
    for row, prompt in zip(got, later, strict=True):
        want = prefill(model, prompt, SELECT)[1][0]
        n = prompt.n_chunks
        np.testing.assert_allclose(row[:n], want[:n], atol=2e-4)
        assert np.isneginf(row[n:]).all()
    with pytest.raises(ValueError, match="2 questions for a cache of 3 documents"):
        score_chunks(model, cache, query[:2], SELECT)
    with pytest.raises(ValueError, match="1 drafts for 3 questions"):
        score_chunks(model, cache, query, SELECT, draft=draft_response(model, prompts[0], SELECT))
    with pytest.raises(ValueError, match="a cache of 3 documents"):
        init_denoise(model, cache, select(got[:2], SELECT), query[:2], DECODE, jax.random.key(0))


@pytest.mark.parametrize(
    "encoding",
    [
        "independent",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("joint", "query-conditioned", "bridge")
        ),
    ],
)
def test_questions_about_one_document(model, encoding):
    """As an answer to each; the document is encoded once, and by nobody's question."""
    queries = [RAGGED[i].question for i in (0, 1, 3)]
    cache = encode_document(model, prompt_of(RAGGED[2]))
    before = [np.asarray(x) for x in jax.tree.leaves(cache)]
    engine = engine_of(model, selection=dataclasses.replace(SELECT, encoding=encoding))
    answers = engine.ask(cache, queries, seeds=[0, 1, 2])
    for i, (query, got) in enumerate(zip(queries, answers, strict=True)):
        alone = answer(engine, RAGGED[2]._replace(question=query, seed=i))
        assert got.tokens == alone.tokens
        assert got.selection["chunks"] == alone.selection["chunks"]
        np.testing.assert_allclose(got.selection["scores"], alone.selection["scores"], atol=2e-4)
    for x, y in zip(before, jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_request_that_is_done_reads_no_chunk(model):
    """Its chunks' KV may be anything by then: the others' tokens stay, and so do its own."""
    prompts = batch_prompts([prompt_of(request) for request in RAGGED[:2]])
    selecting = dataclasses.replace(SELECT, encoding="independent")
    cache, scores = prefill(model, prompts, selecting)
    state = first_state(
        model, cache, select(scores, selecting), prompts, DECODE, settings=selecting
    )
    state = dataclasses.replace(state, block=jnp.array([DECODE.n_blocks, 0]))
    n = prompts.chunks.shape[1]
    spoilt = jax.tree.map(lambda x: x.at[:, :n].set(jnp.nan) if x.ndim == 5 else x, cache)
    want = denoise(model, cache, copy(state), config=DECODE)
    got = denoise(model, spoilt, state, config=DECODE)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert (got.tokens[0] == model.config.mask_token_id).all()
    assert got.evaluations.tolist() == [0, 8]


# test_streaming.py has answers of the method "prefilling" by default.
@pytest.mark.parametrize("method", [pytest.param("prefilling", marks=pytest.mark.slow), "plain"])
def test_finished_blocks_are_handed_out(model, method):
    config = DecodeConfig(gen_length=16, block_length=4, temperature=2.0)
    engine = engine_of(model, method=method, decoding=config)
    whole = answer(engine, RAGGED[0])
    seen: list[tuple[int, int, list[int]]] = []
    streamed = answer(engine, RAGGED[0], on_block=lambda *x: seen.append(x))
    assert streamed.tokens == whole.tokens
    assert [(r, b) for r, b, _ in seen] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [token for *_, piece in seen for token in piece] == whole.tokens
    stop = next(token for token in whole.tokens[4:8] if token not in whole.tokens[:4])
    seen.clear()
    stopping = dataclasses.replace(engine, decoding=dataclasses.replace(config, stop_ids=(stop,)))
    ended = answer(stopping, RAGGED[0], on_block=lambda *x: seen.append(x))
    assert [b for _, b, _ in seen] == [0, 1]
    assert [token for *_, piece in seen for token in piece] == ended.tokens[:8]


def test_blocks_of_a_batch_out_of_step(model):
    """Requests that need different numbers of evaluations a block."""
    engine = engine_of(model, decoding=dataclasses.replace(DECODE, gen_length=16, threshold=0.02))
    seen: dict[int, list[int]] = {i: [] for i in range(3)}
    results = engine.answer_batch(RAGGED[:3], on_block=lambda i, _, piece: seen[i].extend(piece))
    assert list(seen.values()) == [result.tokens for result in results]
    assert len({result.evaluations for result in results}) > 1


def test_until_stops_between_blocks_and_goes_on(model):
    prompt = prompt_of(RAGGED[0])
    cache, scores = prefill(model, prompt, SELECT)

    def begin():
        return first_state(model, cache, select(scores, SELECT), prompt, DECODE, settings=SELECT)

    half = denoise(model, cache, begin(), config=DECODE, until=jnp.int32(1))
    assert half.evaluations.tolist() == [4]
    tokens = np.asarray(half.tokens)
    whole = denoise(model, cache, begin(), config=DECODE)
    np.testing.assert_array_equal(tokens[:, :4], whole.tokens[:, :4])
    rest = denoise(model, cache, half, config=DECODE, until=jnp.int32(99))
    np.testing.assert_array_equal(rest.tokens, whole.tokens)


def test_compilations_are_few_and_a_second_request_of_a_bucket_needs_none(model):
    """100 random shapes. Bound: 2 prefix buckets x 4 of queries x 4 of chunks, as drawn here."""
    rng = np.random.default_rng(0)
    small = ChunkConfig(16)
    decode = DecodeConfig(gen_length=4, block_length=4, steps=1)
    selecting = dataclasses.replace(SELECT, masked_copies=1, draft_length=1, draft_steps=1)

    def shapes():
        prefix, query = int(rng.integers(2, 41)), int(rng.integers(2, 97))
        prompt = prompt_of(request_of(prefix, int(rng.integers(40, 480)), query), small)
        return prompt.prefix.shape, prompt.query.shape, prompt.chunks.shape

    drawn = [shapes() for _ in range(100)]
    assert len({shape[0] for shape in drawn}) == 2
    assert len({shape[1] for shape in drawn}) == 4
    assert len({shape[2] for shape in drawn}) <= 4
    distinct = set(drawn)
    assert len(distinct) <= 2 * 4 * 4
    jitted = (prefill, draft_response, init_denoise, denoise)

    engine = Engine(model, chunking=small, selection=selecting, decoding=decode)
    answer(engine, request_of(4, 100, 20, 0))
    before = [f._cache_size() for f in jitted]
    for i in range(4):
        later = answer(engine, request_of(4, 91 + 3 * i, 5 + 7 * i, i))  # the same buckets
        assert later.timings["compile"] == 0
    assert [f._cache_size() for f in jitted] == before


def test_sizes_of_batches():
    assert [batch_size(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_each_request_of_a_batch_keeps_the_chunks_named_for_it(model):
    engine = engine_of(model, selection=dataclasses.replace(SELECT, scorer="oracle"))
    requests = [RAGGED[0]._replace(oracle=[4, 1]), RAGGED[1]._replace(oracle=[0])]
    for request, (alone, together) in zip(requests, answer_both(engine, requests), strict=True):
        assert together.selection == {"chunks": sorted(request.oracle), "scores": None}
        assert together.tokens == alone.tokens


def test_each_question_keeps_the_chunks_named_for_it(model):
    """Those that a scorer has chosen give its tokens, whatever order they are named in."""
    selecting = dataclasses.replace(SELECT, encoding="independent")
    scoring = engine_of(model, selection=selecting)
    naming = engine_of(model, selection=dataclasses.replace(selecting, scorer="oracle"))
    cache = encode_document(model, prompt_of(RAGGED[0]))
    questions = [RAGGED[0].question, RAGGED[1].question]
    scored = scoring.ask(cache, questions)
    kept = [answer.selection["chunks"] for answer in scored]
    assert kept[0] != kept[1]
    named = naming.ask(cache, questions, oracle=[ids[::-1] for ids in kept])
    assert [answer.selection for answer in named] == [{"chunks": k, "scores": None} for k in kept]
    assert [answer.tokens for answer in named] == [answer.tokens for answer in scored]
    other = naming.ask(cache, questions, oracle=kept[::-1])
    assert [answer.tokens for answer in other] != [answer.tokens for answer in scored]


def test_what_does_not_fit_is_named(model):
    good = RAGGED[0]
    scored = engine_of(model)
    oracle = engine_of(model, selection=dataclasses.replace(SELECT, scorer="oracle"))
    prompt = prompt_of(good)
    two = batch_prompts([prompt, prompt])
    cache = encode_document(model, prompt)
    streamed = dataclasses.replace(SELECT, encoding="independent")
    question, named = good.question, good._replace(oracle=[0])
    batch, ask, ask_oracle = scored.answer_batch, scored.ask, oracle.ask
    for message, call in (
        ("no requests", lambda: batch([])),
        (r"request 1: context\[0\] = 300 is outside", lambda: batch([good, ([300], question)])),
        ("request 1: question is empty", lambda: batch([good, good._replace(question=[])])),
        ("^scorer 'oracle' needs the ids", lambda: oracle.answer_batch([good])),
        (
            r"request 1: oracle ids \[5\] are not all inside",
            lambda: oracle.answer_batch([named, good._replace(oracle=[5])]),
        ),
        ("^oracle ids are for the scorer 'oracle'", lambda: batch([named])),
        ("^scorer 'oracle' needs the ids", lambda: ask_oracle(cache, [question])),
        ("oracle has 2 entries for 1 q", lambda: ask_oracle(cache, [question], oracle=[[0], [1]])),
        (
            r"question 1: oracle ids \[8\] are not all inside",
            lambda: ask_oracle(cache, [question] * 2, oracle=[[0], [8]]),
        ),
        ("no questions", lambda: ask(cache, [])),
        ("seeds has 2 entries for 1 questions", lambda: ask(cache, [question], seeds=[1, 2])),
        ("question 1: question is empty", lambda: ask(cache, [question, []])),
        ("keep_pool", lambda: ask(prefill(model, prompt, SELECT)[0], [question])),
        ("the cache holds 2", lambda: ask(encode_document(model, two), [question])),
        ("one document is streamed at a time", lambda: prefill_top_k(model, two, streamed)),
        ("no prompts", lambda: batch_prompts([])),
        ("2 prompts do not fit a batch of 1", lambda: batch_prompts([prompt, prompt], 1)),
        ("differ in chunk s", lambda: batch_prompts([prompt, prompt_of(good, ChunkConfig(16))])),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow  # for one request in tests/method/test_denoise.py
def test_a_step_by_hand_serves_a_batch(model):
    prompts = batch_prompts([prompt_of(request) for request in RAGGED[:2]])
    cache, scores = prefill(model, prompts, SELECT)

    def begin():
        return first_state(model, cache, select(scores, SELECT), prompts, DECODE, settings=SELECT)

    state = begin()
    while bool((state.block < DECODE.n_blocks).any()):
        state = denoise_step(model, cache, state, config=DECODE)
    np.testing.assert_array_equal(
        state.tokens, denoise(model, cache, begin(), config=DECODE).tokens
    )


def test_leave_one_out_in_a_batch(model):
    """Identity 3: the longest question decides how many copies there are, for nobody else."""
    prompts = [prompt_of(request) for request in RAGGED[:2]]
    exact = dataclasses.replace(SELECT, masked_copies=None)
    _, together = prefill(model, batch_prompts(prompts), exact)
    for row, prompt in zip(together, prompts, strict=True):
        n = prompt.n_chunks
        slots = int(prompt.query_length[0]) + SELECT.scorer.draft_steps
        alone = prefill(model, prompt, dataclasses.replace(SELECT, masked_copies=slots))[1][0]
        np.testing.assert_allclose(row[:n], alone[:n], rtol=1e-5)


def test_streaming_each_document_keeps_what_the_batch_keeps(model):
    """Identity 7: selection, scores and KV, bit for bit."""
    selecting = dataclasses.replace(
        SELECT, encoding="independent", top_k=2, max_k=3, margin=0.5, keep_first=True
    )
    prompts = [prompt_of(request) for request in RAGGED]
    together = batch_prompts(prompts)
    cache, scores = prefill(model, together, selecting)
    chosen = select(scores, selecting)
    n = together.chunks.shape[1]
    for b, prompt in enumerate(prompts):
        streamed, kept, found = prefill_top_k(model, prompt, selecting)
        np.testing.assert_array_equal(found[0, : prompt.n_chunks], scores[b, : prompt.n_chunks])
        want = [i for i in chosen.chunk_ids[b].tolist() if i >= 0]
        assert [i for i in kept.chunk_ids[0].tolist() if i >= 0] == want
        for i, slot in zip(want, kept.slots[0].tolist(), strict=False):
            length = int(prompt.chunk_lengths[0, i])
            np.testing.assert_array_equal(
                streamed.pool.k[:, slot, :, :length], cache.pool.k[:, b * n + i, :, :length]
            )
