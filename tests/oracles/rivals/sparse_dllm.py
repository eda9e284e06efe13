"""Sparse-dLLM (arXiv 2508.02558 and its public code): a pruned cache of what is outside the block.

Every block begins with an empty cache. Its steps 0 .. `delay` evaluate all rows. In the last of
these each layer scores the keys outside the block and keeps the share `keep_ratio` of them; that
step itself attends to all. The steps after it evaluate the block's rows, against the kept keys and
their own. Published: delay 1.

Score of a key: the mean over the heads of (mean query of the block's rows) . key, both rotated,
without scale and softmax, the query's head against its KV head; then a maximum over `kernel`
neighbours in the sequence without the block. One selection for all heads. The maximum makes equal
scores: of these torch.topk takes the lowest index on GPUs, any on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.oracles import dream, generation
from tests.oracles.rivals import parts


def select(
    run: parts.Run,
    q: torch.Tensor,
    k: torch.Tensor,
    outside: list[int],
    keep_ratio: float,
    kernel: int | None,
    torch_ties: bool,
) -> list[int]:
    """Positions kept: q [H, B, D] of the block's rows, k [H, n, D] of the positions `outside`."""
    score = (q.mean(1)[:, None] @ k.mT)[:, 0].mean(0)
    if kernel is not None:
        assert kernel % 2 == 1
        score = F.max_pool1d(score[None], kernel, stride=1, padding=kernel // 2)[0]
    count = int(len(outside) * keep_ratio)
    return [outside[i] for i in run.best(score, count, torch_ties)]


def generate(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    mask_id: int,
    keep_ratio: float = 0.5,
    kernel: int | None = 3,
    delay: int = 1,
    torch_ties: bool = False,
    alg: str = "entropy",
    eps: float = 1e-3,
    **settings: Any,
) -> parts.Run:
    """Generates greedily: LLaDA's linear schedule in a block, or Dream's for a `dream.Network`.

    prompt [P]; steps: of the whole response. alg, eps, settings (top_p, top_k): Dream's.

    LLaDA: a step that evaluates all rows may also fill masks in front of the block. Dream: step 0
    fills the block's first slot alone, whatever its confidence, and the schedule goes on at step 1;
    steps that evaluate the block alone shift inside it. `chosen` of the step that selects: for each
    layer the positions kept.
    """
    run, layers = parts.Run.start(prompt, gen_length, mask_id), parts.Layers(network)
    n_blocks = gen_length // block_length
    assert gen_length % block_length == 0
    assert steps % n_blocks == 0
    steps //= n_blocks
    assert steps >= 2 or not layers.shift, "Dream's step 0 fills one slot"
    total, times = len(run.tokens), torch.linspace(1, eps, steps + 1)
    sampler = dream.Sampler(alg, **settings)
    for start in range(run.prompt, total, block_length):
        stop, cache = start + block_length, {}
        masked = len(run.masks(start, stop))
        outside = [*range(start), *range(stop, total)]
        for step in range(steps):
            first, last = (0, total) if step <= delay else (start, stop)
            rows = torch.arange(first, last)
            run.steps.append(parts.Step([rows.tolist()] * layers.count))
            x = layers.embed(run.tokens[rows])
            for i in range(layers.count):
                q, k, v = layers.qkv(i, x, rows)
                if step == delay:
                    kept = select(
                        run,
                        q[:, start:stop],
                        k[:, outside],
                        outside,
                        keep_ratio,
                        kernel,
                        torch_ties,
                    )
                    run.steps[-1].chosen.append(kept)
                    cache[i] = k[:, kept], v[:, kept]
                elif step > delay:
                    k, v = (torch.cat(pair, 1) for pair in zip(cache[i], (k, v), strict=True))
                x = layers.finish(i, x, parts.weights(q, k) @ v)
            logits = layers.logits(x)
            if layers.shift:
                logits = dream.shifted(logits)
                masks = run.masks(start, stop) if step else torch.tensor([start])
                count = dream.due(len(masks), times, step) if step else 1
                prediction = sampler.predict(logits[masks - first])
            else:
                masks = run.masks(first, stop)
                count = parts.quota(masked, steps, step)
                prediction = parts.predict(logits[masks - first])
            run.fill(masks, prediction, min(count, len(masks)))
    return run
