"""LLaDA's Monte Carlo log-likelihood: against the published estimate in PyTorch, and exactly."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pdllm_jax import ChunkConfig, ConfigError, DecodeConfig, SelectionConfig, chunk_prompt
from pdllm_jax.method import likelihood as ll
from pdllm_jax.method.live_forward import Context, live_forward, query_rows
from tests.support.method import first_state, tiny_model

torch = pytest.importorskip("torch")
from tests.oracles.llada import LlamaOracle  # noqa: E402
from tests.support.models import model_from_tensors  # noqa: E402

PROMPT = [256, 5, 6, 7, 80, 81, 9, 12, 200]
ANSWER = [40, 41, 42, 40, 99]


SIZES = {
    "llada": {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1},
    "dream": {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2},
}


@pytest.fixture
def both(make_checkpoint, request):
    """The library's model and the oracle of the same tensors; small, for much is compiled here."""
    family = getattr(request, "param", "llada")
    made = make_checkpoint(family=family, **SIZES[family])
    tensors = made.tensors, made.config
    return model_from_tensors(*tensors), LlamaOracle(*tensors)


def term(model, oracle: LlamaOracle, prompt, answer, masked, guidance=0.0) -> float:
    """-cross-entropy of the masked tokens times L / k, as eval_llada.py computes it.

    Its get_logits masks the prompt for the unconditional logits u: u + (cfg + 1) (logits - u).
    """
    mask_id = model.config.mask_token_id
    noisy = [mask_id if hidden else token for token, hidden in zip(answer, masked, strict=True)]
    prompts = [*prompt, *noisy], [*[mask_id] * len(prompt), *noisy]
    logits, blind = (oracle(torch.tensor([ids]))[0].double() for ids in prompts)
    guided = blind + (guidance + 1) * (logits - blind)
    found = torch.log_softmax(guided, -1).numpy()[len(prompt) - model.config.logit_shift :]
    total = sum(found[i, token] for i, token in enumerate(answer) if masked[i])
    return total * len(answer) / sum(masked)


ESTIMATES = [("llada", *plan) for plan in ((12, 5, 0.0), (7, 3, 0.0), (6, 3, 0.5), (4, 4, 2.0))]


@pytest.mark.parametrize(
    ("both", "samples", "group", "guidance"),
    [*ESTIMATES, ("dream", 12, 5, 0.0), ("dream", 6, 3, 0.5)],
    indirect=["both"],
)
def test_the_estimate_is_the_published_one(both, samples, group, guidance):
    model, oracle = both
    masks, _ = ll.answer_samples(jax.random.key(3), jnp.asarray(len(ANSWER)), samples, 32)
    drawn = np.asarray(masks)[:, : len(ANSWER)].tolist()
    want = np.mean([term(model, oracle, PROMPT, ANSWER, mask, guidance) for mask in drawn])
    plan = {"samples": samples, "group": group, "seed": 3}
    got = ll.answer_log_likelihood(model, PROMPT, ANSWER, guidance=guidance, **plan)
    assert got == pytest.approx(want, rel=1e-4)


def test_its_mean_is_over_all_masks(both):
    """By enumeration: 1/L sum over k of L/k, averaged over the subsets of k tokens."""
    model, oracle = both
    answer = ANSWER[:3]
    want = 0.0
    for k in (1, 2, 3):
        terms = [
            term(model, oracle, PROMPT, answer, [i in chosen for i in range(3)])
            for chosen in itertools.combinations(range(3), k)
        ]
        want += np.mean(terms) / 3
    got = ll.answer_log_likelihood(model, PROMPT, answer, samples=3000, group=60)
    assert got == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("length", [1, 3, 8, 32])
def test_masks_are_spread_evenly(length):
    """Every count as often as every other, but for what rounding halves to even numbers does."""
    masked, counts = ll.answer_samples(jax.random.key(0), jnp.asarray(length), 96, 32)
    masked, counts = np.asarray(masked), np.asarray(counts)
    assert (masked.sum(axis=1) == counts).all()
    assert not masked[:, length:].any()
    times = np.bincount(counts, minlength=length + 1)[1:]
    assert times.min() >= math.floor(96 / length) - 1
    assert times.max() <= math.ceil(96 / length) + 1
    share = masked[:, :length].mean(axis=0)
    assert (abs(share - (length + 1) / (2 * length)) < 0.2).all()
    other, _ = ll.answer_samples(jax.random.key(1), jnp.asarray(length), 96, 32)
    assert length == 1 or (np.asarray(other) != masked).any()


