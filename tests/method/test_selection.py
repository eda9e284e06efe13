"""Top-K: highest scores, ties to the lower index, ascending, never a chunk that is not there."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdllm_jax.config import ChunkConfig, SelectionConfig
from pdllm_jax.method.chunking import chunk_prompt
from pdllm_jax.method.prefill import prefill_top_k
from pdllm_jax.method.scorers import SCORERS, Scorer, ScoreRequest
from pdllm_jax.method.scoring import run_scorer
from pdllm_jax.method.selection import EMPTY_SLOT, select, select_top_k
from tests.support.method import tiny_model

SCORES = st.lists(
    st.sampled_from([-np.inf, -3.0, -1.5, -1.0, -0.0, 0.0, 2.0]), min_size=1, max_size=9
)


@example(scores=[1.0, -0.0, 0.0], k=2, keep_first=False, extra=None, margin=0.0)
@settings(max_examples=200, deadline=None)
@given(
    scores=SCORES,
    k=st.sampled_from([1, 2, 4, 20]),
    keep_first=st.booleans(),
    extra=st.sampled_from([None, 0, 1, 3]),
    margin=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_against_a_sort(scores, k, keep_first, extra, margin):
    """The K best; in adaptive K also `extra` chunks at most that are close behind."""
    max_k = None if extra is None else k + extra
    got = select_top_k(jnp.array(scores), k, keep_first=keep_first, max_k=max_k, margin=margin)
    order = [i for i in range(len(scores)) if scores[i] > -np.inf]
    order.sort(key=lambda i: (-scores[i], i))
    rank_by = list(scores)
    if keep_first and scores[0] > -np.inf:
        order, rank_by[0] = [0, *(i for i in order if i != 0)], np.inf
    last = rank_by[order[k - 1]] if len(order) >= k else -np.inf
    close = [i for i in order[k : k + (extra or 0)] if last - rank_by[i] <= margin]
    want, ids = sorted(order[:k] + close), got.chunk_ids.tolist()
    assert ids[: len(want)] == want
    assert set(ids[len(want) :]) <= {EMPTY_SLOT}
    assert len(ids) == min(max_k or k, len(scores))
    np.testing.assert_array_equal(got.scores[: len(want)], np.float32([scores[i] for i in want]))
    assert np.isneginf(got.scores[len(want) :]).all()


def test_batches_choose_row_by_row():
    scores = jax.random.normal(jax.random.key(0), (3, 8))
    whole = select_top_k(scores, 3)
    for row, ids in zip(scores, whole.chunk_ids, strict=True):
        np.testing.assert_array_equal(select_top_k(row, 3).chunk_ids, ids)


@dataclasses.dataclass(frozen=True)
class Fixed(Scorer):
    """Given scores."""

    name: ClassVar[str] = "fixed"
    values: tuple[float, ...] = ()

    def scores(self, model, cache, request):
        return jnp.broadcast_to(jnp.array(self.values), request.wanted.shape)


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ((1.0, -0.0, 0.0, -0.0, 0.0), [0, 1]),
        ((-0.0, 1.0, 0.0, 0.0, -1.0), [0, 1]),
        ((-1.0, np.nan, -2.0, np.nan, -np.inf), [0, 2]),
        ((np.nan, -np.inf, np.nan, 0.0, np.nan), [0, 3]),
    ],
)
def test_a_streamed_document_ranks_as_a_whole_one(values, want):
    """Ties to the lower chunk, zeros of either sign; NaN below every number."""
    prompt = chunk_prompt([253], np.arange(50), [5], ChunkConfig(12))
    scorer = Fixed((*values, *[0.0] * 3))  # three chunks are padding
    config = SelectionConfig(top_k=2, scorer=scorer, encoding="independent", encode_batch=1)
    cache, chosen, scores = prefill_top_k(tiny_model(), prompt, config)
    assert chosen.chunk_ids[0].tolist() == select(scores, config).chunk_ids[0].tolist() == want
    valid = cache.pool.lengths[chosen.slots[0]].tolist()
    assert valid == prompt.chunk_lengths[0, jnp.array(want)].tolist()


def test_nan_ranks_below_every_number():
    assert select_top_k(jnp.array([jnp.nan, -5.0, -jnp.inf]), 1).chunk_ids.tolist() == [1]
    assert select_top_k(jnp.array([jnp.nan, -5.0, -jnp.inf]), 3).chunk_ids.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("k", "max_k", "message"),
    [(0, None, "k must be positive"), (-1, None, "k must be positive"), (2, 1, "less than k 2")],
)
def test_impossible_counts_are_refused(k, max_k, message):
    with pytest.raises(ValueError, match=message):
        select_top_k(jnp.zeros(3), k, max_k=max_k)


def test_controls():
    exists = jnp.array([[True, True, True, True, False]])

    def control_scores(scorer, key=None, oracle=None):
        request = ScoreRequest(None, exists, keys=key, oracle=oracle)
        return run_scorer(SCORERS[scorer](), tiny_model(), None, request)

    def chosen(scorer, key=None):
        scores = control_scores(scorer, key)
        assert np.isneginf(scores[0, 4])
        return select_top_k(scores, 2).chunk_ids[0].tolist()

    assert chosen("first") == [0, 1]
    assert chosen("last") == [2, 3]
    seen = {tuple(chosen("random", jax.random.key(i))) for i in range(40)}
    assert len(seen) == 6  # every pair of the four
    with pytest.raises(ValueError, match="needs a key"):
        chosen("random")
    with pytest.raises(ValueError, match="needs the ids"):
        chosen("oracle")
    named = control_scores("oracle", oracle=jnp.array([[4, 3, 1]]))
    assert select_top_k(named, 4).chunk_ids[0].tolist() == [1, 3, EMPTY_SLOT, EMPTY_SLOT]
