"""Chunks of a document, and what their token ids alone say, in numpy and float64."""

from __future__ import annotations

import math

import numpy as np

from pdllm_jax.config import ChunkConfig


def split(context, config: ChunkConfig, bos: int) -> list[list[int]]:
    """Chunks of C tokens, each behind its anchor; a neighbour repeats `overlap` tokens."""
    anchor = [bos] if config.anchors else []
    span, chunks, start = config.chunk_size - len(anchor), [], 0
    while True:
        chunks.append([*anchor, *context[start : start + span]])
        if start + span >= len(context):
            return chunks
        start += span - config.overlap


def bm25(words: list[int], texts: list[list[int]]) -> np.ndarray:
    """BM25 of each chunk's text, without its anchor, with k1 1.2 and b 0.75."""
    mean, total = np.mean([len(text) for text in texts]), np.zeros(len(texts))
    for word in words:
        df = sum(word in text for text in texts)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for i, text in enumerate(texts):
            tf, norm = text.count(word), 1 - 0.75 + 0.75 * len(text) / mean
            total[i] += idf * tf * 2.2 / (tf + 1.2 * norm)
    return total
