"""The definitions of Sparse-dLLM, SparseD and Elastic-Cache, with their sparsity off and on."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream, generation  # noqa: E402
from tests.oracles.rivals import elastic_cache, parts, sparse_d, sparse_dllm  # noqa: E402

FAMILIES = ("LLaDA", "Dream")
LENGTH = 19  # of the prompt


@functools.cache
def network_of(family: str) -> generation.Network:
    make = checkpoints.tiny_dream_config if family == "Dream" else checkpoints.tiny_config
    config = make(**{"num_hidden_layers" if family == "Dream" else "n_layers": 3})
    tensors = checkpoints.random_tensors(config, 1)
    names = {"Dream": "lm_head.weight", "LLaDA": "model.transformer.ff_out.weight"}
    tensors[names[family]][config["mask_token_id"]] *= 0.3  # No masks are predicted.
    return (dream if family == "Dream" else generation).Network(tensors, config)


def run(module, family: str, **settings) -> parts.Run:
    network = network_of(family)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 256, (LENGTH,), generator=generator)
    mask_id = 256 + (4 if family == "Dream" else 2)
    if module in (dream.generate, dream.dual_cache):
        return module(network, prompt, mask_id=mask_id, **settings).tokens[LENGTH:].tolist()
    if module in (generation.plain, generation.dual_cache):
        return (
            module(network, prompt[None], mask_id=mask_id, **settings).tokens[0, LENGTH:].tolist()
        )
    return module.generate(network, prompt, mask_id=mask_id, **settings)


SHAPE = {"gen_length": 16, "block_length": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_dllm_with_all_keys_is_the_dual_cache(family):
    published = dream.dual_cache if family == "Dream" else generation.dual_cache
    alg = {"alg": "entropy"} if family == "Dream" else {}
    want = run(published, family, steps=10, **SHAPE, **alg)
    got = run(sparse_dllm, family, steps=10, keep_ratio=1.0, delay=0, **SHAPE)
    assert got.response == want


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_dllm_keeps_a_share_of_the_keys(family):
    got = run(sparse_dllm, family, steps=12, **SHAPE)
    chosen = [step.chosen for step in got.steps]
    assert [bool(kept) for kept in chosen] == [step % 6 == 1 for step in range(12)]
    assert [len(step.rows[0]) for step in got.steps] == [35, 35, 8, 8, 8, 8] * 2
    for at, block in ((1, range(19, 27)), (7, range(27, 35))):
        assert [len(kept) for kept in chosen[at]] == [13] * 3
        assert all(not {*block} & {*kept} for kept in chosen[at])
    others = [{"keep_ratio": 1.0}, {"kernel": None}, {"delay": 0}]
    answers = [run(sparse_dllm, family, steps=12, **SHAPE, **other).response for other in others]
    assert got.response not in answers
    assert got.closest > 0


def test_the_maximum_of_neighbours_makes_equal_scores():
    scores = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, 2.0])
    kept = [parts.Run.start(torch.zeros(1), 1, 1).best(scores, k) for k in (1, 2, 3, 4)]
    assert kept == [[1], [1, 3], [1, 3, 4], [1, 3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_d_with_all_tiles_is_plain(family):
    settings = {"steps": 8, "gen_length": 16}
    if family == "Dream":
        want = run(dream.generate, family, alg="maskgit_plus", **settings)
    else:
        settings["block_length"] = 8
        want = run(generation.plain, family, **settings)
    got = run(sparse_d, family, tile=4, select=1.0, skip=0.0, **settings)
    assert got.response == want
    late = run(sparse_d, family, tile=4, select=0.1, skip=0.9, **settings)
    assert late.response == want
    answers = {tuple(run(sparse_d, family, tile=4, select=s, skip=0.2, **settings).response)
               for s in (0.1, 0.3, 0.5)}  # fmt: skip
    assert len(answers) == 3


def test_sparse_d_chooses_tiles_of_prompt_and_response_apart():
    got = run(sparse_d, "LLaDA", steps=8, tile=4, select=0.3, **SHAPE)
    (at,) = (step for step, what in enumerate(got.steps) if what.chosen)
    assert at == int(8 * 0.2) + 1
    for chosen in got.steps[at].chosen:
        # 35 rows are 9 tiles; the response's 16 rows: tile 5 begins with 15 of them.
        assert chosen.shape == (4, 9, 9)
        assert (chosen[:, :, 5:].sum(-1) == int(4 * 0.3) + 1).all()
        assert (chosen[:, :, :5].sum(-1) <= int(9 * 0.3) + 1).all()
    other = run(sparse_d, "LLaDA", steps=8, tile=4, select=0.3, heads_scale=False, **SHAPE)
    assert len(network_of("LLaDA").weights) > 0
    assert any((a != b).any() for a, b in zip(got.steps[at].chosen, other.steps[at].chosen))  # noqa: B905


def dream_above(prompt, threshold: float, gen_length: int) -> list[int]:
    """Dream without a cache: fills every mask that is sure enough, and the best one."""
    network, sampler = network_of("Dream"), dream.Sampler("maskgit_plus")
    made = dream.Generated.start(prompt, gen_length, 260)
    while len(masks := made.masks()):
        tokens, sure = sampler.predict(dream.shifted(network(made.tokens[None])[0])[masks])
        made.fill(masks, (tokens, sure), max(1, int((sure >= threshold).sum())), sampler)
    return made.tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_elastic_cache_with_fresh_layers_is_plain(family):
    rule = {"threshold": 0.3, "gen_length": 16}
    got = run(elastic_cache, family, gamma=2.0, window=16, **rule)
    if family == "LLaDA":
        want = run(generation.plain, family, steps=16, block_length=16, **rule)
    else:
        want = dream_above(got.tokens[:LENGTH], **rule)
    assert got.response == want
    assert {len(rows) for step in got.steps for rows in step.rows} == {LENGTH + 16}
    runs = [run(elastic_cache, family, gamma=g, window=6, **rule) for g in (0.0, 0.9, 2.0)]
    assert len({tuple(one.response) for one in runs}) == 3
    never, some, _ = runs
    assert {step.chosen[0] for step in never.steps[1:]} == {3}
    assert {step.chosen[0] for step in some.steps[1:]} > {3}
    for step in never.steps[1:]:
        assert len({tuple(rows) for rows in step.rows}) == 1
