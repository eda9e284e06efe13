#!/usr/bin/env python3
"""A denoising loop of one's own around `denoise_step`, on the host.

Two things that the library's loop does not do as they are done here: it scores the chunks again
after every few evaluations, and it ends in the middle of a block, as soon as the text up to its
first end is there. Between two calls the state is a plain pytree: read it, or change it with
dataclasses.replace.

  examples/denoise_loop.py               a tiny model of random weights; most of it is compiling
  examples/denoise_loop.py CHECKPOINT    a converted checkpoint, asked about persuasion.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from pdllm_jax import (
    ChunkConfig,
    ChunkedPrompt,
    DecodeConfig,
    MaskPredictor,
    ModelConfig,
    SelectionConfig,
    Tokenizer,
    chunk_prompt,
    denoise_step,
    init_denoise,
    load_model,
    prefill,
    reselect,
    select_top_k,
)
from pdllm_jax.compilation import enable_compilation_cache

DOCUMENT = Path(__file__).resolve().parent / "persuasion.txt"
RESELECT_EVERY = 4  # evaluations


class Case(NamedTuple):
    """What is run; `stops` are the tokens that end a text, `text` spells ids."""

    model: MaskPredictor
    prompt: ChunkedPrompt
    stops: tuple[int, ...]
    text: Callable[[list[int]], str]


def tiny() -> Case:
    """Random weights, and a document of random tokens."""
    config = ModelConfig.tiny()
    model = MaskPredictor(config, rngs=nnx.Rngs(0))
    # Larger weights, so that the network's predictions depend on what it sees.
    model = jax.tree.map(lambda w: w * 2.0 if w.ndim == 2 else w, model)
    rng = np.random.default_rng(0)
    prompt = chunk_prompt(
        [config.bos_token_id, *rng.integers(0, 250, 4)],
        rng.integers(0, 250, 180),
        rng.integers(0, 250, 9),
        ChunkConfig(chunk_size=32),
    )
    # No end of text comes from such a model: every eighth token shall be one.
    stops = tuple(range(0, config.vocab_size, 8))
    return Case(model, prompt, stops, lambda ids: " ".join(map(str, ids)))


def real(folder: Path, question: str) -> Case:
    """A checkpoint, and the first 24,000 characters of the novel."""
    model = load_model(folder)
    tokenizer = Tokenizer.load(folder, model.config)
    prefix, query = tokenizer.around_document(question)
    context = tokenizer.encode(DOCUMENT.read_text(encoding="utf-8")[:24_000])
    chunking = ChunkConfig(chunk_size=512)
    prompt = chunk_prompt(prefix, context, query, chunking, bos_id=tokenizer.bos_id)
    return Case(model, prompt, tokenizer.stop_ids, tokenizer.decode)


def ended(tokens: np.ndarray, mask_id: int, stops: tuple[int, ...]) -> bool:
    """Whether the text is there up to its first end, with nothing masked before that."""
    open_slots = np.flatnonzero(tokens == mask_id)
    leading = tokens[: open_slots[0]] if open_slots.size else tokens
    return bool(np.isin(leading, stops).any())


def main(argv: list[str] | None = None) -> list[int]:
    """The response's tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, nargs="?")
    parser.add_argument("--question", default="Who is Anne's father?")
    args = parser.parse_args(argv)
    case = tiny() if args.checkpoint is None else real(args.checkpoint, args.question)
    model, prompt, stops, text = case

    settings = SelectionConfig(top_k=2, encoding="independent", encode_batch=2)
    config = DecodeConfig(gen_length=16, block_length=8)
    # All chunks' KV stays, for they are scored again; the settings of the pass alone go in.
    cache, scores = prefill(model, prompt, settings.scoring(), keep_pool=True)
    print("scores:", " ".join(f"{x:.2f}" for x in scores[0, : prompt.n_chunks].tolist()))
    state = init_denoise(
        model, cache, select_top_k(scores, settings.top_k), prompt.query, config,
        jax.random.key(0), settings=settings,
    )  # fmt: skip

    tokens = np.asarray(state.tokens[0])
    while int(state.block[0]) < config.n_blocks:
        evaluations = int(state.evaluations[0])
        if evaluations and evaluations % RESELECT_EVERY == 0:
            before = state.selected[0].tolist()
            state = reselect(model, cache, state, settings=settings, config=config)
            print(f"  chunks {before} -> {state.selected[0].tolist()}")
        block = int(state.block[0])
        state = denoise_step(model, cache, state, config=config)
        before, tokens = tokens, np.asarray(state.tokens[0])
        new = np.flatnonzero(tokens != before)
        found = ", ".join(f"{slot}: {text([int(tokens[slot])])!r}" for slot in new)
        print(f"evaluation {evaluations + 1}, block {block}: {found or 'nothing'}")
        if ended(tokens, model.config.mask_token_id, stops):
            print("  the text has ended")
            break
    first = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    response = [int(token) for token in tokens[:first] if token != model.config.mask_token_id]
    print("response:", text(response))
    return response


if __name__ == "__main__":
    enable_compilation_cache()
    main()
