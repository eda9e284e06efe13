"""The sampling rule, apart from any network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.method import sampling
from pdllm_jax.method.sampling import log_probability


def predict(logits, config, key):
    return sampling.predict(logits, config.remasking, config.temperature, key)


def transfer(confidence, step, config):
    return sampling.transfer(confidence, step, config.unmasking)


def test_log_probability_keeps_the_order_of_confident_slots():
    """Against float64; the winners' probabilities differ from 1 by 1e-7 to 1e-13."""
    gaps = np.array([16.0, 20.0, 24.0, 30.0])
    logits = np.zeros((4, 5))
    logits[:, 2] = gaps + 10
    logits[:, [0, 1, 3, 4]] = 10
    got = log_probability(jnp.asarray(logits, jnp.float32), jnp.full(4, 2))
    np.testing.assert_allclose(got, -np.log1p(4 * np.exp(-gaps)), rtol=1e-5)
    assert (np.diff(got) > 0).all()


def test_log_probability_of_any_token():
    logits = np.random.default_rng(0).normal(size=(3, 50)) * 30
    for token in (0, 7, 49):
        want = logits[:, token] - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
        got = log_probability(jnp.asarray(logits, jnp.float32), jnp.full(3, token))
        np.testing.assert_allclose(got, want - logits.max(1), rtol=1e-5)


def test_temperature_samples_from_the_scaled_softmax():
    """Gumbel noise of scale T on the logits draws from softmax(logits / T)."""
    logits = jnp.array([[0.0, 1.0, 2.0]])
    config = DecodeConfig(temperature=2.0)
    draw = jax.jit(jax.vmap(lambda key: predict(logits, config, key)))
    tokens, confidence = draw(jax.random.split(jax.random.key(0), 20000))
    share = np.bincount(np.asarray(tokens)[:, 0], minlength=3) / 20000
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0] / 2), atol=0.015)
    # Confidence comes from the unscaled logits.
    want = jax.nn.log_softmax(logits[0])[tokens[:, 0]]
    np.testing.assert_allclose(confidence[:, 0], want, rtol=1e-5)


def test_zero_temperature_ignores_the_key():
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    a, b = (predict(logits, DecodeConfig(), jax.random.key(i))[0] for i in (1, 2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, logits.argmax(-1))


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_margin_and_entropy_by_their_definitions(scale):
    logits = scale * jax.random.normal(jax.random.key(0), (50, 12))
    logits = logits.at[:, 3].set(-jnp.inf)
    wide = np.asarray(logits, np.float64)
    behind = wide.max(-1, keepdims=True) - wide
    odds = np.sort(np.exp(-behind), axis=-1)[:, :-1].sum(-1, keepdims=True)
    log_p = np.where(np.isfinite(behind), -behind, 0) - np.log1p(odds)
    p = np.where(np.isfinite(behind), np.exp(log_p), 0)
    ordered = np.sort(p, axis=-1)
    tokens, margin = predict(logits, DecodeConfig(remasking="margin"), jax.random.key(1))
    np.testing.assert_array_equal(tokens, wide.argmax(-1))
    np.testing.assert_allclose(np.exp(margin), ordered[:, -1] - ordered[:, -2], rtol=2e-5)
    entropy = predict(logits, DecodeConfig(remasking="entropy"), jax.random.key(1))[1]
    np.testing.assert_allclose(entropy, (p * log_p).sum(-1), rtol=2e-5, atol=1e-37)


def test_a_tie_has_no_margin_but_stays_a_candidate():
    tied = jnp.array([[1.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    for remasking in ("margin", "entropy"):
        config = DecodeConfig(gen_length=2, block_length=2, steps=2, remasking=remasking)
        confidence = predict(tied, config, jax.random.key(0))[1]
        assert np.isfinite(confidence).all()
        assert transfer(confidence, jnp.int32(0), config).tolist() == [False, True]
        alone = jnp.where(jnp.array([True, False]), confidence, -jnp.inf)
        assert transfer(alone, jnp.int32(1), config).tolist() == [True, False]


@pytest.mark.parametrize("remasking", ["margin", "entropy"])
def test_very_sure_slots_keep_their_order(remasking):
    """A float32 probability would call all of them 1."""
    logits = jnp.zeros((3, 4)).at[:, 1].set(jnp.array([30.0, 34.0, 26.0]))
    config = DecodeConfig(remasking=remasking)
    assert np.argsort(predict(logits, config, jax.random.key(0))[1]).tolist() == [2, 0, 1]


def test_random_remasking_orders_by_chance():
    logits = jax.random.normal(jax.random.key(0), (6, 9))
    config = DecodeConfig(remasking="random")
    orders = {
        tuple(np.argsort(predict(logits, config, jax.random.key(i))[1]).tolist()) for i in range(8)
    }
    assert len(orders) > 4


@pytest.mark.parametrize(("length", "steps"), [(8, 8), (8, 3), (8, 5), (6, 12), (7, 1)])
def test_schedule_spreads_the_block_with_the_rest_first(length, steps):
    config = DecodeConfig(gen_length=length, block_length=length, steps=steps)
    confidence = jnp.asarray(np.random.default_rng(0).normal(size=length) - 9, jnp.float32)
    counts = []
    for step in range(steps):
        keep = transfer(confidence, jnp.int32(step), config)
        best = np.argsort(-np.asarray(confidence))[: int(keep.sum())]
        assert set(np.flatnonzero(keep)) == set(best)
        counts.append(int(keep.sum()))
        confidence = jnp.where(keep, -jnp.inf, confidence)
    want = [length // steps + (i < length % steps) for i in range(steps)]
    assert counts == want
    assert sum(counts) == length


def test_threshold_keeps_the_best_whatever_it_is():
    config = DecodeConfig(gen_length=4, block_length=4, threshold=0.9)
    low = jnp.log(jnp.array([0.2, 0.5, 0.1, 0.3]))
    assert transfer(low, jnp.int32(0), config).tolist() == [False, True, False, False]
    high = jnp.log(jnp.array([0.95, 0.5, 0.9001, 0.3])).at[3].set(-jnp.inf)
    assert transfer(high, jnp.int32(0), config).tolist() == [True, False, True, False]


def test_ties_go_to_the_lower_slot_and_no_candidate_is_invented():
    config = DecodeConfig(gen_length=4, block_length=4, steps=2)
    tied = jnp.array([-1.0, -1.0, -1.0, -jnp.inf])
    assert transfer(tied, jnp.int32(0), config).tolist() == [True, True, False, False]
    nothing = jnp.full(4, -jnp.inf)
    for rule in ({"steps": 1}, {"threshold": 0.1}, {"factor": 2.0}):
        config = DecodeConfig(gen_length=4, block_length=4, **rule)
        assert not transfer(nothing, jnp.int32(0), config).any()
