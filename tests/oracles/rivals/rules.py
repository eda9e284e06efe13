"""Published sampling rules that take or give back slots, in PyTorch, one prompt, temperature 0.

`entropy_bound` is EB (arXiv 2505.24857), `klass` KLASS (arXiv 2511.05664 and its public code),
`wino` WINO (arXiv 2507.18578 and its public code), `credit` the credit decoder of dInfer (its
public code). All of them run the whole sequence in every evaluation, block by block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]
Slots = list[int]


@dataclasses.dataclass
class Run:
    """A response, all masks at first, and what every evaluation did.

    tokens [prompt + gen_length]. taken, masked_again: for each evaluation the slots, counted from
    the response's start, in rising order. closest: the smallest gap between a number and the bound
    or the rival that decided about it; rounding may decide where it is tiny.
    """

    tokens: torch.Tensor
    prompt_length: int
    block_length: int
    mask_id: int
    taken: list[Slots] = dataclasses.field(default_factory=list)
    masked_again: list[Slots] = dataclasses.field(default_factory=list)
    closest: float = math.inf

    @classmethod
    def start(cls, prompt: torch.Tensor, gen_length: int, block_length: int, mask_id: int) -> Run:
        assert gen_length % block_length == 0
        tokens = torch.cat((prompt, torch.full((gen_length,), mask_id)))
        return cls(tokens, len(prompt), block_length, mask_id)

    @property
    def evaluations(self) -> int:
        return len(self.taken)

    def blocks(self) -> list[tuple[int, int]]:
        """First and last position (exclusive) of every block."""
        starts = range(self.prompt_length, len(self.tokens), self.block_length)
        return [(start, start + self.block_length) for start in starts]

    def masks(self, start: int, stop: int) -> torch.Tensor:
        """Positions of the masks in this span, rising."""
        return start + (self.tokens[start:stop] == self.mask_id).nonzero()[:, 0]

    def take(self, positions: torch.Tensor, prediction: torch.Tensor) -> None:
        """Writes the predictions, of all positions, at these, and notes the evaluation."""
        self.tokens[positions] = prediction[positions]
        self.taken.append(sorted((positions - self.prompt_length).tolist()))
        self.masked_again.append([])

    def decided(self, *gaps: float) -> None:
        self.closest = min([self.closest, *(abs(gap) for gap in gaps)])

    def best(self, confidence: torch.Tensor, positions: torch.Tensor, n: int) -> torch.Tensor:
        """The n positions of highest confidence; confidence is one of every position."""
        values, order = confidence[positions].sort(descending=True, stable=True)
        if 0 < n < len(order):
            self.decided(float(values[n - 1] - values[n]))
        return positions[order[:n]]


def _due(block_length: int, steps: int, step: int) -> int:
    return block_length // steps + (step < block_length % steps)


def entropy_bound(
    forward: Forward,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    mask_id: int,
    gamma: float = 0.001,
    order: Literal["confidence", "entropy"] = "confidence",
    subtract: Literal["largest", "last"] = "largest",
) -> Run:
    """EB: the most slots, best first, whose summed entropy less the largest is at most gamma.

    order: of the slots, by the predicted token's probability (d2Cache's code) or by entropy (one of
    the paper's proxies). subtract: the largest entropy of the slots so far, as in the paper, or
    that of the last slot: d2Cache takes the running maximum along the batch, which for one request
    is the entropy itself. With order "entropy" both are the same. At least one slot is taken.
    """
    run = Run.start(prompt, gen_length, block_length, mask_id)
    for start, stop in run.blocks():
        for _ in range(block_length):
            masks = run.masks(start, stop)
            if not len(masks):
                break
            p = forward(run.tokens[None])[0].double().softmax(-1)
            confidence, prediction = p.max(-1)
            entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
            rank = confidence if order == "confidence" else -entropy
            ordered = run.best(rank, masks, len(masks))
            total = largest = 0.0
            count = 0
            for h in entropy[ordered].tolist():
                total, largest = total + h, max(largest, h)
                rest = total - (largest if subtract == "largest" else h)
                if count:
                    run.decided(rest - gamma)
                if rest > gamma:
                    break
                count += 1
            run.take(run.best(rank, masks, max(1, count)), prediction)
    return run


def klass(
    forward: Forward,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    mask_id: int,
    steps: int | None = None,
    confidence_threshold: float = 0.9,
    kl_threshold: float = 0.01,
    history: int = 2,
    strict: bool = True,
    waits: bool = True,
) -> Run:
    """KLASS: all sure slots whose distribution has settled; if there are none, the scheduled best.

    A slot has settled when KL(now || evaluation before) was below kl_threshold in the last
    `history` evaluations, this one included. Probabilities are those of every position, masked or
    not, and are carried from block to block; before the first evaluation they are zeros.

    steps: of the whole response; a block gets its share of them and no more (default: one a slot).
    With fewer, the published code overwrites other slots where fewer masks remain than are due.
    strict: confidence > threshold, as in the code for LLaDA; the code for Dream and d2Cache's have
    >=. waits: nothing has settled in the first history - 1 evaluations of a block, as in the code
    for LLaDA; d2Cache's code has no such rule.
    """
    run = Run.start(prompt, gen_length, block_length, mask_id)
    share = (steps or gen_length) * block_length // gen_length
    divergences = [torch.zeros(len(run.tokens), dtype=torch.float64)] * history
    before = torch.zeros((), dtype=torch.float64)
    for start, stop in run.blocks():
        for step in range(share):
            masks = run.masks(start, stop)
            if not len(masks):
                break
            p = forward(run.tokens[None])[0].double().softmax(-1)
            kl = (p * ((p + 1e-12).log() - (before + 1e-12).log())).sum(-1)
            divergences = [*divergences[1:], kl]
            before = p
            confidence, prediction = p.max(-1)
            ready = []
            for i in masks.tolist():
                sure = confidence[i] > confidence_threshold
                sure |= (not strict) & (confidence[i] == confidence_threshold)
                settled = all(kl[i] < kl_threshold for kl in divergences)
                run.decided(float(confidence[i]) - confidence_threshold)
                run.decided(*(float(kl[i]) - kl_threshold for kl in divergences))
                if sure and settled and not (waits and step < history - 1):
                    ready.append(i)
            count = min(_due(block_length, share, step), len(masks))
            chosen = torch.tensor(ready) if ready else run.best(confidence, masks, count)
            run.take(chosen, prediction)
    return run


def credit(
    forward: Forward,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    mask_id: int,
    threshold: float = 0.9,
    alpha: float = 0.7,
    gamma: float = 0.2,
    beta: float = 0.8,
    never_masks: bool = True,
) -> Run:
    """dInfer's credit: tokens that were likeliest before get higher logits.

    Every evaluation of a block multiplies the credit of each slot and token by beta, adds p^gamma
    to that of each masked slot's likeliest token (p: its probability without credit), and decides
    by the logits + alpha log(credit + 1): all slots with at least the threshold, or within 1e-5 of
    the best. Credit starts at zero in every block. Everything is float32, as published.

    never_masks: a slot that predicts the mask token is not taken.
    """
    run = Run.start(prompt, gen_length, block_length, mask_id)
    for start, stop in run.blocks():
        credits: torch.Tensor | None = None
        while len(masks := run.masks(start, stop)):
            logits = forward(run.tokens[None])[0].float()
            p, likeliest = logits.softmax(-1).max(-1)
            credits = torch.zeros_like(logits) if credits is None else credits * beta
            for i in masks.tolist():
                credits[i, likeliest[i]] += p[i] ** gamma
            confidence, prediction = (logits + alpha * (credits + 1).log()).softmax(-1).max(-1)
            candidates = [i for i in masks.tolist() if prediction[i] != mask_id or not never_masks]
            assert candidates, "mask tokens predicted: the published loop never ends"
            best = max(float(confidence[i]) for i in candidates)
            bound = min(threshold, best - 1e-5)
            chosen = [i for i in candidates if float(confidence[i]) >= bound]
            gaps = sorted((float(confidence[i]) - bound for i in candidates), reverse=True)
            run.decided(*gaps[bound < threshold :])
            run.take(torch.tensor(chosen), prediction)
            assert run.evaluations <= gen_length, "mask tokens predicted"
    return run


def wino(
    forward: Callable[..., torch.Tensor],
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    mask_id: int,
    threshold: float = 0.6,
    threshold_back: float = 0.9,
) -> Run:
    """WINO: takes slots generously, and masks those again that verification finds unlikely.

    Behind the response stands a copy of the block, all masks, at the block's positions: a row of it
    sees everything but its own slot of the block, and nothing else sees the copy. So it says how
    likely the token of its slot is, given the others. forward(ids, position_ids, mask) -> logits,
    mask additive; LLaDA's order of rows (no shift).

    Taken: masks with p > threshold, or the likeliest; if these are more than 0.7 of the masks (at
    least 5, at most 20), as many of the likeliest. Masked again, if more than one was taken: tokens
    of earlier evaluations that the copy gives p < threshold_back, but fewer than were taken in the
    evaluation before (30 before a block's first): the least likely of them.
    """
    run = Run.start(prompt, gen_length, block_length, mask_id)
    length = len(run.tokens)
    copy = torch.full((block_length,), mask_id)
    for start, stop in run.blocks():
        positions = torch.cat((torch.arange(length), torch.arange(start, stop)))
        sees = torch.ones(length + block_length, length + block_length, dtype=torch.bool)
        sees[:length, length:] = False
        for i in range(block_length):
            sees[length + i, start + i] = False
        additive = torch.where(sees, 0.0, -torch.inf)[None, None]
        # A mask token that was predicted is a token while its block lasts, then a mask again.
        masked = run.tokens == mask_id
        masked[stop:] = False
        accepted_before = 30
        while masked.any():
            ids = torch.cat((run.tokens, copy))
            p = forward(ids[None], positions[None], additive)[0].double().softmax(-1)
            confidence, prediction = p[:length].max(-1)
            masks = masked.nonzero()[:, 0]
            most = min(max(int(torch.tensor(len(masks)) * 0.7), 5), 20)
            sure = masks[confidence[masks] > threshold]
            run.decided(*(confidence[masks] - threshold).tolist())
            if len(sure) > most:
                sure = run.best(confidence, masks, most)
            elif not len(sure):
                sure = run.best(confidence, masks, 1)
            placed = [i for i in range(start, stop) if not masked[i]]
            verified = {i: float(p[length + i - start, run.tokens[i]]) for i in placed}
            run.take(sure, prediction)
            masked[sure] = False
            doubtful: list[int] = []
            if len(sure) > 1:
                doubtful = [i for i in placed if verified[i] < threshold_back]
                run.decided(*(value - threshold_back for value in verified.values()))
                if len(doubtful) >= accepted_before:
                    doubtful = sorted(placed, key=verified.__getitem__)[: accepted_before - 1]
            run.tokens[doubtful] = mask_id
            masked[doubtful] = True
            run.masked_again[-1] = sorted(i - run.prompt_length for i in doubtful)
            accepted_before = len(sure)
            assert run.evaluations < 8 * gen_length, "the published loop does not end"
    return run
