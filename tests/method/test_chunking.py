"""Chunks: no token is lost, anchors head them, lengths are true, buckets are few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdllm_jax.config import ChunkConfig
from pdllm_jax.method.chunking import (
    bucket,
    bucket_chunks,
    bucket_rows,
    check_token_ids,
    chunk_prompt,
    split_context,
)
from pdllm_jax.rules import ConfigError

BOS = 9999


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.integers(2, 40), st.booleans(), st.integers(0, 20))
def test_every_token_is_kept_in_order(n, size, anchors, overlap):
    try:
        config = ChunkConfig(size, anchors=anchors, overlap=overlap)
    except ConfigError:
        assert size - anchors - overlap <= 0
        return
    context = np.arange(n)
    chunks, lengths = split_context(context, config, BOS)
    seen = []
    for i, (chunk, length) in enumerate(zip(chunks, lengths, strict=True)):
        assert int(anchors) < length <= size
        if anchors:
            assert chunk[0] == BOS
        piece = chunk[int(anchors) : length].tolist()
        repeated = overlap if i else 0
        assert piece[:repeated] == seen[len(seen) - repeated :]
        assert len(piece) > repeated
        seen += piece[repeated:]
    assert seen == context.tolist()
    assert (lengths[:-1] == size).all()


def test_context_shorter_than_a_chunk():
    prompt = chunk_prompt([1, 2], [3, 4], [5], ChunkConfig(16))
    assert prompt.n_chunks == 1
    assert prompt.chunk_lengths.tolist() == [[3]]
    assert prompt.chunks[0, 0, :3].tolist() == [1, 3, 4]  # the prefix's first token is the anchor
    bare = chunk_prompt([], [2], [3], ChunkConfig(8, anchors=False))
    assert bare.prefix.shape == (1, 0)
    assert bare.chunks[0, 0].tolist() == [2] + [0] * 7


def test_true_lengths_behind_the_padding():
    prompt = chunk_prompt([1] * 9, range(100), [5] * 11, ChunkConfig(8), bos_id=7)
    assert prompt.prefix.shape == (1, 32)
    assert prompt.prefix_length.tolist() == [9]
    assert prompt.query.shape == (1, 32)
    assert prompt.query_length.tolist() == [11]
    assert prompt.query[0].tolist() == [5] * 11 + [-1] * 21
    assert prompt.n_chunks == 15
    assert prompt.chunks.shape == (1, 16, 8)
    tight = chunk_prompt([1], range(150), [5], ChunkConfig(8), tight=True)
    assert tight.chunks.shape == (1, 22, 8)
    assert (np.asarray(prompt.chunks)[0, :15, 0] == 7).all()


@given(st.integers(1, 10**6))
def test_a_bucket_holds_its_length_and_wastes_an_eighth_at_most(n):
    assert n <= bucket(n) <= n * 9 / 8
    assert bucket(bucket(n)) == bucket(n)


def test_buckets_are_few():
    assert {bucket_chunks(n) for n in range(1, 129)} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert {bucket_rows(n) for n in range(129)} == {0, 32, 48, 64, 96, 128}
    assert bucket(0) == 0
    assert len({bucket(n, 8) for n in range(1, 8193)}) <= 72


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [], [2]), "context is empty"),
        (([1], [2], []), "query is empty"),
        (([], [2], [3]), "anchors need a BOS token"),
    ],
)
def test_empty_parts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        chunk_prompt(*arguments, ChunkConfig(8))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 300], r"context\[2\] = 300 is outside the vocabulary of 256 tokens"),
        ([-1], r"context\[0\] = -1 is outside"),
        ([2**70], "flat list of integer"),
        ([1.5], "flat list of integer"),
        ([[1]], "flat list of integer"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(ids, message):
    with pytest.raises(ValueError, match=message):
        check_token_ids("context", ids, 256)


@pytest.mark.parametrize("name", ["prefix", "context", "query"])
def test_a_mask_token_in_a_prompt_is_refused(name):
    parts = {"prefix": [1], "context": [2, 3], "query": [4]}
    chunk_prompt(*parts.values(), ChunkConfig(8), mask_id=9)
    parts[name] = [*parts[name], 9, 9]
    at = len(parts[name]) - 2
    with pytest.raises(ValueError, match=f"{name} has the mask token 9 at position {at}: remove"):
        chunk_prompt(*parts.values(), ChunkConfig(8), mask_id=9)


def test_a_hundred_random_requests_have_few_shapes():
    """As docs/api.md has it; documents of 4K to 128K tokens."""
    rng = np.random.default_rng(0)
    rows, shapes = set(), set()
    for _ in range(100):
        prefix, query = (bucket_rows(int(rng.integers(*bounds))) for bounds in ((10, 41), (5, 97)))
        tokens = int(np.exp(rng.uniform(np.log(4096), np.log(131_072))))
        rows.add((prefix, query))
        shapes.add((prefix, query, bucket_chunks(-(-tokens // 1023))))
    assert len(rows) == 8
    assert len(shapes) == 33
