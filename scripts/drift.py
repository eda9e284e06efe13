#!/usr/bin/env python3
"""Measures what bfloat16 costs: float32 and bfloat16 side by side on the tokens of a generation.

  scripts/drift.py CHECKPOINT TEXT --gen-length 128 --prompt 128

Both models compute every step of LLaDA's published generation from the same tokens, those that
float32 chooses. Prints a row for each quarter of the steps. Exit status: 0; 2 and one line for bad
input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

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
from pdllm_jax.text_files import read_text


@jax.jit
def _logits(
    model: MaskPredictor, prompt: Int[Array, "P"], response: Int[Array, "G"]
) -> Float[Array, "G V"]:
    hidden = model.encode(jnp.concatenate([prompt, response])[None])
    rows = model.predicting_row(len(prompt) + jnp.arange(len(response)))
    return model.logits(hidden[0, rows])


def drift(
    model: MaskPredictor, other: MaskPredictor, prompt: Sequence[int], config: DecodeConfig
) -> Float[np.ndarray, "S 4"]:
    """Generates with `model`; returns `compare` of both models' logits at every step."""
    config = cache_method("plain").decode_config(config)
    ids = jnp.asarray(prompt, jnp.int32)
    state = init_denoise(model, None, None, ids[None], config, jax.random.key(0))
    steps = []
    while int(state.block[0]) < config.n_blocks:
        tokens = jnp.copy(state.tokens[0])
        masked = np.flatnonzero(np.asarray(tokens) == model.config.mask_token_id)
        logits = (np.asarray(_logits(m, ids, tokens), np.float64)[masked] for m in (model, other))
        steps.append(compare(*logits))
        state = denoise_step(model, None, state, config=config)
    return np.array(steps)


def compare(wide: Float[np.ndarray, "G V"], narrow: Float[np.ndarray, "G V"]) -> list[float]:
    """Compares logits of the same slots, float64.

    Returns:
      |difference| / |logits - their mean|, Euclidean norms over all slots; the largest difference
      of the probability of a token that `wide` predicts; the share of slots with the same likeliest
      token; 1 where the same slot has the highest probability and is unmasked next, or else 0.
    """
    error = np.linalg.norm(wide - narrow) / np.linalg.norm(wide - wide.mean(-1, keepdims=True))
    p, q = (np.exp(x - np.logaddexp.reduce(x, -1, keepdims=True)) for x in (wide, narrow))
    best = wide.argmax(-1)
    slots = np.arange(len(best))
    apart = np.abs(p[slots, best] - q[slots, best]).max()
    same = (narrow.argmax(-1) == best).mean()
    return [error, apart, same, p.max(-1).argmax() == q.max(-1).argmax()]


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    if args.prompt < 1:
        raise ValueError(f"--prompt must be at least 1, got {args.prompt}")
    enable_compilation_cache()
    folder = converted(args.checkpoint)
    tokenizer = Tokenizer.load(folder, load_config(folder))
    text = tokenizer.encode(read_text(args.text))
    prefix, query = tokenizer.around_document(args.question)
    models = [load_model(folder, dtype=dtype) for dtype in ("float32", "bfloat16")]
    config = DecodeConfig(gen_length=args.gen_length, block_length=min(32, args.gen_length))
    prompt = [*prefix, *text[: args.prompt], *query]
    steps = drift(*models, prompt, config)
    print(f"{len(prompt)} tokens of prompt, {len(steps)} steps, the same tokens to both:")
    for part in np.array_split(np.arange(len(steps)), 4):
        (error, _, same, order), most = steps[part].mean(axis=0), steps[part].max(axis=0)
        print(
            f"  steps {part[0]:3}-{part[-1]:3}: logits {error:.2%} apart (at most {most[0]:.2%}), "
            f"probability of the prediction at most {most[1]:.3f}, same prediction {same:.1%}, "
            f"same slot next {order:.1%}",
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
