"""The sampling rule, apart from any network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.method import sampling
from pdllm_jax.method.sampling import log_probability
from pdllm_jax.method.unmasking import transfer as transfer_by


def predict(logits, key=0, **settings):
    config = DecodeConfig(**settings)
    key = jax.random.key(key) if isinstance(key, int) else key
    return sampling.predict(logits, key=key, **config.prediction)[:2]


def transfer(confidence, step=0, **settings):
    """Of one block, as long as the confidences."""
    config = DecodeConfig(len(confidence), len(confidence), **settings)
    return transfer_by(confidence, jnp.int32(step), config.unmasking).tolist()


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
    draw = jax.jit(jax.vmap(lambda key: predict(logits, key, temperature=2.0)))
    tokens, confidence = draw(jax.random.split(jax.random.key(0), 20000))
    share = np.bincount(np.asarray(tokens)[:, 0], minlength=3) / 20000
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0] / 2), atol=0.015)
    # Confidence comes from the unscaled logits.
    want = jax.nn.log_softmax(logits[0])[tokens[:, 0]]
    np.testing.assert_allclose(confidence[:, 0], want, rtol=1e-5)


def test_zero_temperature_ignores_the_key():
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    a, b = (predict(logits, key)[0] for key in (1, 2))
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
    tokens, margin = predict(logits, remasking="margin")
    np.testing.assert_array_equal(tokens, wide.argmax(-1))
    np.testing.assert_allclose(np.exp(margin), ordered[:, -1] - ordered[:, -2], rtol=2e-5)
    entropy = predict(logits, remasking="entropy")[1]
    np.testing.assert_allclose(entropy, (p * log_p).sum(-1), rtol=2e-5, atol=1e-37)


@pytest.mark.parametrize("remasking", ["margin", "entropy"])
def test_a_tie_has_no_margin_but_stays_a_candidate(remasking):
    tied = jnp.array([[1.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
    confidence = predict(tied, remasking=remasking)[1]
    assert np.isfinite(confidence).all()
    assert transfer(confidence, steps=2) == [False, True]
    assert transfer(confidence.at[1].set(-jnp.inf), 1, steps=2) == [True, False]


@pytest.mark.parametrize("remasking", ["margin", "entropy"])
def test_very_sure_slots_keep_their_order(remasking):
    """A float32 probability would call all of them 1."""
    logits = jnp.zeros((3, 4)).at[:, 1].set(jnp.array([30.0, 34.0, 26.0]))
    assert np.argsort(predict(logits, remasking=remasking)[1]).tolist() == [2, 0, 1]


def test_random_remasking_orders_by_chance():
    logits = jax.random.normal(jax.random.key(0), (6, 9))
    confidences = [predict(logits, key, remasking="random")[1] for key in range(8)]
    assert len({tuple(np.argsort(x).tolist()) for x in confidences}) > 4


def test_ties_go_to_the_lower_slot():
    tied = jnp.array([-1.0, -1.0, -1.0, -jnp.inf])
    assert transfer(tied, steps=2) == [True, True, False, False]
