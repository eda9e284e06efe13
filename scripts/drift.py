#!/usr/bin/env python3
"""Measures what fewer bits cost: a model in float32 and in other forms, on the same tokens.

  scripts/drift.py CHECKPOINT TEXT --forms bfloat16 fp8 int8 --gen-length 128 --prompt 128

Prints two tables. The first has the error of the residual stream after each layer, and of the
logits, where the response is all masks. The second follows LLaDA's published generation: all forms
compute every step from the same tokens, those that float32 chooses; a row for each quarter of the
steps, and one for all.
fp8 and int8 are weights with activations in --dtype. GPUs also quantise the activations of fp8 in
bfloat16, if there are more than 128 rows. Exit status: 0; 2 and one line for bad input; 130 when
interrupted.
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
from pdllm_jax.method.caches import cache_method
from pdllm_jax.text_files import read_text

FORMS = {"bfloat16": {"dtype": "bfloat16"}}  # besides weights in 8 bits
FORM_NAMES = [*FORMS, "fp8", "int8"]


@jax.jit
def _logits(
    model: MaskPredictor, prompt: Int[Array, "P"], response: Int[Array, "G"]
) -> Float[Array, "G V"]:
    hidden = model.encode(jnp.concatenate([prompt, response])[None])
    rows = model.predicting_row(len(prompt) + jnp.arange(len(response)))
    return model.logits(hidden[0, rows])


@jax.jit
def _streams(model: MaskPredictor, ids: Int[Array, "T"]) -> list[Array]:
    """Returns the residual stream after every layer, and the logits."""
    streams: list[Array] = []
    hidden = model.encode(ids[None], hook=lambda layer, stream: streams.append(stream))
    return [*streams, model.logits(hidden)]


def layer_errors(
    models: Sequence[MaskPredictor], prompt: Sequence[int], length: int
) -> Float[np.ndarray, "L+1 F"]:
    """Returns |difference| / |value| of each model from the first: every layer, then the logits.

    Euclidean norms over all rows of the prompt and `length` masks, float64.
    """
    ids = jnp.asarray([*prompt, *[models[0].config.mask_token_id] * length], jnp.int32)
    values = [[np.asarray(x, np.float64) for x in _streams(model, ids)] for model in models]
    rows = zip(*values, strict=True)
    norm = np.linalg.norm
    return np.array([[norm(x - wide) / norm(wide) for x in others] for wide, *others in rows])


def drift(
    models: Sequence[MaskPredictor], prompt: Sequence[int], config: DecodeConfig
) -> Float[np.ndarray, "S F 4"]:
    """Generates with the first model; returns `compare` of its logits and each other's, by step."""
    config, model = cache_method("plain").decode_config(config), models[0]
    ids = jnp.asarray(prompt, jnp.int32)
    state = init_denoise(model, None, None, ids[None], config, jax.random.key(0))
    steps = []
    while int(state.block[0]) < config.n_blocks:
        tokens = jnp.copy(state.tokens[0])
        masked = np.flatnonzero(np.asarray(tokens) == model.config.mask_token_id)
        wide, *others = (np.asarray(_logits(m, ids, tokens), np.float64)[masked] for m in models)
        steps.append([compare(wide, narrow) for narrow in others])
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
    forms = [{"dtype": "float32"}] + [FORMS.get(name) or {"weights": name} for name in args.forms]
    models = [load_model(folder, **{"dtype": args.dtype, **form}) for form in forms]
    config = DecodeConfig(gen_length=args.gen_length, block_length=min(32, args.gen_length))
    prompt = [*prefix, *text[: args.prompt], *query]
    print(f"{len(prompt)} tokens of prompt and {args.gen_length} of response\n")
    print(f"| error after | {' | '.join(args.forms)} |\n|---|{'---|' * len(args.forms)}")
    errors = layer_errors(models, prompt, args.gen_length)
    for layer, row in enumerate(errors):
        name = "the LM head" if layer == len(errors) - 1 else f"layer {layer}"
        print(f"| {name} | {' | '.join(f'{error:.2%}' for error in row)} |")
    heads = "difference of logits, mean | most | difference of probability, most | "
    heads += "same prediction | same slot next"
    print(f"\n| steps | form | {heads} |\n|---|---|---|---|---|---|---|")
    steps = drift(models, prompt, config)
    for part in [*np.array_split(np.arange(len(steps)), 4), np.arange(len(steps))]:
        for form, rows in zip(args.forms, steps[part].swapaxes(0, 1), strict=True):
            (error, _, same, order), most = rows.mean(axis=0), rows.max(axis=0)
            figures = f"{error:.2%} | {most[0]:.2%} | {most[1]:.3f} | {same:.1%} | {order:.1%}"
            print(f"| {part[0]} to {part[-1]} | {form} | {figures} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    p.add_argument("text", type=Path, metavar="TEXT", help="a document, UTF-8")
    p.add_argument("--question", default="What happens next?", metavar="Q")
    p.add_argument("--forms", nargs="+", choices=FORM_NAMES, default=FORM_NAMES)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--gen-length", type=int, default=128, metavar="N")
    p.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of the document")
    args = p.parse_args(argv)
    return status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
