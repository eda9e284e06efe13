"""The networks over any visibility and relative positions, in numpy and float64, by definition.

RoPE makes a score depend on the offset between query and key alone. So every way of encoding and
attending in the method is one dense forward over all rows, given who sees whom (`sees`) and at
which offset (`offset`): no cache, no chunk, nothing shared with the library.
"""

from __future__ import annotations

import numpy as np
from flax import nnx

from pdllm_jax.network.transformer import MaskPredictor


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Definition:
    """The network of `model`, its weights in float64; plain RoPE only."""

    def __init__(self, model: MaskPredictor):
        self.config = model.config
        assert self.config.rope_scaling is None
        # The token of row j is read from the logits of row j - shift, of row 0 from its own.
        self.shift = int(self.config.logit_shift)
        self.state = nnx.to_pure_dict(nnx.state(model))

    @staticmethod
    def _array(node) -> np.ndarray:
        return np.asarray(node["weight"], np.float64)

    def _linear(self, x: np.ndarray, node) -> np.ndarray:
        y = x @ self._array(node).T
        return y + np.asarray(node["bias"], np.float64) if "bias" in node else y

    def _norm(self, x: np.ndarray, node) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * self._array(node)

    def logits(self, ids, sees: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """ids [T]; sees [T, T] bool, or [L, H, T, T] where layers and heads differ; offset [T, T],
        key position minus query position -> [T, V].

        Leaves the attention weights of every layer, [L, H, T, T], in `self.weights`.
        """
        config = self.config
        sees = np.broadcast_to(sees, (config.n_layers, config.n_heads, len(ids), len(ids)))
        self.weights = np.zeros(sees.shape)
        turn = self.turn(offset)  # [T, T, D/2]

        def attend(i: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
            repeat = config.n_heads // config.n_kv_heads
            k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
            scores = np.einsum("qhd,khd,qkd->hqk", q.conj(), k, turn).real
            self.weights[i] = softmax(np.where(sees[i], scores / np.sqrt(config.head_dim), -np.inf))
            return np.einsum("hqk,khd->qhd", self.weights[i], v)

        return self.network(ids, attend)

    def turn(self, position: np.ndarray) -> np.ndarray:
        """The rotation of a key, as complex numbers [.., D/2]."""
        dim = self.config.head_dim
        frequency = self.config.rope_theta ** -(np.arange(0, dim, 2) / dim)
        return np.exp(1j * position[..., None] * frequency)

    def network(self, ids, attend) -> np.ndarray:
        """Logits [T, V], with attention given as a function of (layer, q, k, v) -> [T, H, D].

        q [T, H, D/2] and k [T, G, D/2] are complex and not rotated.
        """
        dim, half = self.config.head_dim, self.config.head_dim // 2
        x = self._array(self.state["embedding"])[np.asarray(ids)]
        for i in range(self.config.n_layers):
            block = self.state["blocks"][i]
            h = self._norm(x, block["attn_norm"])
            q, k, v = (
                self._linear(h, block[name]).reshape(len(ids), -1, dim)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = (y[..., :half] + 1j * y[..., half:] for y in (q, k))
            x = x + attend(i, q, k, v).reshape(len(ids), -1) @ self._array(block["attn_out"]).T
            h = self._norm(x, block["ff_norm"])
            gate = h @ self._array(block["gate_proj"]).T
            gate = gate / (1 + np.exp(-gate)) * (h @ self._array(block["up_proj"]).T)
            x = x + gate @ self._array(block["down_proj"]).T
        head = "embedding" if self.config.weight_tying else "lm_head"
        return self._norm(x, self.state["final_norm"]) @ self._array(self.state[head]).T

    def plain(self, ids) -> np.ndarray:
        """Everybody sees everybody, positions 0.. -> logits [T, V]."""
        n = len(ids)
        position = np.arange(n)
        return self.logits(ids, np.ones((n, n), bool), position - position[:, None])

    def slot_scores(self, prefix, chunk, slots, hidden, causal=False) -> np.ndarray:
        """log p [V] at every slot of `slots`, where those in `hidden` are masked; behind one chunk.

        The chunk's rows see prefix and chunk; the slots' rows see everything, or if causal, not the
        slots behind them. They start at the end of the full chunk slot, so `chunk` is (tokens, slot
        size).
        """
        tokens, size = chunk
        masked = [self.config.mask_token_id if i in hidden else t for i, t in enumerate(slots)]
        ids = [*prefix, *tokens, *masked]
        p, c, s = len(prefix), len(tokens), len(slots)
        position = np.concatenate([np.arange(p + c), p + size + np.arange(s)])
        group = np.repeat([0, 1, 2], [p, c, s])
        sees = group[:, None] >= group
        if causal:
            sees[p + c :, p + c :] = np.tri(s, dtype=bool)
        predicting = np.maximum(p + c + np.arange(s) - self.shift, 0)
        logits = self.logits(ids, sees, position - position[:, None])[predicting]
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))

    def against_chunks(self, prefix, chunks, size, live, kept=None) -> np.ndarray:
        """Logits of the live rows over independently encoded chunks in slots of `size`.

        Prefix rows see the prefix; a chunk sees the prefix, right before it, and itself; live rows
        see everything, chunk j placed at prefix + j size.

        kept: [L, H, K, size] bool, chunk tokens that live rows see, all by default.
        """
        p, rows = len(prefix), Rows(prefix)
        for j, chunk in enumerate(chunks):
            rows.add(chunk, 1 + j, p, p + j * size)
        seen = None
        if kept is not None:
            seen = np.ones((*kept.shape[:2], len(rows.ids) + len(live)), bool)
            flat = [kept[:, :, j, i] for j, chunk in enumerate(chunks) for i in range(len(chunk))]
            seen[:, :, p : p + len(flat)] = np.stack(flat, axis=-1)
        rows.add_live(live, p + len(chunks) * size)
        return self._live_logits(rows, len(live), seen=seen)

    def conditioned(self, prefix, chunks, size, query, live) -> np.ndarray:
        """As `against_chunks`, each chunk encoded with prefix and query, which see it too.

        The query lies behind the chunk's full slot. Live rows see chunks and the prefix that has
        seen itself alone.
        """
        p, rows = len(prefix), Rows(prefix)
        for j, chunk in enumerate(chunks):
            rows.add(prefix, 1 + j, 0, 0, seen=False)
            rows.add(chunk, 1 + j, p, p + j * size)
            rows.add(query, 1 + j, p + size, 0, seen=False)
        rows.add_live(live, p + len(chunks) * size)
        return self._live_logits(rows, len(live), prefix_is_shared=False)

    def bridged(self, prefix, chunks, size, again, live) -> np.ndarray:
        """As `against_chunks`, with tokens again[j] of chunk j recomputed with all in view.

        Recomputed and live rows see the prefix, the recomputed tokens, the other chunk tokens as
        they were encoded alone, and the live rows.
        """
        p, rows = len(prefix), Rows(prefix)
        for j, chunk in enumerate(chunks):
            for i, token in enumerate(chunk):
                rows.add([token], 1 + j, p + i, p + j * size + i, seen=i not in again[j])
        for j, chunk in enumerate(chunks):
            for i in again[j]:
                rows.add_live([chunk[i]], p + j * size + i)
        rows.add_live(live, p + len(chunks) * size)
        return self._live_logits(rows, len(live))

    def _live_logits(self, rows: Rows, count: int, prefix_is_shared=True, seen=None) -> np.ndarray:
        """Logits of the last rows; seen: rows that live rows see, by default `rows.seen`."""
        group, encoded, placed = map(np.array, (rows.group, rows.encoded, rows.placed))
        is_live = (group == Rows.LIVE)[:, None]
        sees = (group == group[:, None]) | (prefix_is_shared & (group == 0))
        sees = sees | (is_live & np.array(rows.seen if seen is None else seen)[..., None, :])
        offset = np.where(is_live, placed - placed[:, None], encoded - encoded[:, None])
        return self.logits(rows.ids, sees, offset)[-count:]


class Rows:
    """Rows of one forward, in groups: prefix 0, chunk j 1 + j, live rows. A group sees itself.

    encoded, placed: position among the group's rows, and as live rows see it. seen: by live rows.
    """

    LIVE = -1

    def __init__(self, prefix) -> None:
        self.ids, self.group, self.encoded, self.placed, self.seen = [], [], [], [], []
        self.add(prefix, 0, 0, 0)

    def add(self, ids, group, encoded, placed, seen=True) -> None:
        """Adds consecutive rows of a group, from these positions on."""
        self.ids += ids
        self.group += [group] * len(ids)
        self.encoded += range(encoded, encoded + len(ids))
        self.placed += range(placed, placed + len(ids))
        self.seen += [seen] * len(ids)

    def add_live(self, ids, placed) -> None:
        """Adds live rows."""
        self.add(ids, self.LIVE, placed, placed)
