"""dLLM-Cache (arXiv 2506.06295, and its authors' public code) in PyTorch, one prompt at a time.

Every layer adds two outputs to the residual stream: attention's and the MLP's. They are cached for
every row, beside keys and values. A step recomputes some rows; the others add what is cached to
their new stream. Which rows, with evaluations counted from 0:

  prompt    all rows when the count is a multiple of `prompt_interval`, else none.
  response  all rows when the count is a multiple of `response_interval`. Else the int(ratio G)
            rows whose new values are least like the cached ones, by the cosine over all KV heads.
            The values of all response rows are replaced; ratio 0 leaves them and all else.

Layer 0 recomputes all rows at every step (`first_layer`), as in d2Cache's code of this method. The
authors' own code lacks this. Then most values of layer 0 are bitwise the cached ones, and rounding
breaks the tie.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from tests.oracles import dream, generation


def attention_weights(
    network: generation.Network, q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights [H, rows, T] of q [H, rows, D] over k [G, T, D]; seen: keys a KV head has, [G, T]."""
    groups = network.heads // network.kv_heads
    scores = q @ k.repeat_interleave(groups, dim=0).mT / math.sqrt(network.head_dim)
    if seen is not None:
        scores = scores.masked_fill(~seen.repeat_interleave(groups, dim=0)[:, None], -torch.inf)
    return F.softmax(scores, dim=-1)


