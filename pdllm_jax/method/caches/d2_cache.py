"""d2Cache (arXiv 2509.23094): each evaluation chooses the rows that the next one recomputes.

Taken from the paper and the behaviour of the authors' public code. The first evaluation recomputes
everything. The rows of the next one are

  soon      the `current_k` masks of the highest confidence x density, from the block's start to the
            end of the block that holds the `current_k`-th mask; the current block's come first.
            For Dream the rows in front of them, which predict them.
  decoded   the tokens that were just unmasked.
  attended  of all other rows, those of the largest attention rollout: their cumulated share of it
            stays within `rollout_p`; at least one.

The density of a slot is the Gaussian-weighted share of known slots around it. Slots are unmasked in
the order of confidence x density too (certainty prior), so a block may be the whole response.

The attention rollout is a product of T x T matrices. Only its column sums are read, so a vector is
carried from the last layer to the first. Held are the queries of all layers, but no T x T matrix:
so the method has no longest prompt.

Reproduced: the public code never refreshes the confidences that "soon" is chosen by, because its
mask of those to be replaced is false everywhere and the assignment goes to a copy. They stay as the
first evaluation gave them (`refresh_confidence` False). With True they are those of the last
evaluation that predicted the slot. For Dream the prompt's last row is recomputed if, and only if,
slot 0 is chosen. Older versions of the code may also unmask a slot whose row was not recomputed, by
logits that are zero: `zero_logits`. Not reproduced: rows that top up the shorter requests of a
batch; every request gets its own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Partial
from pallas_kernels.chunk_attention.dense import BLOCK_SCORES
from pdllm_jax.method.cache import DenoiseState, LiveCache, dynamic_updates
from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.chosen_rows import rows_of_slots, run_rows
from pdllm_jax.method.live_forward import live_positions
from pdllm_jax.method.sampling import rank
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.rules import COUNT, POSITIVE, SIZE, SWITCH, UNIT, validate

if TYPE_CHECKING:
    from pdllm_jax.decoding import DecodeConfig
    from pdllm_jax.method.step import Step
    from pdllm_jax.network.transformer import MaskPredictor

_LEAST = 1e-30  # of a density, whose logarithm is finite


@dataclasses.dataclass(frozen=True)
class D2Cache(CacheMethod):
    """d2Cache; the defaults are those of the published runs, whose block is the whole response.

    rollout_p: share of the attention rollout that the attended rows hold.
    current_k: masks that are recomputed.
    sigma: of the density that chooses them, in slots.
    inflate_w: the rows between two chosen ones that are at most this far apart are recomputed too.
    prior_sigma: of the density that the order of unmasking is weighted by; None for no weight.
    refresh_confidence: whether the confidences that choose masks are renewed.
    zero_logits: whether masks that were not recomputed may be unmasked, with logits of zero: all
      words are equally likely, and the first one is predicted.
    """

    name: ClassVar[str] = "d2-cache"
    may_lack: ClassVar[bool] = True
    rollout_p: float = 0.1
    current_k: int = 32
    sigma: float = 10.0
    inflate_w: int = 0
    prior_sigma: float | None = 10.0
    refresh_confidence: bool = False
    zero_logits: bool = False

    def __post_init__(self) -> None:
        rules = {"rollout_p": UNIT, "current_k": SIZE, "sigma": POSITIVE, "inflate_w": COUNT}
        rules |= {"prior_sigma": POSITIVE, "refresh_confidence": SWITCH, "zero_logits": SWITCH}
        validate(self, rules)

    @classmethod
    def in_blocks(cls) -> D2Cache:
        """Returns the method as its authors advise it for blocks of 32 slots."""
        return cls(inflate_w=4)

    def scratch(self, model: ModelConfig, config: DecodeConfig, rows: int, itemsize: int) -> int:
        # The queries of all layers, which the rollout reads.
        return model.n_layers * rows * model.n_heads * model.head_dim * itemsize

    def start(self, model: MaskPredictor, state: DenoiseState, config: DecodeConfig) -> Any:
        """Returns which rows are recomputed next, confidences of slots, and importance of rows."""
        batch, slots = state.tokens.shape
        rows = state.query.shape[1] + slots
        valid = jnp.arange(rows) < state.placement.total[:, None]
        return valid, jnp.zeros((batch, slots)), jnp.zeros((batch, rows))

    def sizes(self, state: DenoiseState) -> tuple[int, ...]:
        """Returns the rows of the passes, ascending.

        The attended ones are at most rollout_p of all, because the largest come first. The same
        number again as masks leaves room for decoded and filled-in rows.
        """
        everything = state.query.shape[1] + state.tokens.shape[1]
        few = 2 * self.current_k + int(self.rollout_p * everything) + 2
        return (few, everything) if few < everything else (everything,)

    def widths(self, state: DenoiseState, config: DecodeConfig) -> tuple[int, ...]:
        return tuple(range(len(self.sizes(state))))

    def width(self, step: Step) -> Int[Array, "B"]:
        count = jnp.count_nonzero(step.state.memory[0], axis=1)[:, None]
        return (count > jnp.array(self.sizes(step.state)[:-1], int)).sum(axis=1)

    def evaluate(self, step: Step, width: int) -> Evaluation:
        state = step.state
        chosen, kept, _ = state.memory

        def hook(layer: int, q: Array, seen: Partial, carry: Any) -> Any:
            return (*carry, (q, seen.lse))

        run = run_rows(step, chosen, self.sizes(state)[width], hook, ())
        importance = _rollout(step, run.live, run.rows, run.carry)
        renewed = (state.evaluations == 0)[:, None]
        if self.refresh_confidence:
            renewed |= run.predicted.confidence > -jnp.inf
        kept = jnp.where(renewed, jnp.exp(run.predicted.confidence), kept)
        tokens, confidence, log_p, reading = run.predicted
        if self.zero_logits:
            unread = self.with_unread(step, tokens, confidence, log_p)
            tokens, confidence, log_p = unread
        if self.prior_sigma is not None:
            known = state.tokens != step.model.config.mask_token_id
            confidence += jnp.log(jnp.maximum(density(known, self.prior_sigma), _LEAST))
        count = jnp.count_nonzero(chosen, axis=1)
        memory = chosen, kept, importance
        return Evaluation(tokens, confidence, log_p, reading, count, run.live, memory)

    def with_unread(
        self, step: Step, tokens: Array, confidence: Array, log_p: Array
    ) -> tuple[Array, Array, Array]:
        """Returns predictions with those of zero logits for masks that have none."""
        words = step.model.config.embedding_size
        zeros, first = jnp.zeros((len(tokens), 1, words)), jnp.zeros_like(step.first)
        blank = step.masked & (confidence == -jnp.inf)
        filled = [
            jnp.where(blank, new[:, :1], old)
            for new, old in zip(
                step.predict(zeros, first)[:3], (tokens, confidence, log_p), strict=True
            )
        ]
        return filled[0], filled[1], filled[2]

    def update(self, step: Step, after: DenoiseState) -> Any:
        """Returns the memory with the rows of the next evaluation."""
        _, kept, importance = after.memory
        row = jnp.arange(step.rows.shape[1])
        valid = row < after.placement.total[:, None]
        soon = self.soon(step, after, kept)
        decoded = jnp.zeros(valid.shape, bool)
        decoded = dynamic_updates(
            decoded, step.state.query_length, after.tokens != step.state.tokens
        )
        if step.model.lookback:
            # The row in front of the response is left to attention, and then set by slot 0 alone.
            front = row == step.state.query_length[:, None] - 1
            chosen = decoded | (rows_of_slots(step, soon) & ~front)
            chosen |= self.attended(importance, valid & ~chosen)
            chosen = jnp.where(front, soon[:, :1], chosen)
        else:
            chosen = decoded | rows_of_slots(step, soon)
            chosen |= self.attended(importance, valid & ~chosen)
        return _filled(chosen, self.inflate_w), kept, importance

    def soon(
        self, step: Step, after: DenoiseState, kept: Float[Array, "B G"]
    ) -> Bool[Array, "B G"]:
        """Returns the masked slots that are recomputed next."""
        masked = after.tokens == step.model.config.mask_token_id
        length, slots = step.config.block_length, masked.shape[1]
        reached = jnp.cumsum(masked, axis=1) >= self.current_k
        last = jnp.where(reached.any(axis=1), jnp.argmax(reached, axis=1), slots - 1)
        end = (last // length + 1) * length
        slot = jnp.arange(slots)
        searched = masked & (slot >= step.first[:, None]) & (slot < end[:, None])
        chance = kept * density(~masked, self.sigma)
        chance += jnp.where(step.in_block, chance.max(axis=1, keepdims=True), 0)
        return searched & (rank(jnp.where(searched, chance, -jnp.inf)) < self.current_k)

    def attended(
        self, importance: Float[Array, "B R"], candidates: Bool[Array, "B R"]
    ) -> Bool[Array, "B R"]:
        """Returns the candidates whose cumulated share is within rollout_p, and the best one."""
        if self.rollout_p >= 1:
            return candidates
        share = jnp.where(candidates, importance, 0)
        share /= share.sum(axis=1, keepdims=True) + 1e-9
        best = jnp.cumsum(-jnp.sort(-share, axis=1), axis=1) <= self.rollout_p
        best = best.at[:, 0].set(True)
        return candidates & jnp.take_along_axis(best, rank(share), axis=1)


def density(known: Bool[Array, "B G"], sigma: float) -> Float[Array, "B G"]:
    """Returns the Gaussian-weighted share of known slots around each slot.

    As published: the G slots before the response count as known, the G slots behind it as the last
    slot is, all farther ones as unknown; and weights of the distances -3 G to 3 G - 1 sum to one.
    """
    slots = known.shape[1]
    weights = np.exp(-(np.arange(-3 * slots, 3 * slots) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    near = weights[2 * slots : 4 * slots + 1]  # of the distances -G to G
    ends = np.cumsum(np.append(0, weights))

    def mass(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Weight of the distances first to last."""
        return ends[last + 3 * slots + 1] - ends[first + 3 * slots]

    slot = np.arange(slots)
    before = mass(-slots - slot, -1 - slot)
    behind = mass(slots - slot, 2 * slots - 1 - slot)
    distance = jnp.arange(slots) - jnp.arange(slots)[:, None]
    kernel = jnp.asarray(near, jnp.float32)[distance + slots]
    inside = jnp.where(known[:, None], kernel, 0).sum(axis=-1)
    last = known[:, -1:]
    return inside + jnp.asarray(before, jnp.float32) + last * jnp.asarray(behind, jnp.float32)


