"""Prefilling-dLLM for one request, in numpy and float64, greedy: from question to response.

Written from docs/algorithm.md. Nothing is batched, padded or bucketed; of the library it reads
settings alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from tests.oracles.chunks import bm25, split
from tests.oracles.kv import KV, Cached, join

SHARPNESS = 2  # of the scores of "attention" and "heads"
SHIFTED = ("causal", "chunk-draft")  # need a model with a logit shift
READERS = ("draft", "query", "confidence", "attention", "heads", "bm25", *SHIFTED)


@dataclasses.dataclass
class Expected:
    """An answer. text_blocks: blocks up to the end of the text."""

    tokens: list[int]
    evaluations: int
    text_blocks: int
    chunks: list[int]
    scores: list[float] | None
    chunks_at_end: list[int] | None = None
    rescored: int | None = None


class Method(Cached):
    """The method with these settings. closest: the smallest gap that decided anything, relative to
    what is rounded.
    """

    def __init__(self, model, chunking: ChunkConfig, selection: SelectionConfig, bos: int):
        super().__init__(model)
        self.chunking, self.selection, self.bos = chunking, selection, bos
        self.size, self.mask = chunking.chunk_size, model.config.mask_token_id
        self.closest = math.inf

    def decided_by(self, gap: float) -> None:
        if gap > 1e-12:  # equal values are equal in float32 too
            self.closest = min(self.closest, gap)

    def predictions(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Likeliest token of each row and its log-probability, exact near 0."""
        tokens = logits.argmax(-1)
        two = np.sort(logits, axis=-1)[:, -2:]
        self.gaps = two[:, 1] - two[:, 0]
        others = [np.delete(x - x[i], i) for x, i in zip(logits, tokens, strict=True)]
        return tokens, -np.log1p(np.exp(others).sum(-1))

    # Steps 1 to 3: chunks, scores, selection.

    def read(self, prefix, context, query) -> None:
        self.prefix, self.query, self.p = list(prefix), list(query), len(prefix)
        self.chunks = split(list(context), self.chunking, self.bos)
        self.alone = self.nothing()
        if self.p:
            self.alone = self.rows(self.prefix, range(self.p))[1]
        passes = [
            self.rows(chunk, self.p + np.arange(len(chunk)), self.alone) for chunk in self.chunks
        ]
        self.last_rows, self.documents = zip(*[(x[-1:], kv) for x, kv in passes], strict=True)

    def draft(self, logits_of) -> tuple[list[int], list[int]]:
        """Tokens behind the query, and the slots that were denoised: 0, then the surest.

        logits_of: logits of query and tokens, which predict the tokens of their own rows.
        """
        scorer = self.selection.scorer
        tokens, done = [self.mask] * scorer.draft_length, list[int]()
        for step in range(scorer.draft_steps):
            guess, sure = self.predictions(logits_of(tokens)[-len(tokens) :])
            gaps = self.gaps
            left = [i for i in range(len(tokens)) if i not in done]
            slot = 0 if step == 0 else max(left, key=lambda i: sure[i])
            if step:
                self.rank_gaps(sure, [slot], [i for i in left if i != slot])
            self.decided_by(gaps[slot])
            tokens[slot] = int(guess[slot])
            done.append(slot)
        return tokens, done

    def without_chunks(self, tokens) -> np.ndarray:
        """Logits of prefix, query and tokens."""
        ids = [*self.prefix, *self.query, *tokens]
        logits = self.rows(ids, range(len(ids)))[0]
        return self.predicting(logits, logits[:1])

    def rank_gaps(self, log, taken, others) -> None:
        if taken and others:
            low, high = min(log[i] for i in taken), max(log[i] for i in others)
            self.decided_by((low - high) / min(1.0, abs(high)))

    def scores(self, response=None, block=None) -> np.ndarray:
        """Of every chunk for the question, or for the response so far."""
        name, q, n_chunks = self.selection.scorer.name, len(self.query), len(self.documents)
        open_slots = None
        if response is not None:
            tail = list(response)
            done = [i for i, token in enumerate(tail) if token != self.mask]
            open_slots = [q + i for i in block if tail[i] == self.mask]
        elif name in ("draft", "causal"):
            tail, done = self.draft(self.without_chunks)
        elif name == "confidence":
            tail, done = [self.mask] * self.selection.scorer.draft_length, []
            open_slots = [q + i for i in range(len(tail))]
        else:
            tail, done = [], []
        slots = [*self.query, *tail]
        scored = [*range(q), *(q + i for i in sorted(done))]
        if name == "bm25":
            texts = [chunk[int(self.chunking.anchors) :] for chunk in self.chunks]
            return bm25([slots[i] for i in scored], texts)
        if name in ("attention", "heads"):
            position = self.p + self.size + np.arange(len(slots))
            sums = []
            for kv in self.documents:
                self.rows(slots, position, self.alone, kv)
                to_chunk = self.attention_scores[:, :, scored, self.p : self.p + len(kv)]
                sums.append(np.exp(SHARPNESS * to_chunk).sum(axis=-1))
            shares = (np.array(sums) / np.sum(sums, axis=0)).mean(axis=3)  # [N, L, H]
            if name == "attention":
                return shares.mean(axis=(1, 2))
            return np.mean([shares[:, i, j] for i, j in self.selection.scorer.heads], axis=0)
        if name == "query":
            scored = scored[:q]
        if name == "chunk-draft":
            response = None if response is None else (tail, done)
            return np.array([self.own_draft_score(i, response) for i in range(n_chunks)])
        return np.array([self.score(c, name, slots, scored, open_slots) for c in range(n_chunks)])

    def score(self, chunk: int, name, slots, scored, open_slots) -> float:
        position = self.p + self.size + np.arange(len(slots))

        def log_p(ids, sees=True) -> np.ndarray:
            logits = self.rows(ids, position, self.alone, self.documents[chunk], sees=sees)[0]
            return self.log_softmax(self.predicting(logits, self.last_rows[chunk]))

        if name == "confidence":
            return float(log_p(slots)[open_slots].max(-1).mean())
        if name == "causal":
            return log_p(slots, np.tri(len(slots), dtype=bool))[
                scored, np.array(slots)[scored]
            ].mean()
        copies, total = self.selection.scorer.masked_copies or len(scored), 0.0
        for r in range(copies):
            hidden = scored[r::copies]
            log = log_p([self.mask if i in hidden else token for i, token in enumerate(slots)])
            total += sum(log[i, slots[i]] for i in hidden)
        return total / len(scored)

    def own_draft_score(self, chunk: int, response) -> float:
        """As "causal", with KV that has seen query and masks, and the draft that they make."""
        ids, p, q, size = self.chunks[chunk], self.p, len(self.query), self.size
        masks = self.selection.scorer.draft_length if response is None else len(response[0])
        behind = p + size + np.arange(q + masks)
        position = np.concatenate([range(p), p + np.arange(len(ids)), behind])
        everything = [*self.prefix, *ids, *self.query, *[self.mask] * masks]
        logits, kv = self.rows(everything, position)
        kv = kv[: p + len(ids)]
        # One pass: what the draft's first tokens are does not change the others.
        guesses = self.predicting(logits, logits[:1])
        tail, done = self.draft(lambda _: guesses) if response is None else response
        last, _ = self.rows(ids[-1:], position[[p + len(ids) - 1]], kv, sees=False)
        slots = [*self.query, *tail]
        logits, _ = self.rows(slots, behind, kv, sees=np.tri(len(slots), dtype=bool))
        log = self.log_softmax(self.predicting(logits, last))
        return np.mean([log[i, slots[i]] for i in [*range(q), *(q + i for i in done)]])

    def select(self, scores: np.ndarray) -> list[int]:
        """The top_k best, up to max_k of those within the margin of the last of these."""
        s, scale = self.selection, 1.0
        if s.scorer.name in ("attention", "heads"):
            scale = 0.02
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        if s.keep_first:
            order.remove(0)
            order.insert(0, 0)
        kept, rest = order[: s.top_k], order[s.top_k :]
        last = math.inf if s.keep_first and s.top_k == 1 else scores[kept[-1]]
        if s.max_k is not None:
            for i in rest:
                self.decided_by(abs(s.margin - (last - scores[i])) / scale)
            close = [i for i in rest if last - scores[i] <= s.margin]
            kept += close[: s.max_k - s.top_k]
            rest = close[s.max_k - s.top_k :]
        elif rest:
            self.decided_by((last - scores[rest[0]]) / scale)
        if s.max_k is not None and rest:
            self.decided_by((scores[kept[-1]] - scores[rest[0]]) / scale)
        return sorted(kept)

    # Steps 4 and 5: placement, encodings, kept tokens.

    def encode(self, chosen: list[int], response: list[int]) -> None:
        """Sets the KV that live rows attend to, and `live`, KV of query and response or None."""
        s, c, p = self.selection, self.size, self.p
        chunks = [self.chunks[i] for i in chosen]
        *before, tokens = itertools.accumulate(map(len, chunks), initial=0)
        starts, end = {
            "continuous": ([j * c for j in range(len(chosen))], len(chosen) * c),
            "absolute": ([i * c for i in chosen], len(self.chunks) * c),
            "reuse": ([0] * len(chosen), c),
            "contiguous": (before, tokens),
        }[s.positions]
        starts, live_ids = [p + start for start in starts], [*self.query, *response]
        self.position = p + end + np.arange(len(live_ids))
        places = [start + np.arange(len(x)) for start, x in zip(starts, chunks, strict=True)]
        self.before, self.live = self.alone, None
        self.pool = [
            self.moved(self.documents[i], start - p)
            for i, start in zip(chosen, starts, strict=True)
        ]
        name = s.encoding.name
        if name == "joint":
            kv = self.joint(chunks, places, live_ids)
            ends = np.cumsum([p, *map(len, chunks), len(live_ids)])
            self.before = kv[:p]
            *self.pool, self.live = (kv[a:b] for a, b in itertools.pairwise(ends))
        elif name == "query-conditioned":
            for j, chunk in enumerate(chunks):
                at = [range(p), p + np.arange(len(chunk)), p + c + np.arange(len(self.query))]
                kv = self.rows([*self.prefix, *chunk, *self.query], np.concatenate(at))[1]
                self.pool[j] = self.moved(kv[p : p + len(chunk)], starts[j] - p)
        elif name == "bridge":
            self.bridge(chunks, places, live_ids)
        if s.keep_tokens is not None and s.keep_tokens < c:
            scores = [0.0] * len(chunks)
            if s.keep_by != "chunk-to-query":
                scores = self.received(live_ids)
            if s.keep_by != "query-to-chunk":
                given = self.given(chunks, places, live_ids)
                scores = [a + b for a, b in zip(scores, given, strict=True)]
            for j, score in enumerate(scores):
                seen = np.zeros(score.shape, bool)
                for layer, group in np.ndindex(*score.shape[:2]):
                    seen[layer, group, self.best(score[layer, group], s.keep_tokens)] = True
                kv = self.pool[j]
                self.pool[j] = KV(kv.k, kv.v, seen)

    def received(self, live_ids) -> list[np.ndarray]:
        """Attention that tokens of each kept chunk receive from the query, [L, G, c]."""
        self.rows(live_ids, self.position, join(self.before, *self.pool))
        return self.pooled(self.weights[:, :, self.last_rows_of_query()].sum(axis=2))

    def given(self, chunks, places, live_ids) -> list[np.ndarray]:
        """Attention that they give to the query, in a joint forward."""
        self.joint(chunks, places, live_ids)
        last = self.p + sum(map(len, chunks)) + self.last_rows_of_query()
        return self.pooled(self.weights[..., last].sum(axis=-1))

    def joint(self, chunks, places, live_ids) -> KV:
        ids = [*self.prefix, *(t for chunk in chunks for t in chunk), *live_ids]
        return self.rows(ids, np.concatenate([range(self.p), *places, self.position]))[1]

    def last_rows_of_query(self) -> np.ndarray:
        return np.arange(max(0, len(self.query) - 8), len(self.query))

    def pooled(self, attention: np.ndarray) -> list[np.ndarray]:
        """Of rows from the prefix on, [L, H, rows], to [L, G, c] for each kept chunk."""
        config, end, result = self.config, self.p, []
        for n in map(len, self.pool):
            part = attention[..., end : end + n]
            widest = [part[..., max(0, i - 3) : i + 4].max(-1) for i in range(n)]
            heads = np.stack(widest, -1).reshape(config.n_layers, config.n_kv_heads, -1, n)
            result.append(heads.mean(axis=2))
            end += n
        return result

    def best(self, received: np.ndarray, count: int) -> list[int]:
        order = sorted(range(len(received)), key=lambda i: (-received[i], i))
        if self.chunking.anchors:
            order.remove(0)
            order.insert(0, 0)
        if 0 < count < len(order):
            low, high = received[order[count - 1]], received[order[count]]
            if order[count - 1] != 0 or not self.chunking.anchors:
                self.decided_by((low - high) / low)
        return sorted(order[:count])

    def bridge(self, chunks, places, live_ids) -> None:
        encoding = self.selection.encoding
        count = math.ceil(encoding.share * self.size)
        again = [list(range(min(count, len(chunk)))) for chunk in chunks]
        if encoding.tokens == "attention":
            means = [x.mean(axis=(0, 1)) for x in self.received(live_ids)]
            again = [self.best(mean, count) for mean in means]
        kept = [
            kv[[i for i in range(len(kv)) if i not in new]]
            for kv, new in zip(self.pool, again, strict=True)
        ]
        ids = [chunk[i] for chunk, new in zip(chunks, again, strict=True) for i in new]
        at = [place[new] for place, new in zip(places, again, strict=True)]
        position = np.concatenate([*at, self.position])
        kv, end = self.rows([*ids, *live_ids], position, self.before, *kept)[1], 0
        for j, new in enumerate(again):
            old = self.pool[j]
            k, v = old.k.copy(), old.v.copy()
            k[:, new], v[:, new] = kv.k[:, end : end + len(new)], kv.v[:, end : end + len(new)]
            self.pool[j], end = KV(k, v, old.seen), end + len(new)
        self.live = kv[end:]

    # Step 6: denoising.

    def answer(
        self, prefix, context, query, config: DecodeConfig, *, oracle=None, drawn=None, most=0
    ) -> Expected:
        """drawn: scores of the scorer "random". most: chunks of the longest document beside it."""
        self.read(prefix, context, query)
        s, n = self.selection, len(self.chunks)
        name, everything = s.scorer.name, s.scorer.name == "all"
        everything |= name != "oracle" and max(most, n) <= s.top_k
        controls = {"first": -np.arange(n), "last": np.arange(n), "random": drawn}
        scores, again = None, s.reselect != "never" and not everything
        if everything:
            chosen = list(range(n))
        elif name == "oracle":
            chosen = sorted(set(oracle))
        else:
            scores = self.scores() if name in READERS else np.asarray(controls[name], float)
            chosen = self.select(scores)
        first, rescored = chosen, 0
        q, length, g = len(self.query), config.block_length, config.gen_length
        tokens, evaluations, block, text_blocks = [self.mask] * g, 0, 0, g // config.block_length
        self.encode(chosen, tokens)
        stale = self.live is None
        per_block = length if config.steps is None else config.steps // config.n_blocks
        scheduled = config.threshold is None and config.factor is None
        while block < text_blocks:
            in_block = range(block * length, (block + 1) * length)
            for step in range(per_block if scheduled else length):
                written = any(token != self.mask for token in tokens)
                if again and written and (step == 0 or s.reselect == "step"):
                    rescored += 1
                    best = self.select(self.scores(tokens, in_block))
                    if best != chosen:
                        chosen = best
                        self.encode(chosen, tokens)
                        stale = self.live is None
                wide = stale or config.recompute == "response"
                start = 0 if wide else q + in_block[0]
                end = q + in_block[-1] + 1 if config.recompute == "block" and not wide else q + g
                # The row in front of a narrow pass predicts a slot; its KV stays the stale one.
                front = max(0, start - self.net.shift)
                ids, past = [*self.query, *tokens][front:end], [self.before, *self.pool]
                if not wide:
                    past += [self.live[:start], self.live[end:]]
                fresh = np.arange(front, end) >= start
                logits, kv = self.rows(ids, self.position[front:end], *past, sees=fresh)
                kv = kv[fresh]
                self.live = kv if wide else join(self.live[:start], kv, self.live[end:])
                stale, evaluations = False, evaluations + 1
                slots = range(in_block[-1] + 1) if wide else in_block
                slots = [i for i in slots if tokens[i] == self.mask]
                guess, sure = self.predictions(
                    logits[[max(0, q + i - self.net.shift) - front for i in slots]]
                )
                for i in self.take(sure, config, step, per_block):
                    self.decided_by(self.gaps[i])
                    tokens[slots[i]] = int(guess[i])
                if all(tokens[i] != self.mask for i in in_block):
                    break
            block, stale = block + 1, True
            if any(tokens[i] in config.stop_ids for i in in_block):
                tokens[block * length :] = [self.config.eos_token_id] * (g - block * length)
                text_blocks = block
        scores = None if scores is None else scores.tolist()
        later = (chosen, rescored) if again else (None, None)
        return Expected(tokens, evaluations, text_blocks, first, scores, *later)

    def take(self, sure, config: DecodeConfig, step: int, steps: int) -> list[int]:
        """Which of the masked slots are unmasked, from log-probabilities."""
        order = sorted(range(len(sure)), key=lambda i: (-sure[i], i))
        count, share = 0, np.exp(sure)
        if config.threshold is not None:
            for i in order[1:]:
                self.decided_by(abs(share[i] - config.threshold))
            count = max(1, int((share >= config.threshold).sum()))
        elif config.factor is not None:
            count, failed = len(order) - 1, False
            for place, i in enumerate(order[1:], start=1):
                bound = 1 - config.factor / (place + 2)
                self.decided_by(abs(share[i] - bound))
                if share[i] < bound and not failed:
                    count, failed = place, True
            count += count in (0, len(order) - 1)
        else:
            count = config.block_length // steps + (step < config.block_length % steps)
        self.rank_gaps(sure, order[:count], order[count:])
        return order[:count]
