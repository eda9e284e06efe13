"""d2Cache (arXiv 2509.23094, and its authors' public code) in PyTorch, one prompt at a time.

Evaluation 0 runs all rows. At the end of each evaluation the rows of the next are chosen: masks
that are likely to be decoded soon, tokens just decoded, and rows that much attention goes to. The
cache is never dropped, and lives through all blocks.

Quirks of the public code, each a switch whose default is what its last versions do:

  refresh=False       The confidences that masks are chosen by are those of evaluation 0 for ever:
                      the mask of those to be replaced is false everywhere, and the assignment goes
                      to a copy. True replaces those of slots whose predicting row ran.
  stale=False         A slot whose predicting row did not run is not filled. In versions before
                      block diffusion came in that restriction was lost in a copy as well: True
                      gives such masks zero logits, so token 0 with probability 1 / V.
  prompt_row="chosen" Dream: the prompt's last row runs if and only if slot 0 is chosen, even when
                      attention alone would choose it. "union" leaves it to both.

Under Dream's shift the row *before* each chosen mask runs; the mask itself does not, unless it is
in front of another chosen one or attention chooses it.
"""

from __future__ import annotations

import itertools
import math

import torch

from tests.oracles import dream, generation
from tests.oracles.rivals.dkv_cache import Trace
from tests.oracles.rivals.rows import run_rows


def density(known: torch.Tensor, sigma: float) -> torch.Tensor:
    """Certainty density of every slot: the Gaussian-weighted share of known slots around it.

    known: bool [G]. On the left of the response G slots count as known; on the right G count as
    the last slot is. What is farther away counts as unknown: with G below about 4 sigma the density
    of a full response is below 1. The weights of distances -3 G .. 3 G - 1 sum to one.
    """
    size = len(known)
    value = torch.cat((torch.ones(size), known, known[-1:].expand(size))).double()
    total = sum(math.exp(-(d**2) / (2 * sigma**2)) for d in range(-3 * size, 3 * size))
    places = torch.arange(3 * size, dtype=torch.float64)
    shares = [
        (value * torch.exp(-((places - size - slot) ** 2) / (2 * sigma**2))).sum() / total
        for slot in range(size)
    ]
    return torch.stack(shares)


def rollout(weights: list[torch.Tensor], rows: torch.Tensor, length: int) -> torch.Tensor:
    """Importance [T] of every row: column sums of the attention rollout over all layers.

    weights: per layer [H, rows, T]. A row that did not run attends to itself.
    """
    one = torch.eye(length, dtype=weights[0].dtype)
    product = one
    for layer in weights:
        attention = one.clone()
        attention[rows] = layer.mean(0)
        mixed = attention + one
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product.sum(0)