def _filled(chosen: Bool[Array, "B R"], width: int) -> Bool[Array, "B R"]:
    """Fills the gaps between chosen rows that are at most `width` apart."""
    if width < 2:
        return chosen
    row, rows = jnp.arange(chosen.shape[1]), chosen.shape[1]
    before = lax.cummax(jnp.where(chosen, row, -rows), axis=1)
    behind = lax.cummin(jnp.where(chosen, row, 2 * rows), axis=1, reverse=True)
    return behind - before <= width


def _rollout(
    step: Step,
    live: LiveCache | None,
    rows: Int[Array, "B n"],
    seen: tuple[tuple[Float[Array, "B n H D"], Float[Array, "B H n"]], ...],
) -> Float[Array, "B R"]:
    """Returns the column sums of the attention rollout over all layers.

    A layer's matrix is (E + I) / 2, where E has the attention of the rows that ran, averaged over
    heads; other rows attend to themselves. A row vector of ones goes through the layers' matrices,
    the last layer's first.

    rows: of the pass, see `RowsPass`. seen: of each layer the queries, unrotated, and the
      log-sum-exp of their scores.
    """
    assert live is not None
    placement, count = step.state.placement, live.k[0].shape[1]
    valid = jnp.arange(count) < placement.total[:, None]
    batch = jnp.arange(len(rows))[:, None]
    by = rotation(step.model.config, live_positions(placement, rows))
    ran = jnp.zeros(valid.shape, bool).at[batch, rows].set(True, mode="drop")
    sums = valid.astype(jnp.float32)
    for (q, lse), k in zip(reversed(seen), reversed(live.k), strict=True):
        weight = sums.at[batch, rows].get(mode="fill", fill_value=0)
        mass = _weighted_attention(rotate(q, by), k, lse, weight)
        sums = jnp.where(ran, sums / 2, sums) + jnp.where(valid, mass / 2, 0)
    return sums[:, : step.rows.shape[1]]


