"""Greedy generation without a document against the published algorithms, token for token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.deprecated import generate_ids
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from tests.support.models import model_from_tensors

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, generation  # noqa: E402

RECOMPUTE = {"plain": "response", "prefix_cache": "suffix", "dual_cache": "block"}
METHODS = pytest.mark.parametrize("method", RECOMPUTE)
LENGTHS = (11, 5, 8)  # of the prompts of a batch
SLOW = pytest.mark.slow


class Pair:
    """The same random network twice: `network` in PyTorch, `model` in JAX; and some prompts."""

    def __init__(self, seed: int = 0, change=None, **changes):
        self.config = checkpoints.tiny_config(n_kv_heads=2, **changes)
        tensors = checkpoints.random_tensors(self.config, seed)
        if change is not None:
            change(tensors, self.config["mask_token_id"])
        self.network = generation.Network(tensors, self.config)
        self.model = model_from_tensors(tensors, self.config)
        rng = np.random.default_rng(seed)
        self.prompts = [rng.integers(0, checkpoints.N_BYTES, n) for n in LENGTHS]

    def published(self, method: str, config: DecodeConfig) -> tuple[np.ndarray, list[int]]:
        """Responses [B, G] and evaluations, one prompt at a time."""
        names = ["gen_length", "block_length", "threshold", "factor"]
        names += ["logits_eos_inf", "confidence_eos_eot_inf"]
        settings = {name: getattr(config, name) for name in names}
        settings |= {"eos_id": self.config["eos_token_id"], "eot_id": config.eot_token_id}
        settings["steps"] = config.steps_per_block * config.n_blocks
        settings["mask_id"] = self.config["mask_token_id"]
        if config.guidance:
            settings["cfg_scale"] = config.guidance
        generate = getattr(generation, method)
        prompts = [torch.from_numpy(prompt)[None] for prompt in self.prompts]
        runs = [generate(self.network, prompt, **settings) for prompt in prompts]
        tokens = np.concatenate([run.tokens[:, -config.gen_length :].numpy() for run in runs])
        return tokens, [run.evaluations for run in runs]

    def start(self, config: DecodeConfig):
        """The state for all prompts in one padded batch."""
        padded = np.zeros((len(self.prompts), max(LENGTHS) + 2), np.int32)
        for row, prompt in zip(padded, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        inputs = jnp.asarray(padded), config, jax.random.key(0)
        return init_denoise(self.model, None, None, *inputs, query_length=jnp.asarray(LENGTHS))

    def denoise(self, config: DecodeConfig):
        """The last state, of the loop on the device."""
        return denoise(self.model, None, self.start(config), config=config)

    def check(self, method: str, **settings) -> np.ndarray:
        config = DecodeConfig(recompute=RECOMPUTE[method], **settings)
        want, evaluations = self.published(method, config)
        state = self.denoise(config)
        np.testing.assert_array_equal(state.tokens, want)
        assert state.evaluations.tolist() == evaluations
        return want


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_prompts_of_the_batch_have_different_answers(pair):
    """And the caches' approximations show: else the comparisons below would compare little."""
    config = DecodeConfig(gen_length=24, block_length=8, steps=24)
    tokens = {method: pair.published(method, config)[0] for method in RECOMPUTE}
    assert len({tuple(row) for rows in tokens.values() for row in rows}) == 9
    assert all(len(set(row)) > 6 for row in tokens["plain"])


SCHEDULES = {  # length of response and block, evaluations
    "3 blocks, a token at a time": (24, 8, 24),
    "3 blocks of 8 in 3 evaluations: 3 3 2": (24, 8, 9),
    "3 blocks of 6 in 4: 2 2 1 1": (18, 6, 12),
    "1 block of 16 in 7": (16, 16, 7),
    "2 blocks at once": (10, 5, 2),
    "more evaluations than tokens": (6, 3, 12),
}


def schedules():
    """Counts of tokens an evaluation are every method's: the caches have three of them each."""
    for i, name in enumerate(SCHEDULES):
        for method in RECOMPUTE:
            slow = method != "plain" and i % 2 == (method == "dual_cache")
            yield pytest.param(method, name, marks=SLOW if slow else ())