def nucleus(scores: torch.Tensor, candidates: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """The best candidates whose cumulated share stays <= p, at least one: bool [T].

    Also returns the smallest gap that decided: of a cumulated share to p, or of the last chosen
    share to the next.
    """
    shares = torch.where(candidates, scores, 0.0)
    shares = shares / (shares.sum() + 1e-9)
    values, order = shares.sort(descending=True, stable=True)
    taken = values.cumsum(0) <= p
    taken[0] = True
    chosen = torch.zeros_like(candidates)
    chosen[order[taken]] = True
    count, gap = int(taken.sum()), (values.cumsum(0) - p).abs().min()
    if count < len(values) and values[count] > 0:
        gap = torch.minimum(gap, values[count - 1] - values[count])
    return chosen & candidates, gap.item()


def inflate(chosen: torch.Tensor, window: int) -> torch.Tensor:
    """Fills the gaps between chosen rows that are at most `window` apart; bool [T]."""
    filled = chosen.clone()
    places = chosen.nonzero()[:, 0].tolist()
    for left, right in itertools.pairwise(places):
        if right - left <= window:
            filled[left:right] = True
    return filled


def searched(masked: torch.Tensor, start: int, block_length: int, count: int) -> torch.Tensor:
    """Masks [G] from the block's start to the end of the block with the count-th mask of all."""
    reached = (masked.cumsum(0) >= count).nonzero()[:, 0].tolist()
    last = reached[0] if reached else len(masked) - 1
    found = masked.clone()
    found[:start] = False
    found[(last // block_length + 1) * block_length :] = False
    return found


def generate(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    mask_id: int,
    shift: bool = False,
    rollout_p: float = 0.1,
    current_k: int = 32,
    sigma: float = 10.0,
    inflate_w: int = 0,
    prior_sigma: float | None = 10.0,
    threshold: float | None = None,
    top_p: float | None = None,
    refresh: bool = False,
    stale: bool = False,
    prompt_row: str = "chosen",
) -> Trace:
    """d2Cache's generation, temperature 0; prompt [P]. Dream if `shift`, else LLaDA.

    steps: over all blocks; an evaluation fills the quota of LLaDA's schedule, also on Dream, best
    first, and a block gets evaluations until it is full. threshold: fill instead all whose score is
    at least this, when these are not fewer than the quota.
    prior_sigma: the order of filling is by confidence times density (certainty prior); None by
    confidence alone. sigma: that of the choice of rows. top_p: 0.9 for Dream in the public
    configuration. The defaults are those of `configs/gen_args.py`, where block_length is
    gen_length; of the class, inflate_w is 4.
    """
    length, prompt_length = len(prompt) + gen_length, len(prompt)
    tokens = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
    sampler = dream.Sampler("maskgit_plus", top_p=top_p)
    trace, rule = Trace(tokens), generation.Rule(steps * block_length // gen_length)
    rows, cache, kept_confidence = torch.arange(length), None, None
    response = tokens[prompt_length:]  # A view.
    for start in range(0, gen_length, block_length):
        in_block = torch.zeros(gen_length, dtype=torch.bool)
        in_block[start : start + block_length] = True
        step = 0
        while bool(((masked := response == mask_id) & in_block).any()):
            result = run_rows(network, tokens, rows, cache)
            cache = result.cache
            ran = torch.zeros(length, dtype=torch.bool)
            ran[rows] = True
            logits, predicts = result.logits, ran[prompt_length:]
            if shift:
                logits, predicts = dream.shifted(logits), ran[prompt_length - 1 : -1]
            predicted, confidence = sampler.predict(logits[prompt_length:].double())
            fillable = masked if stale else masked & predicts

            scores = confidence
            if prior_sigma:
                scores = confidence * density(~masked, prior_sigma)
            candidates = (fillable & in_block).nonzero()[:, 0].tolist()
            quota = max(1, rule.schedule(block_length, step))
            if threshold is not None:
                quota = max(quota, sum(scores[slot].item() >= threshold for slot in candidates))
            filled = trace.choose(scores, candidates, quota)
            tokens[[prompt_length + slot for slot in filled]] = predicted[filled]
            trace.rows.append(rows.tolist())
            trace.filled.append([prompt_length + slot for slot in filled])

            if kept_confidence is None:
                kept_confidence = confidence.clone()
            elif refresh:
                replaced = masked & predicts
                kept_confidence[replaced] = confidence[replaced]
            left = response == mask_id
            chances = kept_confidence * density(~left, sigma)
            chances[in_block] += chances.max()
            found = searched(left, start, block_length, current_k).nonzero()[:, 0].tolist()
            soon = torch.zeros(gen_length, dtype=torch.bool)
            soon[trace.choose(chances, found, current_k)] = True

            chosen = torch.zeros(length, dtype=torch.bool)
            if shift:
                chosen[prompt_length:-1] = soon[1:]
            else:
                chosen[prompt_length:] = soon
            chosen[[prompt_length + slot for slot in filled]] = True
            importance = rollout(result.weights, rows, length)
            attended, gap = nucleus(importance, ~chosen, rollout_p)
            trace.closest = min(trace.closest, gap)
            chosen |= attended
            if shift and (prompt_row == "chosen" or soon[0]):
                chosen[prompt_length - 1] = soon[0]
            rows = inflate(chosen, inflate_w).nonzero()[:, 0]
            step += 1
            assert step <= block_length + steps, "masks predicted: the published loop never ends"
    return trace
