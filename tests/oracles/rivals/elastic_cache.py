"""Elastic-Cache (arXiv 2510.14973), described from the paper alone.

K, V and the input of every layer are cached for all tokens. Step 0 computes all of them. A later
step computes the active rows: the first `window` masks, and the tokens filled in the last step;
with a logit shift also the row in front of each of these masks. Their K, V and layer inputs are
replaced; everything else, masks behind the window too, is read from the cache.

Each layer watches its most attended token: of the known tokens that with the largest sum of
weights (mean of the heads) from the window's rows. At the next step the layer compares the weights
that the rows of the last window gave to this token then and now. Is their cosine below `gamma`, the
layers behind this one compute all rows, from the cached inputs of the rows that are not active.
No layer behind it decides anything in this step. A cosine is at most 1: with gamma > 1 nothing is
reused, from layer 0 on.

Every mask of the window with a confidence of at least `threshold` is filled, and the best one.

What the paper leaves open is settled here: means over heads, the rows that are compared (all of
the last window are active in the next step), ties (the lowest position), and layers that compute
all rows choose their token by the window's rows too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.oracles import dream, generation
from tests.oracles.rivals import parts


def generate(
    network: generation.Network,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    mask_id: int,
    window: int = 16,
    gamma: float = 0.9,
    threshold: float = 0.9,
    known_only: bool = True,
    **settings: Any,
) -> parts.Run:
    """Generates greedily from left to right, without blocks.

    prompt [P]. known_only: whether the watched token is a known one; else any. settings: Dream's
    top_p and top_k.

    `chosen` of a step: the layer that called for a refresh (-1: all layers are refreshed, the
    number of layers: none), then for each layer the token that it watches from now on.
    """
    run, layers = parts.Run.start(prompt, gen_length, mask_id), parts.Layers(network)
    total, sampler = len(run.tokens), dream.Sampler("maskgit_plus", **settings)
    width = layers.embed(run.tokens[:1]).shape[1]
    inputs = [torch.zeros(total, width) for _ in range(layers.count + 1)]
    inputs = [x.to(network.weights["wte"].dtype) for x in inputs]
    keys, values, watched = {}, {}, {}
    filled: list[int] = []
    while len(masks := run.masks(run.prompt, total)):
        assert len(run.steps) < 2 * gen_length, "masks predicted: the loop never ends"
        seen = masks[:window]
        predicting = (seen - layers.shift).clamp(min=0)
        active = sorted({*seen.tolist(), *predicting.tolist(), *filled})
        refresh = -1 if gamma > 1 or not run.steps else layers.count
        run.steps.append(step := parts.Step([]))
        inputs[0] = layers.embed(run.tokens)
        for i in range(layers.count):
            rows = torch.tensor(active) if i <= refresh else torch.arange(total)
            step.rows.append(rows.tolist())
            q, k, v = layers.qkv(i, inputs[i][rows], rows)
            if i not in keys:
                keys[i], values[i] = torch.zeros(2, k.shape[0], total, k.shape[2], dtype=k.dtype)
            keys[i][:, rows], values[i][:, rows] = k, v
            weights = parts.weights(q, keys[i])
            inputs[i + 1][rows] = layers.finish(i, inputs[i][rows], weights @ values[i])
            seen_by = torch.zeros(total, total, dtype=k.dtype)
            seen_by[rows] = weights.mean(0)
            if i < refresh:
                token, of, before = watched[i]
                cosine = float(F.cosine_similarity(before, seen_by[of, token], dim=0))
                run.closest = min(run.closest, abs(cosine - gamma))
                if cosine < gamma:
                    refresh = i
            sums = seen_by[seen].sum(0)
            if known_only:
                sums[run.tokens == mask_id] = -torch.inf
            token = run.best(sums, 1)[0]
            watched[i] = token, seen, seen_by[seen, token]
        step.chosen = [refresh, *(watched[i][0] for i in range(layers.count))]
        logits = layers.logits(inputs[-1][predicting])
        prediction = sampler.predict(logits) if layers.shift else parts.predict(logits)
        sure = prediction[1] - threshold
        if len(sure) > 1:
            # Of the best one nothing hinges on the threshold.
            near = sure.abs()[torch.arange(len(sure)) != sure.argmax()]
            run.closest = min(run.closest, float(near.min()))
        run.fill(seen, prediction, max(1, int((sure >= 0).sum())))
        filled = step.unmasked
    return run