def _weighted_attention(
    q: Float[Array, "B n H D"],
    k: Float[Array, "B S G D"],
    lse: Float[Array, "B H n"],
    weight: Float[Array, "B n"],
) -> Float[Array, "B S"]:
    """Returns the attention that each key receives, summed over rows by weight; mean of heads.

    Rows go in blocks, so that their scores stay small.
    """
    batch, rows, heads, dim = q.shape
    groups, keys = k.shape[2], k.shape[1]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def block(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        q, lse, weight = part  # [B, t, G, H / G, D], [B, t, G, H / G], [B, t]
        scores = jnp.einsum(
            "btgrd,bsgd->btgrs", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        weights = jnp.exp(scores * dim**-0.5 - lse[..., None]).sum(axis=(2, 3))
        return total + jnp.where(weight[..., None] > 0, weights * weight[..., None], 0).sum(1), None

    count = -(-rows // max(16, BLOCK_SCORES // (batch * heads * keys)))

    def parts(x: Array) -> Array:
        padding = ((0, 0), (0, -rows % count), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, padding)
        return x.reshape(batch, count, -1, *x.shape[2:]).swapaxes(0, 1)

    lse = lse.transpose(0, 2, 1).reshape(batch, rows, groups, -1)
    split = parts(q.reshape(batch, rows, groups, -1, dim)), parts(lse), parts(weight)
    total, _ = lax.scan(block, jnp.zeros((batch, keys), jnp.float32), split)
    return total / heads
