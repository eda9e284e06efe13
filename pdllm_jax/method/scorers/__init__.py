"""Step 2: scorers, how relevant a chunk is to a question. `base.py` says how to write one."""

from __future__ import annotations

from pdllm_jax.method.scorers import attention, bm25, chunk_draft, controls, copies
from pdllm_jax.method.scorers.base import Draft, Question, Response, Scorer, ScoreRequest
from pdllm_jax.method.scorers.controls import AllScorer, OracleScorer
from pdllm_jax.method.scorers.copies import DraftScorer

_ALL: tuple[type[Scorer], ...] = (
    DraftScorer,
    copies.CausalScorer,
    chunk_draft.ChunkDraftScorer,
    copies.QueryScorer,
    copies.ConfidenceScorer,
    attention.AttentionScorer,
    attention.HeadScorer,
    bm25.BM25Scorer,
    AllScorer,
    controls.FirstScorer,
    controls.LastScorer,
    controls.RandomScorer,
    OracleScorer,
)
SCORERS = {scorer.name: scorer for scorer in _ALL}

__all__ = [
    "SCORERS",
    "AllScorer",
    "Draft",
    "DraftScorer",
    "OracleScorer",
    "Question",
    "Response",
    "ScoreRequest",
    "Scorer",
]
