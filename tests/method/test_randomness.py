"""Seeds and keys: every draw has a key of its own, which depends on its request and slot alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax import ConfigError, DecodeConfig, Engine, Request, SelectionConfig, denoise
from pdllm_jax.method import likelihood
from pdllm_jax.method.sampling import CONFIDENCES, predict
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.randomness import random_key
from tests.support.method import BOS, CHUNKS, sharpen

SELECT = SelectionConfig(top_k=2, scorer="random", encoding="independent", encode_batch=3)
DECODE = DecodeConfig(gen_length=12, block_length=4, temperature=0.7)
VOCABULARY = 126_464


@functools.cache
def masking_model():
    """Predicts the mask token often: slots stay masked, and wide steps read earlier blocks."""
    config = dataclasses.replace(ModelConfig.tiny(), n_layers=1)
    model = sharpen(MaskPredictor(config, rngs=nnx.Rngs(0)))
    weight = model.lm_head.weight
    weight[...] = weight[...].at[config.mask_token_id].multiply(8.0)
    return model


def requests(count: int) -> list[Request]:
    rng = np.random.default_rng(3)
    sizes = [(53, 7), (80, 20)][:count]
    return [
        Request(rng.integers(0, 250, n), rng.integers(0, 250, q), [BOS, 3], seed=seed)
        for seed, (n, q) in enumerate(sizes)
    ]


RULES = ({}, {"threshold": 0.3}, {"factor": 1.5}, {"steps": 6})
DREAM = {"schedule": "time", "top_p": 0.9, "scaled_confidence": True, "first_slot_alone": True}


def sampled():
    """Every confidence with every recompute mode; between them, every rule that takes slots."""
    for i, recompute in enumerate(("block", "suffix", "response")):
        for j, remasking in enumerate(CONFIDENCES):
            change = {"recompute": recompute, "remasking": remasking, **RULES[(i + j) % 4]}
            if remasking == "origin":
                change = {**DREAM, **change, "threshold": None, "factor": None}
            slow = (i, j) != (0, 0)  # test_generation_dream.py has draws by "origin"
            name = f"{recompute}-{remasking}"
            yield pytest.param(change, id=name, marks=pytest.mark.slow if slow else ())


def leaves_a_mask(engine: Engine, request: Request) -> bool:
    """Whether a slot of the first or second block is still masked behind it."""
    started = engine.prefill(**request._asdict())
    state, masks = started.state, []
    for block in (1, 2):
        until = jnp.int32(block)
        state = denoise(engine.model, started.cache, state, config=engine.decoding, until=until)
        written = state.tokens[:, : block * engine.decoding.block_length]
        masks.append(bool((written == engine.model.config.mask_token_id).any()))
    return any(masks)


@pytest.mark.parametrize("change", list(sampled()))
def test_sampled_tokens_do_not_depend_on_the_batch(change):
    engine = Engine(masking_model(), None, CHUNKS, SELECT, dataclasses.replace(DECODE, **change))
    asked = requests(2)
    alone = [engine.answer(**request._asdict()) for request in asked]
    together = engine.answer_batch(asked)
    streamed = engine.answer_batch(asked, on_block=lambda *_: None)
    assert any(leaves_a_mask(engine, request) for request in asked)
    assert len({tuple(answer.tokens) for answer in alone}) == len(asked)
    for one, *others in zip(alone, together, streamed, strict=True):
        for other in others:
            assert (other.tokens, other.evaluations) == (one.tokens, one.evaluations)
            assert other.selection["chunks"] == one.selection["chunks"]


@pytest.mark.parametrize("remasking", CONFIDENCES)
def test_a_slot_draws_the_same_in_any_rows(remasking):
    logits, key = jax.random.normal(jax.random.key(0), (10, 50)), random_key(1)
    rule = CONFIDENCES[remasking]()
    whole = predict(logits, rule, 1.0, key)
    some = predict(logits[3:7], rule, 1.0, key, jnp.arange(3, 7))
    for part, rows in zip(whole, some, strict=True):
        np.testing.assert_array_equal(part[3:7], rows)


def test_masks_of_a_likelihood_do_not_depend_on_padding():
    few, many = (
        likelihood.answer_samples(random_key(3), jnp.asarray(5), 12, rows)[0] for rows in (8, 32)
    )
    np.testing.assert_array_equal(few, many[:, :8])


def tail_share(draws: int, dtype: str = "float32") -> float:
    """How often a sample is not the token that has 0.99 of the mass."""
    rows, mass = 64, 0.01
    logits = jnp.full((VOCABULARY,), np.log(mass / (VOCABULARY - 1))).at[777].set(np.log(1 - mass))
    rows_of = jnp.broadcast_to(logits.astype(dtype), (rows, VOCABULARY))
    rule = DecodeConfig().remasking
    count = jax.jit(lambda key: (predict(rows_of, rule, 1.0, key)[0] != 777).sum())
    return sum(int(count(jax.random.key(i))) for i in range(draws // rows)) / draws


@pytest.mark.slow
def test_the_tail_is_drawn_as_often_as_its_mass():
    """126,463 tokens that share 0.01, within 4 standard deviations; mode "low": 0.002 to 0.006."""
    draws = 16_000
    assert abs(tail_share(draws) - 0.01) < 4 * (0.01 * 0.99 / draws) ** 0.5


def test_a_token_is_drawn_that_is_less_probable_than_a_float_resolves():
    """Mode "low" of JAX's noise ends at 16.6; this key has 17.9 at the token, -0.9 at 777."""
    logits = jnp.zeros((1, VOCABULARY)).at[0, 777].set(18.0)
    draw = jax.jit(lambda key: predict(logits, DecodeConfig().remasking, 1.0, key)[0])
    assert draw(random_key(0)).tolist() == [34_629]


