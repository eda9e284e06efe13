"""The oracles of the rivals' sampling rules: at their limits they are the published generation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints  # noqa: E402
from tests.oracles.generation import plain  # noqa: E402
from tests.oracles.llada import LlamaOracle  # noqa: E402
from tests.oracles.rivals import rules  # noqa: E402

SIZES = {"gen_length": 16, "block_length": 8}


@pytest.fixture(scope="module")
def oracle() -> LlamaOracle:
    config = checkpoints.tiny_config(n_kv_heads=2)
    return LlamaOracle(checkpoints.random_tensors(config, 2), config)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, checkpoints.N_BYTES, (11,), generator=generator)


MASK = checkpoints.tiny_config()["mask_token_id"]
ONE, BLOCK = {"steps": 16}, {"steps": 2}
SURE = {"steps": 16, "threshold": 0.7}
LIMITS = {  # rule, its settings, those of the published generation that it equals
    "no entropy allowed": ("entropy_bound", {"gamma": -1.0}, ONE),
    "any entropy allowed": ("entropy_bound", {"gamma": 1e9}, BLOCK),
    "nothing settles": ("klass", {"kl_threshold": -1.0}, ONE),
    "everything has settled": (
        "klass",
        {"kl_threshold": 1e9, "history": 1, "confidence_threshold": 0.7},
        SURE,
    ),
    "no credit": ("credit", {"alpha": 0.0, "threshold": 0.7}, SURE),
    "credit without a threshold": ("credit", {"threshold": -1.0}, BLOCK),
    "nothing is sure": ("wino", {"threshold": 1.0}, ONE),
    "everything is verified": ("wino", {"threshold": 0.7, "threshold_back": 0.0}, SURE),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(oracle, prompt, name):
    rule, settings, same = LIMITS[name]
    run = getattr(rules, rule)(oracle, prompt, mask_id=MASK, **SIZES, **settings)
    want = plain(oracle, prompt[None], mask_id=MASK, **SIZES, **same)
    assert run.tokens.tolist() == want.tokens[0].tolist()
    assert run.evaluations == want.evaluations
    assert run.closest > 1e-4, "rounding may decide"


SHOWN = {  # settings at which a random network takes, or masks again, several slots at once
    "entropy_bound": {"gamma": 2.0},
    "klass": {"confidence_threshold": 0.3, "kl_threshold": 1.0},
    "credit": {"threshold": 0.6},
    "wino": {"threshold": 0.3, "threshold_back": 0.5},
}


@pytest.mark.parametrize("rule", SHOWN)
def test_rules_take_several_slots(oracle, prompt, rule):
    run = getattr(rules, rule)(oracle, prompt, mask_id=MASK, **SIZES, **SHOWN[rule])
    counts = [len(slots) for slots in run.taken]
    assert max(counts) > 1
    assert sum(counts) - sum(map(len, run.masked_again)) == 16
    assert (run.tokens != MASK).all()
    assert any(run.masked_again) == (rule == "wino")
