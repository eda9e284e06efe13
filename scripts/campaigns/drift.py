"""What bfloat16 costs over a long generation: float32 and bfloat16 side by side, step by step.

Two questions. Given the same tokens, how far are the logits of a step apart, and does that grow
with the steps (`drift`)? Left to themselves, how many tokens of the two responses are the same
(`agreement`)?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    MaskPredictor,
    SelectionConfig,
    denoise_step,
    init_denoise,
)
from pdllm_jax.deprecated import generate_ids
from pdllm_jax.method.cache_methods import Method, cache_method


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation on the same tokens, over the slots that are still masked.

    error: |logits - logits'| / |logits - their mean|, Euclidean norms over all of these slots.
    probability: largest difference of the probabilities of the tokens that float32 predicts.
    same: share of the slots whose likeliest token is the same.
    order: whether the surest slot is the same, which is unmasked next.
    """

    masked: int
    error: float
    probability: float
    same: float
    order: bool


@jax.jit
def _logits(
    model: MaskPredictor, prompt: Int[Array, "P"], response: Int[Array, "G"]
) -> Float[Array, "G V"]:
    hidden = model.encode(jnp.concatenate([prompt, response])[None])
    return model.logits(hidden[0, len(prompt) :])


def drift(
    model: MaskPredictor, other: MaskPredictor, prompt: Sequence[int], config: DecodeConfig
) -> list[Step]:
    """LLaDA's published generation by `model`; at each of its steps both models' logits."""
    config = cache_method("plain").decode_config(config)
    ids = jnp.asarray(prompt, jnp.int32)
    state = init_denoise(model, None, None, ids, config, jax.random.key(0))
    steps = []
    while int(state.block[0]) < config.n_blocks:
        tokens = jnp.copy(state.tokens[0])
        open_slots = np.flatnonzero(np.asarray(tokens) == model.config.mask_token_id)
        wide, narrow = (np.asarray(_logits(m, ids, tokens))[open_slots] for m in (model, other))
        steps.append(_compare(wide, narrow))
        state = denoise_step(model, None, state, config=config)
    return steps


def _compare(wide: np.ndarray, narrow: np.ndarray) -> Step:
    wide, narrow = wide.astype(np.float64), narrow.astype(np.float64)
    spread = wide - wide.mean(-1, keepdims=True)
    best = wide.argmax(-1)
    slots = np.arange(len(best))

    def probability(logits: np.ndarray) -> np.ndarray:
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True)

    p, q = probability(wide), probability(narrow)
    return Step(
        masked=len(best),
        error=float(np.linalg.norm(wide - narrow) / np.linalg.norm(spread)),
        probability=float(np.abs(p[slots, best] - q[slots, best]).max()),
        same=float((narrow.argmax(-1) == best).mean()),
        order=bool(p.max(-1).argmax() == q.max(-1).argmax()),
    )


def agreement(
    model: MaskPredictor,
    other: MaskPredictor,
    parts: tuple[Sequence[int], Sequence[int], Sequence[int]],
    config: DecodeConfig,
    method: Method,
    chunking: ChunkConfig,
    selection: SelectionConfig,
) -> dict[str, Any]:
    """Both models' responses to the same prompt (prefix, context, query), each on its own."""
    results = [
        generate_ids(
            each, *parts, method=method, chunking=chunking, selection=selection, decode=config
        )
        for each in (model, other)
    ]
    first, second = (np.array(result.tokens) for result in results)
    differ = np.flatnonzero(first != second)
    chunks = [result.selection and result.selection["chunks"] for result in results]
    return {
        "method": method,
        "tokens": len(first),
        "same": float((first == second).mean()),
        "first_difference": int(differ[0]) if differ.size else None,
        "same_chunks": chunks[0] == chunks[1],
    }


def summary(steps: Sequence[Step], parts: int = 4) -> list[dict[str, Any]]:
    """Means over the generation's quarters, and the worst of each."""
    rows = []
    for part in np.array_split(np.arange(len(steps)), parts):
        some = [steps[i] for i in part]
        rows.append(
            {
                "steps": [int(part[0]), int(part[-1])],
                "error": float(np.mean([s.error for s in some])),
                "error_most": max(s.error for s in some),
                "probability_most": max(s.probability for s in some),
                "same": float(np.mean([s.same for s in some])),
                "order": float(np.mean([s.order for s in some])),
            }
        )
    return rows