def drawn_keys(run) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]]]:
    """Runs a computation; returns the keys drawn from, and the keys that others derive from."""
    drawn: list[tuple[int, ...]] = []
    parents: set[tuple[int, ...]] = set()

    def recording(function, record):
        def call(key, *args, **kwargs):
            note = lambda data: record(tuple(np.asarray(data).tolist()))  # noqa: E731
            jax.debug.callback(note, jax.random.key_data(key))
            return function(key, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("uniform", "gumbel", "randint", "bits", "normal", "permutation"):
            patch.setattr(jax.random, name, recording(getattr(jax.random, name), drawn.append))
        for name in ("fold_in", "split"):
            patch.setattr(jax.random, name, recording(getattr(jax.random, name), parents.add))
        run()
        jax.effects_barrier()
    return drawn, parents


def test_a_key_serves_one_purpose():
    """All draws of an answer and of a log-likelihood with the same seed."""
    # Settings of no other test: they are traced here, with the functions that record.
    decoding = dataclasses.replace(DECODE, temperature=0.71, remasking="random", gen_length=8)
    decoding = dataclasses.replace(decoding, order_temperature=0.5)
    selection = dataclasses.replace(SELECT, encode_batch=2)
    engine = Engine(masking_model(), None, CHUNKS, selection, decoding)
    (request,) = requests(1)

    def run():
        engine.answer(**request._replace(seed=7)._asdict())
        likelihood.answer_log_likelihood(engine.model, [1, 2, 3], [4, 5], samples=11, seed=7)

    drawn, parents = drawn_keys(run)
    evaluations, block = 8, 4
    assert len(drawn) >= 5 + 3 * evaluations * block + 1 + 11  # chunks, slots, counts, masks
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & parents


def test_all_bits_of_a_seed_count():
    """And nothing but a seed of 64 bits passes, by name, before anything is computed."""
    engine = Engine(
        masking_model(), None, CHUNKS, SELECT, DecodeConfig(8, 8, temperature=3.0), bos_id=BOS
    )
    plain = dataclasses.replace(engine, method="plain")
    (request,) = requests(1)
    seeds = (0, 1, 2**32, 7 << 32, 2**63, 2**64 - 1, np.uint64(2**64 - 2))
    answers = engine.answer_batch([request._replace(seed=seed) for seed in seeds])
    assert len({tuple(answer.tokens) for answer in answers}) == len(seeds)
    cache, prompt, question = engine.encode([5] * 40), [1, 2], request.question
    for seed in (-1, 2**64, 1.5, True, "3", None):
        wrong = request._replace(seed=seed)
        for call in (
            lambda: engine.answer(**wrong._asdict()),  # noqa: B023
            lambda: plain.answer(**wrong._asdict()),  # noqa: B023
            lambda: engine.prefill(**wrong._asdict()),  # noqa: B023
            lambda: engine.ask(cache, [question], seeds=[seed]),  # noqa: B023
            lambda: likelihood.answer_log_likelihood(
                engine.model,
                prompt,
                [3],
                seed=seed,  # noqa: B023
            ),
        ):
            with pytest.raises(
                ConfigError, match=r"^seed must be an integer in \[0, 2\*\*64\), got"
            ):
                call()
    for call in (engine.answer_batch, plain.answer_batch):
        with pytest.raises(ConfigError, match=r"^request 1: seed must be"):
            call([request, request._replace(seed=-1)])
    with pytest.raises(ConfigError, match=r"^question 1: seed must be"):
        engine.ask(cache, [question] * 2, seeds=[0, -1])