def test_logits_exist_for_masked_rows_alone(both, monkeypatch):
    model, _ = both
    monkeypatch.setattr(ll, "_LOGIT_ROWS", 4)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 6, 32)).astype(np.float32)
    masked = rng.random((3, 6)) < 0.4
    hidden[~masked] = np.nan  # of these, nothing may be read
    targets = jnp.asarray(rng.integers(0, 250, 6))
    got = ll.masked_log_likelihood(model, jnp.asarray(hidden), targets, jnp.asarray(masked))
    rows = model.logits(model.final_norm(jnp.nan_to_num(hidden)))
    known = jax.nn.log_softmax(rows)[:, jnp.arange(6), targets]
    assert np.asarray(got) == pytest.approx(np.where(masked, known, 0).sum(axis=1), rel=1e-4)
    program = jax.make_jaxpr(
        lambda h: ll.masked_log_likelihood(model, h, targets, jnp.asarray(masked))
    )(jnp.asarray(hidden))
    assert set(re.findall(r"f32\[(\d+),272\]", str(program))) == {"4"}


SETTINGS = SelectionConfig(top_k=2, scorer="last", encode_batch=2)


ENCODINGS = [("llada", name) for name in ("joint", "independent", "query-conditioned")]


@pytest.mark.parametrize(
    ("both", "encoding"), [*ENCODINGS, ("dream", "independent")], indirect=["both"]
)
def test_kept_chunks_are_attended_to_as_in_a_step(both, encoding):
    """A one-token answer is all masked: what the first evaluation of a response predicts."""
    model, query = both[0], [7, 8, 9]
    document = np.random.default_rng(1).integers(0, 250, 70)
    prompt = chunk_prompt([256, 3], document, query, ChunkConfig(16))
    config = dataclasses.replace(SETTINGS, encoding=encoding)
    kept = ll.keep_context(model, prompt, config)
    got = ll.answer_log_likelihood_kept(model, kept, query, [33], samples=2, group=2)
    decode = DecodeConfig(1, 1, recompute="response")
    state = first_state(model, kept.cache, kept.selection, prompt, decode, settings=kept.settings)

    @jax.jit
    def evaluation(state):
        context = Context(state.pool_in(kept.cache), state.placement, state.live)
        x, _, _ = live_forward(model, context, query_rows(state).ids)
        row = len(query) - model.config.logit_shift
        return jax.nn.log_softmax(model.logits(model.final_norm(x[0, row])))

    assert got == pytest.approx(float(evaluation(state)[33]), rel=1e-4)


def test_everything_kept_is_the_whole_prompt(both):
    """All chunks, joint encoding, no anchors: the same forward for an answer that is all masked."""
    model, prefix, query = both[0], [256, 3], [7, 8, 9]
    document = np.random.default_rng(2).integers(0, 250, 48)
    prompt = chunk_prompt(prefix, document, query, ChunkConfig(16, anchors=False))
    kept = ll.keep_context(model, prompt, dataclasses.replace(SETTINGS, top_k=3))
    got = ll.answer_log_likelihood_kept(model, kept, query, [33], samples=1)
    whole = ll.answer_log_likelihood(model, [*prefix, *document, *query], [33], samples=1)
    assert got == pytest.approx(whole, rel=1e-4)
    with pytest.raises(ConfigError, match="0 for kept chunks"):
        ll.answer_log_likelihood_kept(model, kept, query, [33], samples=1, guidance=0.5)


@pytest.mark.parametrize(
    ("answer", "plan", "message"),
    [
        ([], {}, "answer is empty"),
        ([10**6], {}, "outside the vocabulary"),
        ([1], {"samples": 0}, "must be positive"),
        ([1], {"group": 0}, "must be positive"),
        ([1], {"guidance": -1.0}, "guidance of a log-likelihood must be at least 0"),
    ],
)
def test_wrong_answers_are_refused(answer, plan, message):
    with pytest.raises(ValueError, match=message):
        ll.answer_log_likelihood(tiny_model(), [1], answer, **plan)


@pytest.mark.parametrize(
    "change", [{"keep_tokens": 8}, {"encoding": "bridge"}, {"scorer": "oracle"}]
)
def test_settings_without_an_estimate_are_refused(change):
    prompt = chunk_prompt([1], list(range(40)), [2], ChunkConfig(16))
    with pytest.raises(ConfigError, match="not implemented"):
        ll.keep_context(tiny_model(), prompt, dataclasses.replace(SETTINGS, **change))
