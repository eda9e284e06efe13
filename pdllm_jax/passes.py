"""What follows from the settings of an answer: rows recomputed, and what its pass must keep."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from pdllm_jax.config import ConfigError, DecodeConfig, Recompute, SelectionConfig
from pdllm_jax.prefill import needs_pool

Method = Literal["prefilling", "plain", "prefix-cache", "dual-cache"]

_RECOMPUTE: dict[Method, Recompute] = {
    "plain": "response",
    "prefix-cache": "suffix",
    "dual-cache": "block",
}


def decode_config(method: Method, config: DecodeConfig) -> DecodeConfig:
    """config with the rows that a baseline recomputes; the method itself keeps its own choice."""
    if method not in get_args(Method):
        raise ConfigError(f"method {method!r} is not known ({', '.join(get_args(Method))})")
    if config.guidance > 0 and method != "plain":
        raise ConfigError(f"guidance is implemented for method 'plain', not for {method!r}")
    if method == "prefilling":
        return config
    return dataclasses.replace(config, recompute=_RECOMPUTE[method])


def keeps_pool(selecting: SelectionConfig, *, batched: bool) -> bool:
    """Whether answering keeps the KV of all chunks of the document, or of a batch of them.

    Joint and query-conditioned encoding make their own, and what is wanted of one document alone is
    kept while it streams through.
    """
    reads_all = selecting.reselect != "never" or selecting.scorer == "attention"
    return reads_all or (batched and needs_pool(selecting))


def streams(selecting: SelectionConfig, *, batched: bool) -> bool:
    """Whether nothing but the kept chunks is ever asked for, so that no more lies in memory."""
    return needs_pool(selecting) and not keeps_pool(selecting, batched=batched)


def settled(selecting: SelectionConfig, n: int, *, named: bool = False) -> SelectionConfig:
    """The settings for documents of at most n chunks. named: the chunks to keep are given."""
    if selecting.scorer == "all":
        return dataclasses.replace(selecting, top_k=n, max_k=None, margin=0.0)
    if n <= selecting.top_k and not named:
        # Everything is kept: there is nothing to score, now or later.
        return dataclasses.replace(
            selecting, scorer="all", top_k=n, max_k=None, margin=0.0, reselect="never"
        )
    if selecting.max_k is not None:
        return dataclasses.replace(selecting, max_k=min(selecting.max_k, n))
    return selecting


def passing_config(selecting: SelectionConfig, *, streaming: bool) -> SelectionConfig:
    """What the pass over the documents is told: no more than it reads."""
    passing = selecting.scoring()
    if streaming:
        return dataclasses.replace(
            passing,
            top_k=selecting.top_k,
            max_k=selecting.max_k,
            margin=selecting.margin,
            keep_first=selecting.keep_first,
        )
    return dataclasses.replace(passing, encoding=selecting.encoding, reselect=selecting.reselect)
