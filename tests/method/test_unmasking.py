"""Rules with memory against their published definitions, token for token and step for step.

The oracles run one prompt at a time; the library answers ragged prompts in one padded batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pdllm_jax import ChunkConfig, ConfigError, DecodeConfig, Engine, ModelConfig, SelectionConfig
from pdllm_jax.cli import flags
from pdllm_jax.cli.commands import parser_of
from pdllm_jax.evaluation.arguments import decode_config
from pdllm_jax.method.caches import CACHE_METHODS
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.unmasking import UNMASKING, Custom, Klass, Wino
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.snapshot import pack, unpack
from tests.method.test_generation_dream import Pair as DreamPair
from tests.method.test_generation_published import Pair
from tests.support.method import answer_both, sharp_model, sharpen

torch = pytest.importorskip("torch")

from tests.oracles.llada import LlamaOracle  # noqa: E402
from tests.oracles.rivals import rules  # noqa: E402
from tests.oracles.rivals.cached import DualForward  # noqa: E402

SLOW = pytest.mark.slow
BLOCK = 8
RECOMPUTE = {"plain": "response", "dual": "block", "dream": "response"}

# `DecodeConfig.unmask`, the oracle and its settings, and further settings of `DecodeConfig`.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "eb": ("eb:gamma=2", "entropy_bound", {"gamma": 2.0}, {}),
    "eb by entropy": (
        "eb:gamma=5",
        "entropy_bound",
        {"gamma": 5.0, "order": "entropy"},
        {"remasking": "entropy"},
    ),
    "klass": (
        "klass:threshold=0.3:kl=1",
        "klass",
        {"confidence_threshold": 0.3, "kl_threshold": 1.0},
        {},
    ),
    "klass, three steps": (
        "klass:threshold=0.1:kl=3:history=3",
        "klass",
        {"confidence_threshold": 0.1, "kl_threshold": 3.0, "history": 3},
        {},
    ),
    "credit": ("credit:threshold=0.6", "credit", {"threshold": 0.6}, {}),
    "much credit": (
        "credit:threshold=0.5:alpha=3:boost=1:decay=0.5",
        "credit",
        {"threshold": 0.5, "alpha": 3.0, "gamma": 1.0, "beta": 0.5},
        {},
    ),
    "wino": (
        "wino:threshold=0.3:threshold_back=0.5",
        "wino",
        {"threshold": 0.3, "threshold_back": 0.5},
        {},
    ),
    "wino, doubtful": (
        "wino:threshold=0.2:threshold_back=0.9",
        "wino",
        {"threshold": 0.2, "threshold_back": 0.9},
        {},
    ),
}
QUICK = [("eb", "dual"), ("klass", "plain"), ("much credit", "dual"), ("wino", "dual")]
ROWS = [(case, how) for how in RECOMPUTE for case in CASES if (how, case[:4]) != ("dream", "wino")]
ROWS = [pytest.param(*row, marks=() if row in QUICK else SLOW) for row in ROWS]


@functools.cache
def pair_of(seed: int, mask: float = 1.0) -> tuple[Pair, LlamaOracle]:
    """The pair and its network as a plain forward. mask: factor on the mask's logit."""

    def scale(tensors: dict[str, Any], mask_id: int) -> None:
        tensors["model.transformer.ff_out.weight"][mask_id] *= mask
        kept.update(tensors)

    kept: dict[str, Any] = {}
    pair = Pair(seed, change=scale)
    return pair, LlamaOracle(kept, pair.config)


