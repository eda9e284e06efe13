"""A small model whose attention is far from uniform, and prompts for it."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdllm_jax import Request
from pdllm_jax.config import ChunkConfig
from pdllm_jax.method.chunking import ChunkedPrompt
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor

MASK = ModelConfig.tiny().mask_token_id
BOS = ModelConfig.tiny().bos_token_id
CHUNKS = ChunkConfig(chunk_size=12)


def sharpen(model: MaskPredictor) -> MaskPredictor:
    """Multiplies random weights, so that what a row attends to changes its prediction."""
    return jax.tree.map(lambda w: w * 2.0 if w.ndim == 2 else w * 1.3, model)


@functools.cache
def tiny_model(family: str = "llada") -> MaskPredictor:
    """The tiny model of a family with random weights, and biases where it has them."""
    config, rngs = dataclasses.replace(ModelConfig.tiny(), family=family), nnx.Rngs(0)
    model = MaskPredictor(config, rngs=rngs)
    for block in model.blocks if config.qkv_bias else ():
        for matrix in (block.q_proj, block.k_proj, block.v_proj):
            matrix.bias[...] = jax.random.normal(rngs.params(), matrix.bias.shape)
    return model


@functools.cache
def sharp_model(family: str = "llada") -> MaskPredictor:
    """`tiny_model` with sharpened weights."""
    return sharpen(tiny_model(family))


def prompt_parts() -> tuple[list[int], list[int], list[int]]:
    """Prefix of 5 ids, document of 53 (5 chunks, the last one short), query of 7."""
    rng = np.random.default_rng(1)
    prefix = [BOS, *rng.integers(0, 250, 4).tolist()]
    return prefix, rng.integers(0, 250, 53).tolist(), rng.integers(0, 250, 7).tolist()


def pieces(prompt: ChunkedPrompt) -> list[list[int]]:
    """The ids of each chunk of the first document, without padding."""
    lengths = np.asarray(prompt.chunk_lengths[0])
    rows = np.asarray(prompt.chunks[0])
    return [row[:n].tolist() for row, n in zip(rows, lengths, strict=True) if n]


def widened(prompt: ChunkedPrompt, *, chunks=0, query=0, prefix=0) -> ChunkedPrompt:
    """A prompt with more padding: empty chunks, and ids behind query and prefix."""

    def pad(x, *widths):
        return jnp.pad(x, [(0, width) for width in widths], constant_values=7)

    return dataclasses.replace(
        prompt,
        chunks=pad(prompt.chunks, 0, chunks, 0),
        chunk_lengths=jnp.pad(prompt.chunk_lengths, [(0, 0), (0, chunks)]),
        query=pad(prompt.query, 0, query),
        prefix=pad(prompt.prefix, 0, prefix),
    )


def first_state(model, cache, selection, prompt, decode, **settings):
    """`init_denoise` with the key 0."""
    key = jax.random.key(0)
    settings = {"query_length": prompt.query_length} | settings
    return init_denoise(model, cache, selection, prompt.query, decode, key, **settings)


def answer_both(engine, requests):
    """(alone, together): answers to each request by itself, and in one batch."""
    alone = [engine.answer(**Request(*request)._asdict()) for request in requests]
    return list(zip(alone, engine.answer_batch(requests), strict=True))


def answer_with_and_without_prefix(engine, context: int, query: int, prefixes, atol: float):
    """`answer_both` for prefixes of these lengths, 0 for none; the scores agree."""
    rng = np.random.default_rng(0)
    lengths = [(context, query, prefix) for prefix in prefixes]
    requests = [Request(*(rng.integers(0, 250, n).tolist() for n in parts)) for parts in lengths]
    pairs = answer_both(engine, requests)
    for alone, together in pairs:
        scores = together.selection["scores"], alone.selection["scores"]
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(*scores, atol=atol)
    return pairs


def copy(tree):
    """A copy of every array, so that the original can be donated."""
    return jax.tree.map(jnp.copy, tree)


def copies_score(definition, prefix, chunk, slots, scored, copies: int) -> float:
    """Mean log-probability of scored slots; copy r has the slots of rank r mod copies masked."""
    total = 0.0
    for r in range(copies):
        hidden = {slot for rank, slot in enumerate(scored) if rank % copies == r}
        logp = definition.slot_scores(prefix, (chunk, CHUNKS.chunk_size), slots, hidden)
        total += sum(logp[slot, slots[slot]] for slot in hidden)
    return total / len(scored)


def greedy(logits_of, length: int) -> list[int]:
    """One token at a time, the most confident first, from a function tokens -> logits [G, V]."""
    tokens = [MASK] * length
    for _ in range(length):
        logits = logits_of(tokens)
        shifted = logits - logits.max(-1, keepdims=True)
        confidence = np.exp(shifted).max(-1) / np.exp(shifted).sum(-1)
        slot = max((i for i in range(length) if tokens[i] == MASK), key=lambda i: confidence[i])
        tokens[slot] = int(logits[slot].argmax())
    return tokens


def flax_flattens(call):
    """Returns how many of Flax's flatten functions run in a call."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        code = frame.f_code
        count += event == "call" and "flatten" in code.co_name and "/flax/" in code.co_filename

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count
