"""dKV-Cache's Decode and Greedy (arXiv 2505.15781, and its authors' public code) in PyTorch.

Keys and values settle only after a token is decoded, so they are cached one step late. In the code
a cached row is one that is not given to the network; every other row is recomputed. So "cached"
here is a set of rows, and the cache holds keys and values of all rows as they were computed last.

Quirks of the code that change tokens, all reproduced:

  Decode on LLaDA drops the cache at every block; evaluations 0 and 1 of a block are full.
  Decode on Dream has no blocks. Under the shift a row may be cached when the token that it
    predicts, the next one, is decoded ("un"). The last row predicts nothing and follows the first
    token of the prompt: from evaluation 2 on its keys and values are those of a mask, until the
    next refresh. A decoded token in front of a mask is recomputed at every step.
  Greedy draws the order of the slots of a block before the block starts. The public code has it
    for LLaDA alone. Its file of the network was not to be had: that what a step recomputes stays in
    the cache is from the paper. With an interval of 2, the script's, it makes no difference.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch

from tests.oracles import dream, generation
from tests.oracles.rivals.rows import run_rows


@dataclasses.dataclass
class Trace:
    """The response's tokens [prompt + G], and of every evaluation the rows that were recomputed.

    filled: positions that became final in each evaluation, rising.
    closest: the smallest gap of scores that decided anything; see `choose`.
    """

    tokens: torch.Tensor
    rows: list[list[int]] = dataclasses.field(default_factory=list)
    filled: list[list[int]] = dataclasses.field(default_factory=list)
    closest: float = math.inf

    def choose(self, scores: torch.Tensor, slots: list[int], count: int) -> list[int]:
        """The `count` best of these slots, the first of equal ones first; scores: of all slots."""
        slots = sorted(slots, key=lambda slot: -scores[slot].item())
        if 0 < count < len(slots):
            gap = scores[slots[count - 1]] - scores[slots[count]]
            self.closest = min(self.closest, gap.item())
        return slots[:count]


def _where(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero()[:, 0]


def decode_llada(
    network: generation.Network, prompt: torch.Tensor, *, interval: int = 8, **settings: Any
) -> Trace:
    """dKV-Cache-Decode for LLaDA with low-confidence remasking; prompt [P].

    interval: `cache_reloading_step`; 1 recomputes everything at every step. settings: of
    `generation.Generated`; a threshold or a factor is not in the public code.
    """
    run = generation.Generated(prompt[None], **settings)
    trace = Trace(run.tokens[0])
    every = torch.arange(len(trace.tokens))
    for start, stop in run.blocks:
        masked = run.is_masked(start, stop).sum(1).tolist()
        cache, step = None, 0
        known: list[torch.Tensor] = []  # After every evaluation of the block.
        while run.rule.goes_on(run.is_masked(start, stop), masked, step):
            full = step < 2 or step % interval == 0
            rows = every if full else _where(~known[step - 2])
            result = run_rows(network, trace.tokens, rows, cache)
            cache = result.cache
            before = trace.tokens.clone()
            run.take(result.logits[None], 0, stop, [run.rule.schedule(n, step) for n in masked])
            known.append(trace.tokens != run.mask_id)
            trace.rows.append(rows.tolist())
            trace.filled.append(_where(before != trace.tokens).tolist())
            step += 1
    return trace


def decode_dream(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    steps: int,
    mask_id: int,
    alg: str = "entropy",
    interval: int = 16,
    shift: str = "un",
    eps: float = 1e-3,
    **settings: Any,
) -> Trace:
    """dKV-Cache-Decode for Dream; prompt [P].

    interval: `cache_steps`, counted over the whole response. shift: `shift_type`; "un", "un_right"
    (a row needs its own token decoded too) or "right" (its own alone, which reads logits of cached
    rows: undefined, and refused here). settings: of `dream.Sampler`.
    """
    run, sampler = (
        dream.Generated.start(prompt, gen_length, mask_id),
        dream.Sampler(alg, **settings),
    )
    trace, every = Trace(run.tokens), torch.arange(len(run.tokens))
    times = torch.linspace(1, eps, steps + 1)

    def cacheable() -> torch.Tensor:
        known = run.tokens != mask_id
        if shift == "un":
            return torch.cat((known[1:], known[:1]))
        assert shift == "un_right", shift
        both = known[:-1] & known[1:]
        return torch.cat((both, both[-1:]))

    # The first evaluation caches rows before a prompt token; the last row only later.
    known = run.tokens != mask_id
    now, before, cache = torch.cat((known[1:], known[-1:])), None, None
    for step in range(steps):
        masks = run.masks()
        if not len(masks):
            break
        if step % interval == 0:
            before = None
        rows = every if before is None else _where(~before)
        result = run_rows(network, run.tokens, rows, cache, fill=-torch.inf)
        cache = result.cache
        old = run.tokens.clone()
        prediction = sampler.predict(dream.shifted(result.logits)[masks])
        run.fill(masks, prediction, dream.due(len(masks), times, step), sampler)
        before, now = now, cacheable()
        trace.rows.append(rows.tolist())
        trace.filled.append(_where(old != run.tokens).tolist())
    return trace


def nearest_masks(
    chosen: torch.Tensor, slots: list[int], masked: torch.Tensor, count: int
) -> torch.Tensor:
    """Adds to chosen [T], for each slot in turn, the `count` nearest masks that it lacks.

    At the same distance the one on the left is taken first.
    """
    chosen = chosen.clone()
    for slot in slots:
        free = _where(masked & ~chosen).tolist()
        free.sort(key=lambda row: (abs(row - slot), row > slot))
        chosen[[row for row in free if row != slot][:count]] = True
    return chosen


def greedy_llada(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    interval: int = 2,
    window: int = 4,
    priorities: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Trace:
    """dKV-Cache-Greedy for LLaDA: a random order that is known ahead; prompt [P].

    interval: `cache_reloading_step`. window: `window_size`, masks per slot to be decoded next.
    priorities: [blocks, T], a block decodes its slots in falling order of its row; None draws a row
    when its block starts, from `generator`.
    """
    length = len(prompt) + gen_length
    tokens = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
    trace, every = Trace(tokens), torch.arange(length)
    n_blocks = gen_length // block_length
    rule = generation.Rule(steps // n_blocks)
    for block in range(n_blocks):
        start = len(prompt) + block * block_length
        drawn = torch.rand(1, length, generator=generator) if priorities is None else None
        row = priorities[block] if drawn is None else drawn[0]
        order = start + row[start : start + block_length].sort(descending=True, stable=True).indices
        ends = [0]
        for step in range(rule.steps):
            ends.append(ends[-1] + rule.schedule(block_length, step))
        due = [order[a:b].tolist() for a, b in itertools.pairwise(ends)]
        cache, selected = None, torch.zeros(length, dtype=torch.bool)
        for step in range(rule.steps):
            rows = every if step % interval == 0 else _where(selected)
            masked = tokens == mask_id
            if len(rows):  # Nothing is due, now or next, when there are more steps than slots.
                result = run_rows(network, tokens, rows, cache)
                cache = result.cache
                tokens[due[step]] = result.logits.argmax(-1)[due[step]]
            trace.rows.append(rows.tolist())
            trace.filled.append(due[step])
            if step + 1 < rule.steps:
                selected = torch.zeros(length, dtype=torch.bool)
                selected[due[step] + due[step + 1]] = True
                selected = nearest_masks(selected, due[step + 1], masked, window)
    return trace
