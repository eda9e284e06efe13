"""The network over rows whose KV is kept, in numpy and float64."""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.oracles.definition import Definition, softmax


@dataclasses.dataclass
class KV:
    """Rows to attend to: k [L, n, G, D/2] complex, rotated at their positions; v [L, n, G, D].

    seen: [L, G, n], rows that count.
    """

    k: np.ndarray
    v: np.ndarray
    seen: np.ndarray

    def __getitem__(self, at) -> KV:
        return KV(self.k[:, at], self.v[:, at], self.seen[:, :, at])

    def __len__(self) -> int:
        return self.k.shape[1]


def join(*parts: KV) -> KV:
    return KV(
        np.concatenate([part.k for part in parts], axis=1),
        np.concatenate([part.v for part in parts], axis=1),
        np.concatenate([part.seen for part in parts], axis=2),
    )


class Cached:
    """The network of `model`, row by row."""

    def __init__(self, model):
        self.net, self.config = Definition(model), model.config

    def rows(self, ids, position, *past: KV, sees=True) -> tuple[np.ndarray, KV]:
        """Logits and KV of rows that attend to `past` and, where `sees` [T, T], to each other.

        Leaves the attention weights, [L, H, T, past + T], in `self.weights`, and what the softmax
        was taken of in `self.attention_scores`.
        """
        c, position = self.config, np.asarray(position)
        turn, before = self.net.turn(position)[:, None], join(self.nothing(), *past)
        keys, values = [], []
        self.weights = np.zeros((c.n_layers, c.n_heads, len(ids), len(before) + len(ids)))
        self.attention_scores = np.zeros(self.weights.shape)

        def attend(i, q, k, v):
            q, k = q * turn, k * turn
            keys.append(k)
            values.append(v)
            k, v = np.concatenate([before.k[i], k]), np.concatenate([before.v[i], v])
            new = np.broadcast_to(sees, (c.n_kv_heads, len(ids), len(ids)))
            old = np.broadcast_to(before.seen[i][:, None], (*new.shape[:2], len(before)))
            seen = np.concatenate([old, new], axis=-1)
            q = q.reshape(len(ids), c.n_kv_heads, -1, q.shape[-1])
            scores = np.einsum("tgrd,sgd->grts", q.conj(), k).real / np.sqrt(c.head_dim)
            weights = softmax(np.where(seen[:, None], scores, -np.inf))
            self.weights[i] = weights.reshape(self.weights[i].shape)
            self.attention_scores[i] = scores.reshape(self.weights[i].shape)
            return np.einsum("grts,sgd->tgrd", weights, v)

        logits = self.net.network(ids, attend)
        seen = np.ones((c.n_layers, c.n_kv_heads, len(ids)), bool)
        return logits, KV(np.stack(keys), np.stack(values), seen)

    def nothing(self) -> KV:
        c = self.config
        shape = (c.n_layers, 0, c.n_kv_heads, c.head_dim)
        k = np.zeros((*shape[:3], c.head_dim // 2), complex)
        return KV(k, np.zeros(shape), np.zeros((c.n_layers, c.n_kv_heads, 0), bool))

    def moved(self, kv: KV, by: int) -> KV:
        return KV(kv.k * self.net.turn(np.array(by)), kv.v, kv.seen)

    def predicting(self, logits: np.ndarray, front: np.ndarray) -> np.ndarray:
        """Logits that predict the tokens of these rows; front: logits [1, V] of the row before."""
        return np.concatenate([front, logits[:-1]]) if self.net.shift else logits

    def log_softmax(self, logits: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
