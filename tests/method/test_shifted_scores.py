"""Scores of a model with a logit shift against dense passes with an explicit mask, in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.engine import Engine
from pdllm_jax.engine.memory import plan_memory
from pdllm_jax.method.chunking import batch_prompts, chunk_prompt
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.scorers import Draft, Response, ScoreRequest
from pdllm_jax.method.scoring import draft_response, run_scorer, score_chunks
from pdllm_jax.method.selection import select_top_k
from pdllm_jax.rules import ConfigError
from tests.oracles.definition import Definition
from tests.support.method import BOS, CHUNKS, MASK, pieces, sharp_model

SELECT = SelectionConfig(top_k=2, encode_batch=2)
DRAFT = Draft(jnp.array([[17, MASK, 99, MASK]], jnp.int32), jnp.array([[True, False, True, False]]))
SIZE = CHUNKS.chunk_size


@pytest.fixture(scope="module")
def model():
    return sharp_model("dream")


class Dense:
    """One sequence: prefix, chunk, slots behind the chunk's full slot. `rows` are in this order."""

    def __init__(self, model, prefix, chunk, slots):
        self.definition, self.slots = Definition(model), slots
        p, c, s = len(prefix), len(chunk), len(slots)
        self.before, self.front = [*prefix, *chunk], p + c
        position = np.concatenate([np.arange(p + c), p + SIZE + np.arange(s)])
        self.offset = position - position[:, None]
        self.part = np.repeat([0, 1, 2], [p, c, s])

    def log_p(self, sees, hidden=()) -> np.ndarray:
        """log p [slots, V]: of slot s from the row in front of it; `hidden` slots are masks."""
        slots = [MASK if i in hidden else token for i, token in enumerate(self.slots)]
        logits = self.definition.logits([*self.before, *slots], sees, self.offset)
        logits = logits[self.front - 1 : -1]
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))

    def copies(self, scored, count) -> float:
        sees, total = self.part[:, None] >= self.part, 0.0
        for r in range(count):
            hidden = scored[r::count]
            log_p = self.log_p(sees, hidden)
            total += sum(log_p[i, self.slots[i]] for i in hidden)
        return total / len(scored)

    def causal(self, scored) -> float:
        sees = self.part[:, None] >= self.part
        sees[self.front :, self.front :] = np.tri(len(self.slots), dtype=bool)
        log_p = self.log_p(sees)
        return np.mean([log_p[i, self.slots[i]] for i in scored])

    def surest(self, d) -> float:
        return self.log_p(self.part[:, None] >= self.part)[-d:].max(-1).mean()


def after_full_attention(model, prefix, chunk, query, slots=None, d=4, steps=2) -> float:
    """The score of "chunk-draft"; slots: the response in place of a draft of d."""
    masked = [MASK] * (d if slots is None else len(slots))
    dense = Dense(model, prefix, chunk, [*query, *masked])
    if slots is None:
        log_p = dense.log_p(np.True_)[-d:]
        best = sorted(range(1, d), key=lambda i: -log_p[i].max())[: steps - 1]
        slots = [int(log_p[i].argmax()) if i in (0, *best) else MASK for i in range(d)]
    # One network over both passes: the second one's rows see prefix and chunk rows of the first.
    p, front, live = len(prefix), dense.front, [*query, *slots]
    first = [*dense.before, *dense.slots]
    ids = [*first, chunk[-1], *live]
    position = np.array([*range(front), *(p + SIZE + np.arange(len(live)))])
    position = np.concatenate([position, [front - 1], position[front:]])
    sees = np.zeros((len(ids), len(ids)), bool)
    sees[: len(first), : len(first)] = sees[len(first) :, :front] = True
    own = len(first) + 1
    sees[own:, own:] = np.tri(len(live), dtype=bool)
    logits = dense.definition.logits(ids, sees, position - position[:, None])[own - 1 : -1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = [i for i, token in enumerate(live) if i < len(query) or token != MASK]
    return np.mean([log_p[i, live[i]] for i in scored])


def expected(model, parts, prompt, name, copies) -> list[float]:
    prefix, _, query = parts
    slots, scored = [*query, 17, MASK, 99, MASK], [*range(7), 7, 9]
    if name == "chunk-draft":
        return [after_full_attention(model, prefix, x, query) for x in pieces(prompt)]
    if name == "confidence":
        slots = [*query, *[MASK] * 4]
    elif name == "query":
        slots, scored = query, [*range(7)]
    passes = [Dense(model, prefix, chunk, slots) for chunk in pieces(prompt)]
    if name == "causal":
        return [dense.causal(scored) for dense in passes]
    if name == "confidence":
        return [dense.surest(4) for dense in passes]
    return [dense.copies(scored, copies or len(scored)) for dense in passes]


COVERED = [("draft", 1), ("draft", None), ("causal", None), ("query", 3), ("confidence", None)]
SCORERS = [("draft", 3), ("chunk-draft", None)]
SCORERS += [pytest.param(*case, marks=pytest.mark.slow) for case in COVERED]


@pytest.mark.parametrize(("scorer", "copies"), SCORERS)
def test_scores_are_the_defined_ones(model, parts, prompt, scorer, copies):
    """In the pass over the document, from its cached KV and streamed; beside another question."""
    n = prompt.n_chunks
    config = dataclasses.replace(SELECT, scorer=scorer, masked_copies=copies)
    drafted = scorer in ("draft", "causal")
    draft = {"draft": DRAFT} if drafted else {}
    (scores,) = prefill(model, prompt, config, **draft)[1]
    want = expected(model, parts, prompt, scorer, copies)
    np.testing.assert_allclose(scores[:n], want, rtol=2e-5)
    assert np.ptp(want) > 0.05

    streaming = dataclasses.replace(config, encoding="independent")
    _, kept, streamed = prefill_top_k(model, prompt, streaming, **draft)
    np.testing.assert_array_equal(streamed[0], scores)
    np.testing.assert_array_equal(kept.chunk_ids, select_top_k(scores[None], 2).chunk_ids)

    document = encode_document(model, prompt, encode_batch=2)
    queries = jnp.stack([prompt.query[0], jnp.roll(prompt.query[0], 2)])
    lengths = jnp.array([7, 5])
    both = {"draft": jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), DRAFT)} if drafted else {}
    later = score_chunks(model, document, queries, config, query_length=lengths, **both)
    np.testing.assert_allclose(later[0, :n], want, rtol=2e-4)
    assert np.abs(later[1] - later[0])[:n].min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["causal", "chunk-draft"])