def compare(case: str, how: str, seed: int, length: int = 16, mask: float = 1.0) -> list[rules.Run]:
    """Compares the answers to all prompts whose decisions are clear, most of them; returns runs."""
    rule, name, settings, more = CASES[case]
    if how == "dream":
        pair: Any = DreamPair(seed)
        forward = lambda ids: torch.cat([(x := pair.qwen(ids))[:, :1], x[:, :-1]], 1)  # noqa: E731
    else:
        pair, forward = pair_of(seed, mask)
    mask_id, runs = pair.config["mask_token_id"], []
    for prompt in pair.prompts:
        if how == "dual":
            starts = range(len(prompt), len(prompt) + length, BLOCK)
            blocks = [(start, start + BLOCK) for start in starts]
            forward = DualForward(pair.network, blocks, mask_id)
        sizes = {"gen_length": length, "block_length": BLOCK, "mask_id": mask_id}
        ids = torch.from_numpy(np.asarray(prompt, np.int64))
        runs.append(getattr(rules, name)(forward, ids, **sizes, **settings))
    config = DecodeConfig(length, BLOCK, unmask=rule, recompute=RECOMPUTE[how], **more)
    state, clear = pair.denoise(config), 0
    for run, tokens, evaluations in zip(runs, state.tokens, state.evaluations, strict=True):
        if run.closest > 1e-5:
            assert tokens.tolist() == run.tokens[-length:].tolist()
            assert int(evaluations) == run.evaluations
            clear += 1
    assert clear >= 2
    return runs


@pytest.mark.parametrize(("case", "how"), ROWS)
def test_a_rule_equals_its_definition(case, how):
    runs = compare(case, how, seed=2)
    assert any(len(slots) > 1 for run in runs for slots in run.taken)
    assert any(any(run.masked_again) for run in runs) == case.startswith("wino")


@SLOW
@pytest.mark.parametrize("seed", [0, 2, 6])
@pytest.mark.parametrize("case", ["eb", "klass", "wino"])
def test_predicted_mask_tokens(case, seed):
    """A slot filled with one is open to the next block's steps, or stays masked, as published."""
    compare(case, "plain", seed, length=24, mask=1.5)


@SLOW
@pytest.mark.parametrize("case", ["eb", "klass", "much credit", "wino"])
def test_steps_by_hand_equal_the_loop_on_the_device(case):
    """Also after the state went through a snapshot's form."""
    rule, _, _, more = CASES[case]
    config, (pair, _) = DecodeConfig(16, BLOCK, unmask=rule, **more), pair_of(2)
    want, state = pair.denoise(config), pair.start(config)
    for step in range(int(want.evaluations.max())):
        state = denoise_step(pair.model, None, state, config=config)
        if step == 3:
            arrays, content = pack(state)
            state = unpack(content, type(state), arrays)
    np.testing.assert_array_equal(state.tokens, want.tokens)
    np.testing.assert_array_equal(state.probability, want.probability)
    by_blocks = pair.start(config)
    for block in (1, 2):
        until = np.int32(block)
        by_blocks = denoise(pair.model, None, by_blocks, config=config, until=until)
    np.testing.assert_array_equal(by_blocks.tokens, want.tokens)


@pytest.mark.parametrize(
    ("case", "recompute"),
    [
        ("wino", "block"),
        *(pytest.param(case, "block", marks=SLOW) for case in ("eb", "klass", "much credit")),
        pytest.param("wino", "suffix", marks=SLOW),
        pytest.param("klass", "suffix", marks=SLOW),
    ],
)
def test_requests_about_chunks_are_answered_as_if_each_were_alone(case, recompute):
    """Prefilling-dLLM; a second request of the bucket compiles nothing."""
    rule, _, _, more = CASES[case]
    engine = Engine(
        sharp_model(),
        chunking=ChunkConfig(16),
        selection=SelectionConfig(top_k=2, scorer="bm25", encoding="independent"),
        decoding=DecodeConfig(16, BLOCK, unmask=rule, recompute=recompute, **more),
    )
    rng = np.random.default_rng(0)
    sizes = ((60, 7, 3), (50, 5, 2), (64, 8, 4))
    requests = [tuple(rng.integers(0, 250, n).tolist() for n in size) for size in sizes]
    pairs = answer_both(engine, requests)
    assert pairs[1][0].timings["compile"] == 0
    for alone, together in pairs:
        assert (together.tokens, together.evaluations) == (alone.tokens, alone.evaluations)


