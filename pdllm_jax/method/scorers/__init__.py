"""Step 2: scorers, how relevant a chunk is to a question. `base.py` says how to write one."""

from __future__ import annotations

from pdllm_jax.method.scorers.attention import AttentionScorer
from pdllm_jax.method.scorers.base import Response, Scorer, ScoreRequest
from pdllm_jax.method.scorers.controls import (
    AllScorer,
    FirstScorer,
    LastScorer,
    OracleScorer,
    RandomScorer,
)
from pdllm_jax.method.scorers.query_copies import ConfidenceScorer, DraftScorer, QueryScorer

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        DraftScorer,
        QueryScorer,
        ConfidenceScorer,
        AttentionScorer,
        AllScorer,
        FirstScorer,
        LastScorer,
        RandomScorer,
        OracleScorer,
    )
}

__all__ = [
    "SCORERS",
    "AllScorer",
    "AttentionScorer",
    "ConfidenceScorer",
    "DraftScorer",
    "FirstScorer",
    "LastScorer",
    "OracleScorer",
    "QueryScorer",
    "RandomScorer",
    "Response",
    "ScoreRequest",
    "Scorer",
]
