"""Dream's sampling, apart from any network, against its definitions in PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax.config import DecodeConfig
from pdllm_jax.method import sampling
from pdllm_jax.method.denoise import denoise
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.sampling import filtered, log_probability
from pdllm_jax.method.unmasking import transfer
from pdllm_jax.method.unmasking.published import float32_linspace
from pdllm_jax.randomness import random_key
from tests.support.method import MASK

torch = pytest.importorskip("torch")


def predict(logits, config, key=None, **more):
    key = random_key(0) if key is None else key
    return sampling.predict(logits, key=key, **config.prediction, **more)[:2]


@pytest.mark.parametrize("eps", [1e-3, 0.0, 0.37])
def test_times_are_those_of_torch(eps):
    for n in (*range(2, 66), 129, 257, 513, 1000):
        want = torch.linspace(1, eps, n).numpy()
        np.testing.assert_array_equal(float32_linspace(1.0, eps, n), want)


@pytest.mark.parametrize(
    ("masks", "steps", "eps"),
    [(32, 32, 1e-3), (20, 7, 1e-3), (256, 100, 1e-3), (5, 9, 1e-3), (16, 16, 0.0), (64, 1, 0.5)],
)
def test_a_step_by_time_takes_its_share_of_the_masks_that_are_left(masks, steps, eps):
    """As published: int() of a float32 tensor; nothing is due in many steps."""
    config = DecodeConfig.dream(max_new_tokens=masks, steps=steps, alg="entropy", eps=eps)
    times, left = torch.linspace(1, eps, steps + 1), masks
    confidence = jax.random.normal(jax.random.key(0), (masks,))
    rule = jax.jit(lambda c, step: transfer(c, step, config.unmasking))
    for i in range(steps):
        share = 1 - times[i + 1] / times[i]
        due = int(torch.tensor(left) * share) if i < steps - 1 else left
        take = np.asarray(rule(confidence, jnp.int32(i)))
        assert take.sum() == due
        left -= due
        confidence = jnp.where(take, -jnp.inf, confidence)
    assert left == 0


def kept_by_torch(logits, top_p, top_k):
    """Dream's filters of models.md: top-p, then top-k, both on the sorted values."""
    x = torch.from_numpy(np.array(logits))
    if top_p is not None:
        values, order = x.sort(stable=True, dim=-1, descending=True)
        before = torch.nn.functional.pad(values.softmax(-1).cumsum(-1)[:, :-1], (1, 0))
        drop = torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, before > top_p)
        x = x.masked_fill(drop, -torch.inf)
    if top_k is not None:
        x = x.masked_fill(x < x.topk(min(top_k, x.shape[-1])).values[:, -1:], -torch.inf)
    return x


FILTERS = [(0.8, None), (None, 3), (0.9, 4), (1e-6, None), (1.0, 1), (0.5, 99), (0.3, 2)]


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_filters_are_dream_s(top_p, top_k):
    """With ties, which top-p breaks by id and top-k keeps, and rows of equal logits."""
    logits = jax.random.normal(jax.random.key(1), (60, 16)) * 3
    logits = jnp.concatenate([logits, jnp.round(logits), jnp.zeros((2, 16))])
    kept = filtered(logits, top_p, top_k)
    np.testing.assert_array_equal(kept, np.isfinite(kept_by_torch(logits, top_p, top_k).numpy()))
    assert kept.any(-1).all()