def test_a_prompt_in_a_batch_scores_as_alone(model, parts, scorer):
    """Other prefix, document, query and lengths; without a prefix in front of the first chunk."""
    prefix, context, query = parts
    config = dataclasses.replace(SELECT, scorer=scorer, encode_batch=3)
    one = chunk_prompt(prefix, context, query, CHUNKS)
    two = chunk_prompt([], context[5:30], query[:3], CHUNKS, bos_id=BOS)
    scores = prefill(model, batch_prompts([one, two], 2), config)[1]
    for row, prompt in zip(scores, (one, two), strict=True):
        n = prompt.n_chunks
        np.testing.assert_array_equal(row[:n], prefill(model, prompt, config)[1][0, :n])
        assert np.isneginf(row[n:]).all()


@pytest.mark.parametrize("scorer", ["causal", "chunk-draft"])
def test_re_selection_scores_the_response_so_far(model, parts, prompt, scorer):
    prefix, _, query = parts
    answer = [MASK, 40, 41, MASK, 42, MASK]
    tokens = jnp.array([answer], jnp.int32)
    response = Response(tokens, tokens != MASK, jnp.ones(tokens.shape, bool))

    @jax.jit
    def score(model, prompt):
        cache = encode_document(model, prompt, encode_batch=2)
        request = ScoreRequest(prompt.question, cache.lengths > 0, response=response)
        return run_scorer(SelectionConfig(scorer=scorer).scorer, model, cache, request)

    (scores,) = score(model, prompt)
    slots = [*query, *answer]
    scored = [i for i, token in enumerate(slots) if i < 7 or token != MASK]
    if scorer == "causal":
        want = [Dense(model, prefix, chunk, slots).causal(scored) for chunk in pieces(prompt)]
    else:
        want = [after_full_attention(model, prefix, x, query, answer) for x in pieces(prompt)]
    np.testing.assert_allclose(scores[: len(want)], want, rtol=2e-5)


def test_the_draft_is_read_from_the_rows_in_front(model, parts, prompt):
    prefix, _, query = parts
    got = draft_response(model, prompt, SelectionConfig.paper())
    definition, draft = Definition(model), [MASK] * 4
    for step in range(2):
        logits = definition.plain([*prefix, *query, *draft])[-5:-1]
        sure = logits.max(-1) - np.log(np.exp(logits).sum(-1))
        open_slots = [i for i in range(4) if draft[i] == MASK]
        slot = 0 if step == 0 else max(open_slots, key=lambda i: sure[i])
        draft[slot] = int(logits[slot].argmax())
    assert got.tokens[0].tolist() == draft


@pytest.mark.parametrize("scorer", ["causal", "chunk-draft"])
def test_a_model_without_the_shift_is_refused(scorer):
    model, config = sharp_model(), SelectionConfig(scorer=scorer)
    message = f"scorer '{scorer}' needs a model with a logit shift, got the family 'llada'"
    with pytest.raises(ConfigError, match=message):
        Engine(model, selection=config)
    with pytest.raises(ConfigError, match=message):
        plan_memory(model.config, 100, selection=config)
    prompt = chunk_prompt([BOS], [1, 2, 3], [4], CHUNKS)
    with pytest.raises(ConfigError, match=message):
        prefill(model, prompt, config)


def test_the_papers_settings():
    paper, retained = SelectionConfig.paper(), SelectionConfig.paper_retained(top_k=2)
    flat = {"top_k": 4, "scorer": "causal", "draft_length": 4, "draft_steps": 2}
    flat |= {"encoding": "joint", "positions": "continuous", "keep_tokens": None}
    assert {name: paper.to_flat()[name] for name in flat} == flat
    assert retained == SelectionConfig(**{**flat, "scorer": "chunk-draft", "top_k": 2})
    assert SelectionConfig.from_flat(**paper.to_flat()) == paper


# tests/scripts/test_reproduce.py answers with both; test_combinations.py asks later and re-selects.
@pytest.mark.slow
@pytest.mark.parametrize("settings", [SelectionConfig.paper, SelectionConfig.paper_retained])
def test_an_engine_answers_with_the_papers_settings(model, parts, settings):
    """Re-selected and asked later, too."""
    prefix, context, query = parts
    engine = Engine(
        model,
        chunking=ChunkConfig(SIZE),
        selection=settings(top_k=2, reselect="block"),
        decoding=DecodeConfig(gen_length=4, block_length=2, threshold=0.9),
    )
    alone = engine.answer(context, query, prefix=prefix)
    (asked,) = engine.ask(engine.encode(context, prefix=prefix), [query])
    assert asked.tokens == alone.tokens
    assert asked.selection["chunks"] == alone.selection["chunks"]
    assert alone.selection["rescored"] == 1