@pytest.mark.parametrize(("method", "name"), schedules())
def test_schedule(pair, method, name):
    gen_length, block_length, steps = SCHEDULES[name]
    pair.check(method, gen_length=gen_length, block_length=block_length, steps=steps)


@METHODS
@pytest.mark.parametrize("threshold", [0.5, pytest.param(0.9, marks=SLOW)])
def test_threshold(pair, method, threshold):
    pair.check(method, gen_length=24, block_length=8, threshold=threshold)


def test_threshold_unmasks_several_tokens_at_once(pair):
    """And requests of a batch need different numbers of evaluations."""
    config = DecodeConfig(gen_length=24, block_length=8, threshold=0.5, recompute="block")
    _, evaluations = pair.published("dual_cache", config)
    assert max(evaluations) < 24
    assert len(set(evaluations)) > 1


SLOW_FACTORS = [pytest.param(method, 1.5, marks=SLOW) for method in RECOMPUTE]


@pytest.mark.parametrize(
    ("method", "factor"),
    [("plain", 0.7), ("dual_cache", 0.7), *SLOW_FACTORS],
)
def test_factor(pair, method, factor):
    pair.check(method, gen_length=24, block_length=8, factor=factor)


@pytest.mark.parametrize("guidance", [pytest.param(0.5, marks=SLOW), 2.0])
def test_guidance(pair, guidance):
    settings = {"gen_length": 12, "block_length": 6, "steps": 8}
    guided = pair.check("plain", **settings, guidance=guidance)
    without, _ = pair.published("plain", DecodeConfig(recompute="response", **settings))
    assert not np.array_equal(guided, without)


EOS, EOS_LAST = "logits_eos_inf", "confidence_eos_eot_inf"
EOS_RULES = [EOS], [EOS_LAST], [EOS_LAST, EOS]


def eos_rules():
    """Every rule by the plain loop; each cache has one of them."""
    for method in RECOMPUTE:
        for i, names in enumerate(EOS_RULES):
            slow = method != "plain" and i != (method == "dual_cache")
            change, name = dict.fromkeys(names, True), f"{method}-{'+'.join(names)}"
            yield pytest.param(method, change, id=name, marks=SLOW if slow else ())


@pytest.mark.parametrize(("method", "change"), eos_rules())
def test_eos_and_eot_as_in_the_published_evaluation(method, change):
    """Of a network that often predicts the two."""
    eos, eot = checkpoints.tiny_config()["eos_token_id"], 77

    def favour_the_end(tensors, _: int) -> None:
        tensors["model.transformer.ff_out.weight"][[eos, eot]] *= 1.8

    pair = Pair(seed=1, change=favour_the_end)
    settings = {"gen_length": 24, "block_length": 8, "steps": 12, "eot_token_id": eot}
    if method != "plain":
        settings |= {"steps": None, "threshold": 0.6}
    without, _ = pair.published(method, DecodeConfig(recompute=RECOMPUTE[method], **settings))
    assert {eos, eot} <= set(without.flatten().tolist())
    tokens = pair.check(method, **settings, **change)
    assert not np.array_equal(tokens, without)
    assert (eos in tokens) == ("logits_eos_inf" not in change)


@METHODS
def test_generate_ids(pair, method):
    """The public entry on the same network: prefix, context and query together are the prompt."""
    config = DecodeConfig(gen_length=12, block_length=6, steps=8)
    want, evaluations = pair.published(method, config)
    ids = pair.prompts[0].tolist()
    result = generate_ids(
        pair.model, ids[:3], ids[3:9], ids[9:], method=method.replace("_", "-"), decode=config
    )
    assert result.tokens == want[0].tolist()
    assert result.evaluations == evaluations[0]


def test_tied_embeddings():
    def quieten_the_mask(tensors, mask_id: int) -> None:
        """A random tied head predicts a mask where it sees one."""
        tensors["model.transformer.wte.weight"][mask_id] *= 0.3

    tied = Pair(seed=4, change=quieten_the_mask, weight_tying=True)
    tied.check("dual_cache", gen_length=12, block_length=6, steps=6)


