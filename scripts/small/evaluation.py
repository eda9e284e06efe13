"""Exact match of the small model by plain decoding, as training goes: no cache, no selection."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from small import network, tasks
from small.corpus import load
from small.network import Params, Shape

_TOKENS_AT_ONCE = 131_072


@partial(jax.jit, static_argnames=("shape",))
def _predict(params: Params, tokens: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Likeliest tokens of the response slots and their probabilities, both [B, 32]."""
    hidden = network.encode(params, shape, tokens)[:, -tasks.RESPONSE_LENGTH :]
    logits = network.head(params, hidden)
    best = logits.argmax(axis=-1)
    top = jnp.take_along_axis(logits, best[..., None], axis=-1)[..., 0]
    return best, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1))


def decode(
    params: Params, shape: Shape, prompts: np.ndarray, mask_id: int, threshold: float = 0.9
) -> tuple[np.ndarray, np.ndarray, int]:
    """Fills the 32 response slots of equally long prompts [B, T - 32].

    Returns the responses by threshold decoding, those of the first evaluation alone, both
    [B, 32], and the evaluations taken.
    """
    slots = tasks.RESPONSE_LENGTH
    masks = np.full((len(prompts), slots), mask_id, prompts.dtype)
    tokens = np.concatenate([prompts, masks], axis=1).astype(np.int32)
    masked = np.ones((len(prompts), slots), bool)
    first, steps = None, 0
    while masked.any():
        best, sure = (np.asarray(x) for x in _predict(params, tokens, shape))
        first, steps = best if first is None else first, steps + 1
        sure = np.where(masked, sure, -1.0)
        chosen = sure >= threshold
        chosen[np.arange(len(chosen)), sure.argmax(axis=1)] = True
        chosen &= masked
        tokens[:, -slots:][chosen] = best[chosen]
        masked &= ~chosen
    return tokens[:, -slots:], first, steps


class Evaluator:
    """Held-out examples of every task at a given length, decoded and scored."""

    def __init__(self, corpora: str, shape: Shape):
        folder = Path(corpora)
        self.corpora = load(folder, held_out=True)
        self.encode = tasks.Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.shape = shape

    def __call__(self, params: Params, length: int, count: int) -> dict[str, object]:
        """`count` examples a task: exact match by threshold decoding and in a single pass."""
        exact: dict[str, float] = {}
        once: dict[str, float] = {}
        evaluations, wrong = [], []
        for task in tasks.TASKS:
            examples = [
                tasks.make_example(task, length, seed, corpora=self.corpora, encode=self.encode)
                for seed in range(count)
            ]
            prompts = np.array([e["prefix"] + e["context"] + e["query"] for e in examples])
            size = max(min(_TOKENS_AT_ONCE // length, count), 1)
            hits, single = [], []
            for start in range(0, count, size):
                part = examples[start : start + size]
                filled, first, steps = decode(
                    params, self.shape, prompts[start : start + size], self.encode.mask
                )
                evaluations.append(steps)
                for example, ids, guess in zip(part, filled, first, strict=True):
                    hits.append(tasks.score(self.encode, example["answer"], ids))
                    single.append(tasks.score(self.encode, example["answer"], guess))
                    if not hits[-1]:
                        wrong.append([example["answer"], self.encode.decode(ids)])
            exact[task] = round(float(np.mean(hits)), 3)
            once[task] = round(float(np.mean(single)), 3)
        return {
            "exact": exact,
            "single_pass": once,
            "evaluations": round(float(np.mean(evaluations)), 1),
            "wrong": wrong[:: max(len(wrong) // 6, 1)][:6],
        }