VALUES = {
    "maskgit_plus": lambda p, tokens: p.gather(-1, tokens[:, None])[:, 0],
    "topk_margin": lambda p, tokens: p.topk(2).values @ torch.tensor([1.0, -1.0]).double(),
    "entropy": lambda p, tokens: torch.special.xlogy(p, p).sum(-1),
}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("alg", VALUES)
def test_confidence_is_that_of_the_scaled_filtered_logits(alg, temperature):
    """And with alg_temp, less the noise, the published value: entropy's is the logarithm here."""
    logits = jax.random.normal(jax.random.key(2), (50, 20)) * 2
    for top_p, top_k in [(None, None), (0.9, None), (0.8, 5)]:
        given = {"alg": alg, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        tokens, got = predict(logits, DecodeConfig.dream(**given))
        left = kept_by_torch(logits / (temperature or 1.0), top_p, top_k).double()
        chosen = torch.from_numpy(np.array(tokens)).long()
        assert torch.isfinite(left.gather(-1, chosen[:, None])).all()
        if temperature == 0:
            np.testing.assert_array_equal(tokens, logits.argmax(-1))
        want = VALUES[alg](left.softmax(-1), chosen).numpy()
        got = got if alg == "entropy" else jnp.exp(got)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_without_scaled_confidence_it_is_that_of_the_logits_as_they_are():
    logits = jax.random.normal(jax.random.key(2), (50, 20)) * 2
    tokens, confidence = predict(logits, DecodeConfig(temperature=0.7, top_p=0.5, top_k=3))
    np.testing.assert_array_equal(confidence, log_probability(logits, tokens))


def in_first_two(weights) -> np.ndarray:
    """How often each slot is among the first two that are drawn without replacement."""
    p = weights / weights.sum()
    after = p[:, None] * p / (1 - p[:, None])  # the first, then the second
    return p + after.sum(axis=0) - np.diag(after)


def draws(run, count: int) -> np.ndarray:
    """The mean of a boolean array over keys."""
    take = jax.jit(lambda keys: jax.vmap(run)(keys).mean(axis=0))
    return np.asarray(take(jax.random.split(jax.random.key(5), count)))


COUNTS = [1000, pytest.param(50_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("alg", VALUES)
def test_alg_temp_draws_slots_by_the_published_confidence(alg, count):
    """Two of four slots from softmax(confidence / alg_temp); within 4.5 standard deviations."""
    logits = jnp.array([[3.0, 0, 0], [1.0, 0.5, 0], [0.2, 0.1, 0], [1.5, 1.4, -2]])
    config = DecodeConfig.dream(max_new_tokens=4, steps=2, alg=alg, alg_temp=0.3, eps=1e-3)
    take = lambda key: sampling.rank(predict(logits, config, key)[1]) < 2  # noqa: E731
    p = torch.from_numpy(np.array(logits)).double().softmax(-1)
    value = VALUES[alg](p, p.argmax(-1)).numpy()
    want = in_first_two(np.exp(value / 0.3))
    np.testing.assert_allclose(draws(take, count), want, atol=4.5 * 0.5 / count**0.5)
    assert np.ptp(want) > 0.2


@pytest.mark.parametrize("count", COUNTS)
def test_origin_takes_each_mask_with_the_share_of_the_step(count):
    """Independently of each other; all of them in the last step; of masks alone."""
    config = DecodeConfig.dream(max_new_tokens=4, steps=3)
    logits = jax.random.normal(jax.random.key(0), (4, 9))
    masked = jnp.array([True, True, True, False])

    def pairs(step):
        def run(key):
            confidence = jnp.where(masked, predict(logits, config, key)[1], -jnp.inf)
            take = transfer(confidence, step, config.unmasking)
            return take[:, None] & take

        return run

    for step in range(3):
        share = [0.333, 0.333 / (1 - 0.333), 1.0][step]  # of eps 0.001
        want = np.full((3, 3), share**2) + np.eye(3) * (share - share**2)
        got = draws(pairs(step), count)
        np.testing.assert_allclose(got[:3, :3], want, atol=4.5 * 0.5 / count**0.5)
        assert not got[3].any()


@pytest.mark.parametrize("count", COUNTS)
def test_filtered_tokens_are_drawn_by_their_softmax(count):
    logits = jnp.array([[0.0, 1.0, 2.0, -1.0]])
    config = DecodeConfig.dream(temperature=1.5, top_p=0.7)
    run = lambda key: predict(logits, config, key)[0] == jnp.arange(4)  # noqa: E731
    want = kept_by_torch(logits / 1.5, 0.7, None).softmax(-1)[0].numpy()
    assert (want > 0).sum() == 2
    np.testing.assert_allclose(draws(run, count), want, atol=4.5 * 0.5 / count**0.5)


@pytest.mark.parametrize("settings", [{"alg_temp": 100.0, "alg": "entropy"}, {"alg": "origin"}])
def test_slots_that_predict_the_end_stay_last(settings):
    """Of 8 masks the 4 that predict EOS are drawn after all others, at any temperature."""
    logits = jnp.zeros((8, 5)).at[::2, 4].set(9.0)
    config = DecodeConfig.dream(max_new_tokens=8, **settings)
    for key in range(5):
        tokens, confidence = predict(logits, config, jax.random.key(key), last=(4,))
        assert np.isfinite(confidence).all()
        assert confidence[tokens == 4].max() < confidence[tokens != 4].min()


def test_the_first_evaluation_of_a_block_fills_its_first_slot_alone(model):
    """One evaluation a block: the masks that it leaves stay, also while later blocks are read."""
    settings = {"max_new_tokens": 12, "block_length": 4, "steps": 5, "dual_cache": True}
    config = DecodeConfig.fast_dllm_dream(alg="entropy", **settings)
    prompts = jax.random.randint(random_key(1), (2, 9), 0, 250)
    state = init_denoise(model, None, None, prompts, config, random_key(0))
    state = denoise(model, None, state, config=config)
    np.testing.assert_array_equal(state.tokens != MASK, [[i % 4 == 0 for i in range(12)]] * 2)
    assert state.evaluations.tolist() == [3, 3]