def test_existing_rules_read_nothing():
    """Their step holds no memory, and no logits of slots that it does not fill."""
    pair, _ = pair_of(2)
    state = pair.start(DecodeConfig(16, BLOCK, threshold=0.9))
    assert state.rule_memory is None
    rows = jax.tree.map(lambda x: x.shape, pair.start(DecodeConfig(16, BLOCK, unmask="klass")))
    assert rows.rule_memory == ((3, 16, pair.config["embedding_size"]), (3, 16, 2))


REFUSED = [
    ({"unmask": "wino", "guidance": 1.0, "recompute": "response"}, "guidance .*'wino'"),
    ({"unmask": "wino", "first_slot_alone": True}, "first_slot_alone .*'wino'"),
    ({"unmask": "wino", "recompute": CACHE_METHODS["sparse-dllm"]()}, "'sparse-dllm' .*'wino'"),
    ({"unmask": "wino", "steps": 32}, "unmask excludes steps"),
    ({"unmask": "klass", "threshold": 0.5}, "unmask excludes steps, threshold"),
    ({"unmask": "eb:gama=1"}, r"unmask 'eb' has no setting 'gama' \(gamma\)"),
    ({"unmask": "eb:gamma=-1"}, "eb gamma must be a number from 0"),
    ({"unmask": "dynamic"}, r"unmask 'dynamic' is not known \(eb, klass, wino, credit\)"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DecodeConfig(**settings)


def test_wino_refuses_a_logit_shift():
    with pytest.raises(ConfigError, match=r"unmask 'wino' needs .*, without a logit shift"):
        Wino().check(ModelConfig.dream_7b())


def test_flags_and_arguments_of_lm_eval():
    argv = [
        "checkpoint",
        "--prompt-ids",
        "F",
        "--unmask",
        "klass:kl=0.1",
        "--steps",
        "8",
        "--gen-length",
        "16",
    ]
    given = flags.engine_settings(parser_of("answer", None).parse_args(argv))["decoding"]
    assert given == DecodeConfig(16, 16, steps=8, unmask=Klass(kl=0.1))
    model = {"unmask": "klass:kl=0.1", "steps": 8}
    assert decode_config(16, 32, model, {}) == given
    assert decode_config(16, 32, model, {"unmask": "eb"}) == DecodeConfig(16, 16, unmask="eb")


@pytest.mark.parametrize("name", UNMASKING)
def test_rules_are_settings(name):
    config = DecodeConfig(unmask=name)
    assert not config.has_code
    assert DecodeConfig.from_flat(**config.to_flat()) == config
    assert DecodeConfig(unmask=str(config.unmask)) == config
    assert isinstance(DecodeConfig(unmask=max).unmasking, Custom)


def test_shadow_rows_see_the_chunks():
    """With one layer KV depends on token and position alone, so chunks equal a whole prompt."""
    config = dataclasses.replace(ModelConfig.tiny(), n_layers=1)
    model = sharpen(MaskPredictor(config, rngs=nnx.Rngs(0)))
    rule = {"unmask": "wino:threshold=0.05:threshold_back=0.3", "recompute": "block"}
    selection = SelectionConfig(
        top_k=4, scorer="all", encoding="independent", positions="contiguous"
    )
    engines = [
        Engine(
            model,
            chunking=ChunkConfig(16, anchors=False),
            selection=selection,
            decoding=DecodeConfig(16, BLOCK, **rule),
            method=method,
        )
        for method in ("prefilling", "dual-cache")
    ]
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 250, n).tolist() for n in (60, 7, 3)]
    chunked, whole = (engine.answer(*parts[:2], prefix=parts[2]) for engine in engines)
    assert (chunked.tokens, chunked.evaluations) == (whole.tokens, whole.evaluations)
