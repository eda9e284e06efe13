"""The definitions of dLLM-Cache and MaskKV against the published generation and against facts."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream, generation  # noqa: E402
from tests.oracles.rivals.dllm_cache import DLLMCache, generate_dream, generate_llada  # noqa: E402
from tests.oracles.rivals.mask_kv import MaskKV  # noqa: E402

PROMPT, LENGTH = 11, 12
DREAM = {"gen_length": LENGTH, "steps": LENGTH, "alg": "entropy"}
LLADA = {"gen_length": LENGTH, "block_length": 6, "steps": 8}
FAMILIES = pytest.mark.parametrize("family", ["llada", "dream"])
OFF = {"prompt_interval": 1, "response_interval": 1}
SPARSE = {"prompt_interval": 5, "response_interval": 3}


@functools.cache
def network(family: str) -> generation.Network:
    if family == "dream":
        config = checkpoints.tiny_dream_config()
        tensors = checkpoints.random_tensors(config)
        tensors["lm_head.weight"][config["mask_token_id"]] *= 0.3
        return dream.Network(tensors, config)
    config = checkpoints.tiny_config(n_kv_heads=2)
    return generation.Network(checkpoints.random_tensors(config), config)


def prompt_ids() -> torch.Tensor:
    return torch.randint(
        0, checkpoints.N_BYTES, (PROMPT,), generator=torch.Generator().manual_seed(1)
    )


def settings(family: str) -> dict:
    config = {"dream": checkpoints.tiny_dream_config, "llada": checkpoints.tiny_config}[family]()
    return (DREAM if family == "dream" else LLADA) | {"mask_id": config["mask_token_id"]}


def answer(family: str, forward) -> list[int]:
    if isinstance(forward, DLLMCache):
        generate = generate_dream if family == "dream" else generate_llada
        return generate(forward, prompt_ids(), **settings(family)).tokens.flatten().tolist()
    if family == "dream":
        return dream.generate(forward, prompt_ids(), **settings(family)).tokens.tolist()
    return generation.plain(forward, prompt_ids()[None], **settings(family)).tokens[0].tolist()


@FAMILIES
@pytest.mark.parametrize("first_layer", [True, False])
def test_refreshed_at_every_step_it_is_plain_generation(family, first_layer):
    forward = DLLMCache(network(family), PROMPT, **OFF, first_layer=first_layer)
    plain = answer(family, network(family))
    assert answer(family, forward) == plain
    assert answer(family, MaskKV(network(family), PROMPT, budget=1, **OFF)) == plain
    everything = list(range(PROMPT + LENGTH))
    assert all(rows == everything for step in forward.rows for rows in step)


@FAMILIES
def test_rows_of_a_step(family):
    forward = DLLMCache(network(family), PROMPT, **SPARSE, ratio=0.3)
    tokens = answer(family, forward)
    assert tokens != answer(family, network(family))
    assert forward.closest > 1e-6
    for step, (first, second) in enumerate(forward.rows):
        assert first == list(range(PROMPT + LENGTH))
        in_prompt = sum(row < PROMPT for row in second)
        assert in_prompt == (PROMPT if step % 5 == 0 else 0)
        assert len(second) - in_prompt == (LENGTH if step % 3 == 0 else int(0.3 * LENGTH))


@FAMILIES
def test_all_rows_chosen_is_a_refresh_of_the_response(family):
    chosen = DLLMCache(network(family), PROMPT, prompt_interval=4, response_interval=99, ratio=1.0)
    due = DLLMCache(network(family), PROMPT, prompt_interval=4, response_interval=1)
    assert answer(family, chosen) == answer(family, due)
    assert chosen.rows == due.rows


def test_ratio_zero_leaves_the_response():
    forward = DLLMCache(network("llada"), PROMPT, prompt_interval=99, response_interval=4, ratio=0)
    answer("llada", forward)
    assert [bool(second) for _, second in forward.rows] == [step % 4 == 0 for step in range(8)]


def test_guidance_every_step_is_the_published_guidance():
    ids, config = prompt_ids(), settings("llada")
    want = generation.plain(network("llada"), ids[None], cfg_scale=1.5, **config).tokens
    forward = functools.partial(DLLMCache, network("llada"), PROMPT, **OFF)
    assert generate_llada(forward(), ids, cfg_scale=1.5, **config).tokens.equal(want)
    late = generate_llada(forward(), ids, cfg_scale=1.5, cfg_interval=99, **config).tokens
    assert not late.equal(want)


@FAMILIES
def test_mask_kv_that_keeps_the_whole_prompt_is_dllm_cache(family):
    """Dream predicts its first slot at a row of the prompt; here layer 0 does not recompute it."""
    full = MaskKV(network(family), PROMPT, budget=PROMPT, **SPARSE, first_layer=family == "llada")
    plain = DLLMCache(network(family), PROMPT, **SPARSE, first_layer=family == "llada")
    assert answer(family, full) == answer(family, plain)


@FAMILIES
def test_mask_kv_keeps_its_budget(family):
    table = [[1, 4], [2, 3]]
    forward = MaskKV(network(family), PROMPT, budget=table, **SPARSE)
    tokens = answer(family, forward)
    assert [[len(head) for head in layer] for layer in forward.kept] == table
    assert tokens != answer(family, MaskKV(network(family), PROMPT, budget=PROMPT, **SPARSE))
    assert forward.closest > 1e-6


@FAMILIES
def test_mask_kv_without_budget_answers_without_the_prompt(family):
    """From the second evaluation on; only the row in front of the response is as it was."""
    forward = MaskKV(network(family), PROMPT, budget=0, prompt_interval=99, response_interval=1)
    masks = torch.full((LENGTH,), settings(family)["mask_id"])
    ids = torch.cat((prompt_ids(), masks))[None]
    first, second = forward(ids), forward(ids)
    alone = network(family).rows(ids[:, PROMPT:], PROMPT, None)[0]
    torch.testing.assert_close(first, network(family)(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[:, PROMPT:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[:, :PROMPT], first[:, :PROMPT], rtol=1e-4, atol=1e-4)
