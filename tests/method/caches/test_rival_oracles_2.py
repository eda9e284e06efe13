"""The oracles of dKV-Cache and d2Cache against plain generation and against small cases by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream, generation  # noqa: E402
from tests.oracles.rivals import d2_cache, dkv_cache, rows  # noqa: E402

PROMPT, GEN, BLOCK = 9, 12, 6


def network(family: str, dtype: torch.dtype = torch.float32):
    config = checkpoints.tiny_dream_config() if family == "dream" else checkpoints.tiny_config()
    cls = dream.Network if family == "dream" else generation.Network
    return cls(checkpoints.random_tensors(config), config, dtype), config["mask_token_id"]


def prompt(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, checkpoints.N_BYTES, (PROMPT,), generator=generator)


def llada_settings(mask: int, **changes):
    return {"gen_length": GEN, "block_length": BLOCK, "steps": 8, "mask_id": mask, **changes}


def test_rows_that_all_run_are_a_full_pass():
    net, _ = network("llada")
    ids = torch.cat((prompt(), prompt(2)))
    every = torch.arange(len(ids))
    full = rows.run_rows(net, ids, every, None)
    torch.testing.assert_close(full.logits, net(ids[None])[0], rtol=1e-5, atol=1e-5)
    some = torch.tensor([0, 4, 17])
    result = rows.run_rows(net, ids, some, full.cache)
    torch.testing.assert_close(result.logits[some], full.logits[some], rtol=1e-5, atol=1e-5)
    assert not result.logits[1].any()


def test_dkv_decode_without_reuse_is_plain_generation():
    net, mask = network("llada")
    settings = llada_settings(mask)
    want = generation.plain(net, prompt()[None], **settings)
    got = dkv_cache.decode_llada(net, prompt(), interval=1, **settings)
    assert got.tokens.tolist() == want.tokens[0].tolist()
    net, mask = network("dream")
    settings = {"gen_length": GEN, "steps": 8, "mask_id": mask, "alg": "entropy"}
    want = dream.generate(net, prompt(), **settings)
    got = dkv_cache.decode_dream(net, prompt(), interval=1, **settings)
    assert got.tokens.tolist() == want.tokens.tolist()


def test_dkv_decode_recomputes_masks_and_what_was_just_decoded():
    net, mask = network("llada")
    got = dkv_cache.decode_llada(net, prompt(), interval=3, **llada_settings(mask))
    assert (got.tokens != mask).all()
    for block in range(2):
        first = 4 * block
        sizes = [len(x) for x in got.rows[first : first + 4]]
        assert sizes[:2] == [PROMPT + GEN] * 2
        left = set(range(PROMPT + BLOCK * block, PROMPT + GEN))
        left -= set(got.filled[first])
        assert set(got.rows[first + 2]) == left
        assert sizes[3] == PROMPT + GEN


def test_dkv_decode_on_dream_caches_rows_in_front_of_known_tokens():
    net, mask = network("dream")
    settings = {"gen_length": GEN, "steps": GEN, "mask_id": mask, "alg": "entropy"}
    got = dkv_cache.decode_dream(net, prompt(), interval=100, **settings)
    masks = set(range(PROMPT, PROMPT + GEN))
    assert set(got.rows[1]) == {row - 1 for row in masks} | {PROMPT + GEN - 1}
    for step in range(2, len(got.rows)):
        masks -= set(got.filled[step - 2])
        assert set(got.rows[step]) == {row - 1 for row in masks}


def test_dkv_greedy_without_reuse_fills_a_random_order():
    net, mask = network("llada")
    settings = llada_settings(mask)
    drawn = torch.rand(2, PROMPT + GEN, generator=torch.Generator().manual_seed(3))
    got = dkv_cache.greedy_llada(net, prompt(), interval=1, priorities=drawn, **settings)
    tokens = torch.nn.functional.pad(prompt(), (0, GEN), value=mask)
    for filled in got.filled:
        tokens[filled] = net(tokens[None])[0].argmax(-1)[filled]
    assert got.tokens.tolist() == tokens.tolist()
    generator = torch.Generator().manual_seed(3)
    again = dkv_cache.greedy_llada(net, prompt(), interval=1, generator=generator, **settings)
    assert again.filled == got.filled
    reused = dkv_cache.greedy_llada(
        net, prompt(), interval=2, window=1, priorities=drawn, **settings
    )
    for step in (1, 3, 5):  # In the last step no other mask is left.
        now = reused.filled[step - 1] + reused.filled[step]
        assert set(now) < set(reused.rows[step])
        assert len(reused.rows[step]) == len(now) + len(reused.filled[step])


@pytest.mark.parametrize(
    ("slots", "count", "expected"),
    [
        ([5], 2, {4, 6}),
        ([5], 3, {4, 6, 3}),
        ([1], 3, {2, 3, 4}),
        ([5, 6], 1, {4, 7}),
        ([8], 0, set()),
    ],
)
def test_the_nearest_masks_are_taken_left_first(slots, count, expected):
    masked = torch.ones(9, dtype=torch.bool)
    masked[0] = False
    chosen = torch.zeros(9, dtype=torch.bool)
    chosen[slots] = True
    got = dkv_cache.nearest_masks(chosen, slots, masked, count)
    assert set(got.nonzero()[:, 0].tolist()) == expected | set(slots)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_d2_with_every_row_chosen_is_plain_generation(family):
    # float64: else the cumulated shares of all rows may round to more than p = 1.
    net, mask = network(family, torch.float64)
    off = {"rollout_p": 1.0, "current_k": GEN, "prompt_row": "union"}
    settings = llada_settings(mask, **off)
    got = d2_cache.generate(net, prompt(), shift=family == "dream", prior_sigma=None, **settings)
    assert [len(x) for x in got.rows] == [PROMPT + GEN] * len(got.rows)
    plain = {name: x for name, x in settings.items() if name not in off}
    forward = net if family == "llada" else lambda ids: dream.shifted(net(ids)[0])[None]
    want = generation.plain(forward, prompt()[None], **plain)
    assert got.tokens.tolist() == want.tokens[0].tolist()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_d2_runs_the_rows_that_predict_chosen_masks(family):
    net, mask = network(family)
    shift = family == "dream"
    settings = llada_settings(mask, block_length=GEN, current_k=3, prior_sigma=None, shift=shift)
    runs = {
        name: d2_cache.generate(net, prompt(), **settings, **changes)
        for name, changes in {
            "published": {},
            "refreshed": {"refresh": True},
            "inflated": {"inflate_w": 4},
        }.items()
    }
    for got in runs.values():
        assert (got.tokens != mask).all()
        assert len(got.rows[0]) == PROMPT + GEN
        for step in range(1, len(got.rows)):
            ran = set(got.rows[step])
            assert set(got.filled[step - 1]) <= ran
            assert {row - shift for row in got.filled[step]} <= ran
            assert len(ran) < PROMPT + GEN
    assert runs["published"].rows != runs["refreshed"].rows != runs["inflated"].rows


@pytest.mark.parametrize("last", [False, True])
def test_density_is_a_gaussian_share_of_padded_slots(last):
    """As a circular convolution over six times the response."""
    known = torch.tensor([True, False, False, True, last])
    size, sigma = len(known), 2.0
    value = torch.zeros(6 * size, dtype=torch.float64)
    value[:size] = 1
    value[size : 2 * size] = known.double()
    value[2 * size : 3 * size] = float(last)
    distance = torch.cat((torch.arange(3 * size), torch.arange(-3 * size, 0))).double()
    kernel = torch.exp(-(distance**2) / (2 * sigma**2))
    share = torch.fft.ifft(torch.fft.fft(value) * torch.fft.fft(kernel)).real / kernel.sum()
    torch.testing.assert_close(d2_cache.density(known, sigma), share[size : 2 * size])


def test_rollout_is_a_product_of_vectors_too():
    weights = [torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    weights = [x / x.sum(-1, keepdim=True) for x in weights]
    ran = torch.tensor([1, 2, 6])
    column = torch.ones(7)
    for layer in reversed(weights):
        mixed = 2 * torch.eye(7)
        mixed[ran] = layer.mean(0) + torch.eye(7)[ran]
        column = column @ (mixed / 2)
    torch.testing.assert_close(d2_cache.rollout(weights, ran, 7), column)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, {2}), (0.45, {2}), (0.85, {2, 0}), (1.0, {0, 2, 3})]
)
def test_nucleus_stays_below_its_share(p, expected):
    scores, candidates = torch.tensor([3.0, 9.0, 5.0, 2.0]), torch.tensor([1, 0, 1, 1]).bool()
    chosen, _ = d2_cache.nucleus(scores, candidates, p)
    assert set(chosen.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize(
    ("window", "expected"), [(0, {1, 4, 6}), (2, {1, 4, 5, 6}), (3, {*range(1, 7)})]
)
def test_gaps_of_at_most_the_window_are_filled(window, expected):
    chosen = torch.zeros(9, dtype=torch.bool)
    chosen[[1, 4, 6]] = True
    assert set(d2_cache.inflate(chosen, window).nonzero()[:, 0].tolist()) == expected


def test_masks_are_searched_to_the_end_of_a_block():
    masked = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1]).bool()
    for count, stop in ((1, 3), (2, 6), (3, 6), (4, 9), (9, 9)):
        found = d2_cache.searched(masked, 0, 3, count).nonzero()[:, 0].tolist()
        assert found == [slot for slot in (2, 3, 4, 6, 7, 8) if slot < stop]