@pytest.mark.parametrize("method", ["plain", "dual_cache"])
def test_steps_by_hand_equal_the_loop_on_the_device(pair, method):
    config = DecodeConfig(gen_length=12, block_length=6, threshold=0.5, recompute=RECOMPUTE[method])
    want, state = pair.denoise(config), pair.start(config)
    for _ in range(config.gen_length):
        if (np.asarray(state.block) == config.n_blocks).all():
            break
        state = denoise_step(pair.model, None, state, config=config)
    np.testing.assert_array_equal(state.tokens, want.tokens)
    np.testing.assert_array_equal(state.evaluations, want.evaluations)


def test_predicted_masks_stay_open_as_published():
    """LLaDA's loop may predict the mask token, and fill the slot during a later block."""

    def favour_the_mask(tensors, mask_id: int) -> None:
        """The mask token becomes a frequent prediction."""
        tensors["model.transformer.ff_out.weight"][mask_id] *= 1.4

    pair = Pair(seed=1, change=favour_the_mask)
    tokens = pair.check("plain", gen_length=24, block_length=8, steps=12)
    mask_id = pair.config["mask_token_id"]
    assert (tokens == mask_id).any()

    # It matters here that later blocks fill them: stopped after its own evaluations, the first
    # block is left with more open slots.
    config = DecodeConfig(gen_length=24, block_length=8, steps=12, recompute="response")
    state = pair.start(config)
    for _ in range(4):
        state = denoise_step(pair.model, None, state, config=config)
    early = np.asarray(state.tokens)[:, :8] == mask_id
    assert (early & (tokens[:, :8] != mask_id)).any()


@pytest.mark.parametrize("method", ["plain", pytest.param("dual_cache", marks=SLOW)])
def test_random_remasking_changes_the_order_alone(pair, method):
    """With a block's tokens all at once there is no order, so the text is the published one."""
    config = DecodeConfig(
        gen_length=12, block_length=6, steps=2, recompute=RECOMPUTE[method], remasking="random"
    )
    want, _ = pair.published(method, dataclasses.replace(config, remasking="low_confidence"))
    np.testing.assert_array_equal(pair.denoise(config).tokens, want)

    # One at a time, it shows.
    config = dataclasses.replace(config, steps=12)
    want, _ = pair.published(method, config)
    assert not np.array_equal(pair.denoise(config).tokens, want)


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy", "random"])
def test_the_probability_of_a_token_is_that_of_the_evaluation_that_unmasked_it(pair, remasking):
    """By PyTorch's softmax of the logits before temperature; -1 for all other slots."""
    config = DecodeConfig(8, 4, 8, temperature=0.5, remasking=remasking, recompute="response")
    config = dataclasses.replace(config, stop_ids=tuple(range(0, 256, 3)))
    state, mask_id = pair.start(config), pair.config["mask_token_id"]
    want = np.full(state.tokens.shape, -1.0)
    while (state.block < config.n_blocks).any():
        before, active = np.asarray(state.tokens), np.asarray(state.block) < config.n_blocks
        first = np.asarray(state.block)[:, None] * 4
        state = denoise_step(pair.model, None, state, config=config)
        after = np.asarray(state.tokens)
        for b, prompt in enumerate(pair.prompts):
            ids = torch.from_numpy(np.concatenate([prompt, before[b]]))[None]
            p = pair.network(ids)[0, len(prompt) :].double().softmax(-1).numpy()
            in_block = (np.arange(8) >= first[b]) & (np.arange(8) < first[b] + 4)
            for slot in np.flatnonzero((before[b] == mask_id) & (after[b] != mask_id) & in_block):
                assert active[b]
                want[b, slot] = p[slot, after[b, slot]]
    np.testing.assert_allclose(state.probability, want, rtol=2e-4)
    assert state.probability.dtype == jnp.float32
    assert (want > 0).sum() >= 12
    assert (want == -1).any(), "no text ended in its first block"
