"""Causal attention over contiguous keys against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels.chunk_attention import dense

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("lengths", [None, (21, 4, 0)])
@pytest.mark.parametrize("block_scores", [dense.BLOCK_SCORES, 1], ids=["one block", "blocks"])
def test_a_causal_row_attends_to_the_rows_up_to_itself(lengths, block_scores, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK_SCORES", block_scores)
    batch, rows, heads, groups, dim = 3, 21, 6, 2, 8
    q, k, v = (
        RNG.normal(size=(batch, rows, n, dim)).astype(np.float32) for n in (heads, groups, groups)
    )
    given = None if lengths is None else np.array(lengths)
    out, lse = dense.attention(q, k, v, given, causal=True)
    wide_k, wide_v = (np.repeat(x.astype(float), heads // groups, axis=2) for x in (k, v))
    for b, t in np.ndindex(batch, rows):
        seen = t + 1 if lengths is None else min(t + 1, lengths[b])
        if not seen:
            np.testing.assert_array_equal(out[b, t], 0)
            continue
        scores = np.einsum("hd,shd->hs", q[b, t], wide_k[b, :seen]) * dim**-0.5
        weights = np.exp(scores)
        np.testing.assert_allclose(lse[b, :, t], np.log(weights.sum(-1)), rtol=1e-5)
        weights /= weights.sum(-1, keepdims=True)
        want = np.einsum("hs,shd->hd", weights, wide_v[b, :seen])
        np.testing.assert_allclose(out[b, t], want, rtol=1e-4, atol=1e-5)
