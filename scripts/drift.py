#!/usr/bin/env python3
"""Measures what bfloat16 costs: float32 and bfloat16 side by side on the tokens of a generation.

  scripts/drift.py CHECKPOINT TEXT --gen-length 128 --prompt 128

Both models compute every step of LLaDA's published generation from the same tokens, those that
float32 chooses. Prints a row for each quarter of the steps. Exit status: 0; 2 and one line for bad
input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from convert import converted
from pdllm_jax import (
    DecodeConfig,
    MaskPredictor,
    Tokenizer,
    denoise_step,
    init_denoise,
    load_config,
    load_model,
)
from pdllm_jax.cli.errors import Parser, status
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.method.cache_methods import cache_method


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation of both models on the same tokens, over the masked slots.

    error: |difference of the logits| / |logits - their mean|, Euclidean norms over all slots.
    probability: largest difference of the probability of a token that float32 predicts.
    same: share of the slots with the same likeliest token.
    order: whether the same slot has the highest probability and is unmasked next.
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
    """Generates with `model`, and compares both models' logits at every step."""
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


def summary(steps: Sequence[Step], parts: int = 4) -> list[dict[str, Any]]:
    """Returns the means over the quarters of the generation, and the worst values."""
    rows = []
    for part in np.array_split(np.arange(len(steps)), parts):
        quarter = [steps[i] for i in part]
        rows.append(
            {
                "steps": [int(part[0]), int(part[-1])],
                "error": float(np.mean([s.error for s in quarter])),
                "error_most": max(s.error for s in quarter),
                "probability_most": max(s.probability for s in quarter),
                "same": float(np.mean([s.same for s in quarter])),
                "order": float(np.mean([s.order for s in quarter])),
            }
        )
    return rows


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    if args.prompt < 1:
        raise ValueError(f"--prompt must be at least 1, got {args.prompt}")
    enable_compilation_cache()
    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    text = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    prefix, query = tokenizer.around_document(args.question)
    models = [load_model(folder, dtype=dtype) for dtype in ("float32", "bfloat16")]
    config = DecodeConfig(gen_length=args.gen_length, block_length=min(32, args.gen_length))
    prompt = [*prefix, *text[: args.prompt], *query]
    steps = drift(*models, prompt, config)
    print(f"{len(prompt)} tokens of prompt, {len(steps)} steps, the same tokens to both:")
    for row in summary(steps):
        print(
            "  steps {steps[0]:3}-{steps[1]:3}: logits {error:.2%} apart (at most "
            "{error_most:.2%}), probability of the prediction at most {probability_most:.3f}, same "
            "prediction {same:.1%}, same slot next {order:.1%}".format(**row),
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    p.add_argument("text", type=Path, metavar="TEXT", help="a document, UTF-8")
    p.add_argument("--question", default="What happens next?", metavar="Q")
    p.add_argument("--gen-length", type=int, default=128, metavar="N")
    p.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the document")
    args = p.parse_args(argv)
    return status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
