"""LLaDA over any visibility and any relative positions, in numpy and float64, from the definition.

RoPE makes a score depend on the offset between query and key alone. So every way of encoding and
attending in the method is one dense forward over all rows, given who sees whom (`sees`) and at
which offset (`offset`): no cache, no chunk, nothing shared with the library.
"""

from __future__ import annotations

import numpy as np
from flax import nnx

from pdllm_jax.network.transformer import MaskPredictor


class Definition:
    """The network of `model`, its weights in float64; plain RoPE only."""

    def __init__(self, model: MaskPredictor):
        self.config = model.config
        assert self.config.rope_scaling is None
        state = nnx.to_pure_dict(nnx.state(model))
        self.state = state

    @staticmethod
    def _array(node) -> np.ndarray:
        return np.asarray(node["weight"], np.float64)

    def _norm(self, x: np.ndarray, node) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * self._array(node)

    def logits(self, ids, sees: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """ids [T]; sees [T, T] bool, or [L, H, T, T] where layers and heads differ; offset [T, T],
        key position minus query position -> [T, V].

        Leaves the attention weights of every layer, [L, H, T, T], in `self.weights`.
        """
        config, dim = self.config, self.config.head_dim
        sees = np.broadcast_to(sees, (config.n_layers, config.n_heads, len(ids), len(ids)))
        self.weights = np.zeros(sees.shape)
        frequency = config.rope_theta ** -(np.arange(0, dim, 2) / dim)
        turn = np.exp(1j * offset[..., None] * frequency)  # [T, T, D/2]
        x = self._array(self.state["embedding"])[np.asarray(ids)]
        for i in range(config.n_layers):
            block = self.state["blocks"][i]
            h = self._norm(x, block["attn_norm"])
            q, k, v = (
                (h @ self._array(block[name]).T).reshape(len(ids), -1, dim)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            repeat = config.n_heads // config.n_kv_heads
            k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
            half = dim // 2
            q_c, k_c = (y[..., :half] + 1j * y[..., half:] for y in (q, k))
            scores = np.einsum("qhd,khd,qkd->hqk", q_c.conj(), k_c, turn).real / np.sqrt(dim)
            scores = np.where(sees[i], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            self.weights[i] = weights
            out = np.einsum("hqk,khd->qhd", weights, v).reshape(len(ids), -1)
            x = x + out @ self._array(block["attn_out"]).T
            h = self._norm(x, block["ff_norm"])
            gate = h @ self._array(block["gate_proj"]).T
            gate = gate / (1 + np.exp(-gate)) * (h @ self._array(block["up_proj"]).T)
            x = x + gate @ self._array(block["down_proj"]).T
        head = "embedding" if config.weight_tying else "lm_head"
        return self._norm(x, self.state["final_norm"]) @ self._array(self.state[head]).T

    def plain(self, ids) -> np.ndarray:
        """Everybody sees everybody, positions 0.. -> logits [T, V]."""
        n = len(ids)
        position = np.arange(n)
        return self.logits(ids, np.ones((n, n), bool), position - position[:, None])

    def slot_scores(self, prefix, chunk, slots, hidden) -> np.ndarray:
        """log p [V] at every slot of `slots`, where those in `hidden` are masked; behind one chunk.

        The chunk's rows see prefix and chunk; the slots' rows see everything. They start at the
        end of the full chunk slot, so `chunk` is (tokens, slot size).
        """
        tokens, size = chunk
        masked = [self.config.mask_token_id if i in hidden else t for i, t in enumerate(slots)]
        ids = [*prefix, *tokens, *masked]
        p, c, s = len(prefix), len(tokens), len(slots)
        position = np.concatenate([np.arange(p + c), p + size + np.arange(s)])
        group = np.repeat([0, 1, 2], [p, c, s])
        logits = self.logits(ids, group[:, None] >= group, position - position[:, None])[p + c :]
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))

    def against_chunks(self, prefix, chunks, size, live, kept=None) -> np.ndarray:
        """Logits of the live rows over independently encoded chunks in slots of `size`.

        Prefix rows see the prefix; a chunk sees the prefix, right before it, and itself; live rows
        see everything, chunk j placed at prefix + j size.

        kept: [L, H, K, size] bool, chunk tokens that live rows see, all by default.
        """
        p, k = len(prefix), len(chunks)
        ids = [*prefix, *(t for chunk in chunks for t in chunk), *live]
        group = [0] * p
        encoded_at, placed_at = list(range(p)), list(range(p))
        for j, chunk in enumerate(chunks):
            group += [1 + j] * len(chunk)
            encoded_at += [p + i for i in range(len(chunk))]
            placed_at += [p + j * size + i for i in range(len(chunk))]
        own = [p + k * size + i for i in range(len(live))]
        group = np.array(group + [1 + k] * len(live))
        encoded, placed = np.array(encoded_at + own), np.array(placed_at + own)
        is_live = group == 1 + k
        sees = (group == group[:, None]) | (group == 0) | is_live[:, None]
        if kept is not None:
            seen = np.ones((*kept.shape[:2], len(ids)), bool)
            flat = [kept[:, :, j, i] for j, chunk in enumerate(chunks) for i in range(len(chunk))]
            seen[:, :, p : p + len(flat)] = np.stack(flat, axis=-1)
            sees = sees & (seen[:, :, None] | ~is_live[:, None])
        offset = np.where(is_live[:, None], placed - placed[:, None], encoded - encoded[:, None])
        return self.logits(ids, sees, offset)[-len(live) :]

    def conditioned(self, prefix, chunks, size, query, live) -> np.ndarray:
        """As `against_chunks`, each chunk encoded with prefix and query, which see it too.

        The query lies behind the chunk's full slot. Live rows see chunks and the prefix that has
        seen itself alone.
        """
        p, k = len(prefix), len(chunks)
        ids, group, encoded = list(prefix), [0] * p, list(range(p))
        placed, chunk_of = list(range(p)), [True] * p
        for j, chunk in enumerate(chunks):
            ids += [*prefix, *chunk, *query]
            group += [1 + j] * (p + len(chunk) + len(query))
            encoded += [*range(p + len(chunk)), *(p + size + i for i in range(len(query)))]
            placed += [*[0] * p, *(p + j * size + i for i in range(len(chunk))), *[0] * len(query)]
            chunk_of += [*[False] * p, *[True] * len(chunk), *[False] * len(query)]
        ids += live
        own = [p + k * size + i for i in range(len(live))]
        group = np.array(group + [1 + k] * len(live))
        chunk_of = np.array(chunk_of + [True] * len(live))
        encoded, placed = np.array(encoded + own), np.array(placed + own)
        is_live = group == 1 + k
        sees = (group == group[:, None]) | (is_live[:, None] & chunk_of)
        offset = np.where(is_live[:, None], placed - placed[:, None], encoded - encoded[:, None])
        return self.logits(ids, sees, offset)[-len(live) :]

    def bridged(self, prefix, chunks, size, again, live) -> np.ndarray:
        """As `against_chunks`, with tokens again[j] of chunk j recomputed with all in view.

        Recomputed and live rows see the prefix, the recomputed tokens, the other chunk tokens as
        they were encoded alone, and the live rows.
        """
        p, k = len(prefix), len(chunks)
        ids, group = list(prefix), [0] * p
        encoded, placed, replaced = list(range(p)), list(range(p)), [False] * p
        for j, chunk in enumerate(chunks):
            ids += chunk
            group += [1 + j] * len(chunk)
            encoded += [p + i for i in range(len(chunk))]
            placed += [p + j * size + i for i in range(len(chunk))]
            replaced += [i in again[j] for i in range(len(chunk))]
        for j, chunk in enumerate(chunks):
            ids += [chunk[i] for i in again[j]]
            placed += [p + j * size + i for i in again[j]]
        ids += live
        placed += [p + k * size + i for i in range(len(live))]
        wide = len(ids) - len(group)
        group = np.array(group + [1 + k] * wide)
        encoded, replaced = np.array(encoded + [0] * wide), np.array(replaced + [False] * wide)
        placed = np.array(placed)
        sees_all = group == 1 + k
        sees = (group == group[:, None]) | (group == 0) | sees_all[:, None]
        sees = np.where(sees_all[:, None], sees & ~replaced, sees)
        offset = np.where(sees_all[:, None], placed - placed[:, None], encoded - encoded[:, None])
        return self.logits(ids, sees, offset)[-len(live) :]