class DLLMCache:
    """The network with dLLM-Cache: a `generation.Forward` of one sequence, to be called in order.

    rows: of every call and layer, the rows that were recomputed, in rising order.
    closest: the smallest gap of cosines that decided anything. Where all rows were computed with
      the same tokens before (Dream's first step often unmasks nothing), no choice matters.
    """

    def __init__(
        self,
        network: generation.Network,
        prompt_length: int,
        *,
        prompt_interval: int,
        response_interval: int,
        ratio: float = 0.25,
        first_layer: bool = True,
    ) -> None:
        self.network, self.prompt_length = network, prompt_length
        self.prompt_interval, self.response_interval = prompt_interval, response_interval
        self.ratio, self.first_layer = ratio, first_layer
        self.layers: list[dict[str, torch.Tensor]] = []
        self.rows: list[list[list[int]]] = []
        self.closest = math.inf
        self.computed_ids: torch.Tensor | None = None

    def due(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer recomputes the whole prompt and the whole response in this call."""
        step = len(self.rows) - 1
        always = self.first_layer and layer == 0
        return (
            always or step % self.prompt_interval == 0,
            always or step % self.response_interval == 0,
        )

    def seen(self, layer: int) -> torch.Tensor | None:
        """Which keys the KV heads of a layer attend to, bool [G, T]; None for all."""
        return None

    def attended(self, layer: int, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Is told the attention weights [H, rows, T] of a layer."""

    def chosen(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Slots [n] of the response whose values differ most: new, old [G, kv size]."""
        count = int(len(new) * self.ratio)
        likeness, order = F.cosine_similarity(new, old, dim=-1).sort(stable=True)
        if 0 < count < len(order) and self.computed_ids is None:
            self.closest = min(self.closest, float(likeness[count] - likeness[count - 1]))
        return order[:count].sort().values

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, T] -> logits [1, T, V]."""
        net, prompt = self.network, self.prompt_length
        x = net.weights["wte"][ids[0]]
        self.rows.append([])
        if self.computed_ids is not None and not self.computed_ids.equal(ids):
            self.computed_ids = None
        for layer in range(net.config["n_layers"]):
            x = self._layer(layer, x)
        if all(len(rows) == ids.shape[1] for rows in self.rows[-1]):
            self.computed_ids = ids.clone()
        head = net.weights["wte" if net.config.get("weight_tying") else "ff_out"]
        assert prompt < len(x)
        return (net._norm(x, "ln_f") @ head.T)[None]

    def _layer(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        net, prompt, name = self.network, self.prompt_length, f"blocks.{layer}."

        def project(x: torch.Tensor, part: str, heads: int) -> torch.Tensor:
            return net._project(x[None], name + part, heads)[0]

        if layer == len(self.layers):
            kv = torch.zeros(net.kv_heads, len(x), net.head_dim, dtype=x.dtype)
            outputs = {part: torch.zeros_like(x) for part in ("attention", "mlp")}
            self.layers.append({"k": kv, "v": kv.clone(), **outputs})
        cache = self.layers[layer]
        normed = net._norm(x, name + "attn_norm")

        every = torch.arange(len(x))
        prompt_due, response_due = self.due(layer)
        rows = [every[:prompt]] if prompt_due else []
        value_rows = list(rows)
        if response_due:
            rows.append(every[prompt:])
        elif self.ratio > 0:
            new = project(normed[prompt:], "v_proj", net.kv_heads).transpose(0, 1).flatten(1)
            old = cache["v"][:, prompt:].transpose(0, 1).flatten(1)
            rows.append(prompt + self.chosen(new, old))
        if response_due or self.ratio > 0:
            value_rows.append(every[prompt:])
        computed = torch.cat([every[:0], *rows])
        replaced = torch.cat([every[:0], *value_rows])
        self.rows[-1].append(computed.tolist())

        cache["v"][:, replaced] = project(normed[replaced], "v_proj", net.kv_heads)
        k = project(normed[computed], "k_proj", net.kv_heads)
        cache["k"][:, computed] = net._rotate(k[None], computed)[0]
        q = net._rotate(project(normed[computed], "q_proj", net.heads)[None], computed)[0]
        weights = attention_weights(net, q, cache["k"], self.seen(layer))
        mixed = weights @ cache["v"].repeat_interleave(net.heads // net.kv_heads, dim=0)
        mixed = mixed.transpose(0, 1).flatten(1)
        cache["attention"][computed] = mixed @ net.weights[name + "attn_out"].T
        self.attended(layer, computed, weights)
        x = x + cache["attention"]

        h = net._norm(x[computed], name + "ff_norm")
        gate = F.silu(h @ net.weights[name + "ff_proj"].T)
        up = h @ net.weights[name + "up_proj"].T
        cache["mlp"][computed] = (gate * up) @ net.weights[name + "ff_out"].T
        return x + cache["mlp"]


def generate_llada(
    forward: DLLMCache,
    prompt: torch.Tensor,
    *,
    cfg_scale: float = 0.0,
    cfg_interval: int = 1,
    **settings: Any,
) -> generation.Generated:
    """LLaDA's loop as dLLM-Cache's authors run it; prompt [P], settings of `Generated`.

    A block gets all its evaluations, also those in which nothing is due: they count for the
    intervals. Masks that earlier blocks left may be filled.

    Guidance: the unconditional network, of the masked prompt, has caches and a count of its own.
    It runs in the first 5 evaluations, and when the count of evaluations from 0 is a multiple of
    `cfg_interval`. Else the last difference of logits (of all response rows) is used again.
    """
    run, length = generation.Generated(prompt[None], **settings), len(prompt)
    assert run.rule.threshold is None, "use generation.plain"
    assert run.rule.factor is None, "use generation.plain"
    blind = _like(forward) if cfg_scale > 0 else None
    difference = torch.zeros(())
    for start, stop in run.blocks:
        masked = run.is_masked(start, stop).sum(1).tolist()
        for step in range(run.rule.steps):
            count = run.evaluations
            logits = forward(run.tokens)[:, length:]
            if blind is not None:
                if count < 5 or count % cfg_interval == 0:
                    ids = run.tokens.clone()
                    ids[:, :length] = run.mask_id
                    difference = logits - blind(ids)[:, length:]
                logits = (logits - difference) + (cfg_scale + 1) * difference
            run.take(logits, length, stop, [run.rule.schedule(n, step) for n in masked])
    return run


def _like(cache: DLLMCache) -> DLLMCache:
    return type(cache)(
        cache.network,
        cache.prompt_length,
        prompt_interval=cache.prompt_interval,
        response_interval=cache.response_interval,
        ratio=cache.ratio,
        first_layer=cache.first_layer,
    )


def generate_dream(forward: DLLMCache, prompt: torch.Tensor, **settings: Any) -> dream.Generated:
    """Dream's `diffusion_generate`, which the authors leave as it is; settings of `dream.generate`.

    The first slot is read from the prompt's last row, so it changes by what layer 0 computes and
    by the refreshes of the prompt.
    """
    return dream.generate(forward, prompt, **settings)
