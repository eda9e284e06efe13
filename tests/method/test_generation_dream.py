"""Dream's generation and Fast-dLLM's caches on Dream against the published ones, token for token.

And the method's identities under the logit shift, where the published algorithms are the reference.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import convert
from pdllm_jax import ChunkConfig, DecodeConfig, Engine, Request, SelectionConfig, load_model
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from tests.support.models import model_from_tensors

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream  # noqa: E402
from tests.oracles.checkpoints import is_tied  # noqa: E402
from tests.oracles.llada import LlamaOracle  # noqa: E402

SLOW = pytest.mark.slow
LENGTHS = (11, 1, 8)  # of the prompts of a batch
CLEAR = 1e-5  # confidences that decide differ by more
CACHES = {False: dream.prefix_cache, True: dream.dual_cache}  # by dual_cache
SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}


class Pair:
    """The same random network twice: in PyTorch, and `model` in JAX; and some prompts.

    mask: factor on the mask's logit. Where masks are predicted, Fast-dLLM's loop never ends.
    qwen: transformers'. network: the one with explicit keys and values.
    """

    def __init__(self, seed: int = 0, mask: float = 0.3, **changes):
        self.config = checkpoints.tiny_dream_config(**changes)
        tensors = checkpoints.random_tensors(self.config, seed)
        head = tensors[("model.embed_tokens" if is_tied(self.config) else "lm_head") + ".weight"]
        head[self.config["mask_token_id"]] *= mask
        self.tensors = tensors
        self.qwen, self.network = (
            kind(tensors, self.config) for kind in (LlamaOracle, dream.Network)
        )
        self.model = model_from_tensors(tensors, self.config)
        rng = np.random.default_rng(seed)
        self.prompts = [rng.integers(0, checkpoints.N_BYTES, n) for n in LENGTHS]

    def published(self, prompt, **settings) -> dream.Generated:
        """Of `DecodeConfig.dream`'s or `fast_dllm_dream`'s settings, the latter with dual_cache."""
        settings = {"mask_id": self.config["mask_token_id"], **settings}
        settings["gen_length"] = settings.pop("max_new_tokens")
        ids = torch.from_numpy(np.asarray(prompt, np.int64))
        if "dual_cache" in settings:
            return CACHES[settings.pop("dual_cache")](self.network, ids, **settings)
        return dream.generate(self.qwen, ids, **settings)

    def start(self, config: DecodeConfig, prompts=None, seed: int = 0, padding: int = 2):
        """The state for the prompts in one padded batch."""
        prompts = self.prompts if prompts is None else prompts
        padded = np.zeros((len(prompts), max(map(len, prompts)) + padding), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = jnp.asarray([len(prompt) for prompt in prompts])
        inputs = jnp.asarray(padded), config, jax.random.key(seed)
        return init_denoise(self.model, None, None, *inputs, query_length=lengths)

    def denoise(self, config: DecodeConfig, *inputs, **settings):
        return denoise(self.model, None, self.start(config, *inputs, **settings), config=config)

    def compare(self, **settings) -> int:
        """Returns how many responses were compared: those whose decisions are clear."""
        kind = DecodeConfig.fast_dllm_dream if "dual_cache" in settings else DecodeConfig.dream
        runs = [self.published(prompt, **settings) for prompt in self.prompts]
        state, clear = self.denoise(kind(**settings)), 0
        for prompt, run, tokens, evaluations in zip(
            self.prompts, runs, state.tokens, state.evaluations, strict=True
        ):
            if run.closest > CLEAR:
                assert tokens.tolist() == run.tokens[len(prompt) :].tolist()
                assert int(evaluations) == run.evaluations
                clear += 1
        return clear


@functools.cache
def pair_of(shape: str = "GQA", seed: int = 0) -> Pair:
    return Pair(seed, **SHAPES[shape])


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_of()


def test_what_is_compared_differs(pair):
    """Orders, caches and prompts have different answers: else little would be compared."""
    algs = ("maskgit_plus", "topk_margin", "entropy")
    cases = [{"alg": alg, "steps": 9} for alg in algs]
    cached = itertools.product(CACHES, ("confidence_threshold", "entropy"))
    cases += [
        {"dual_cache": dual, "alg": alg, "steps": 24, "block_length": 8} for dual, alg in cached
    ]
    responses = [
        tuple(pair.published(prompt, max_new_tokens=24, **case).tokens[len(prompt) :].tolist())
        for case in cases
        for prompt in pair.prompts
    ]
    assert len(set(responses)) == len(responses)
    assert all(len(set(response)) > 6 for response in responses)


# Dream's own generation: settings, and those of the rows that run by default.
ALGS = ("maskgit_plus", "topk_margin", "entropy")
FILTERS = ({}, {"top_p": 0.9}, {"top_k": 5}, {"top_p": 0.8, "top_k": 7})
STEPS = {1: (16,), 5: (16,), 7: (16, 24), 16: (16,), 40: (24,)}  # response lengths of each
OWN = [
    {"max_new_tokens": length, "steps": steps, "alg": alg, **only}
    for steps, lengths in STEPS.items()
    for length, alg, only in itertools.product(lengths, ALGS, FILTERS)
]
OWN += [{"max_new_tokens": 16, "steps": 7, "alg": alg, "eps": 0.2} for alg in ALGS]
OWN_QUICK = [
    {"max_new_tokens": 16, "steps": 7, "alg": "entropy"},
    {"max_new_tokens": 16, "steps": 7, "alg": "topk_margin", "top_k": 5},
    {"max_new_tokens": 24, "steps": 40, "alg": "maskgit_plus", "top_p": 0.8, "top_k": 7},
]
# Fast-dLLM's: blocks, rules and filters.
RULES = [{"alg": "confidence_threshold", "threshold": x} for x in (0.3, 0.6, 0.9)]
RULES += [{"alg": "entropy", "steps": x} for x in (3, 6, 15, 24, 36)]
FAST = [
    {"max_new_tokens": 24, "dual_cache": dual, "block_length": block, "steps": 24, **rule, **only}
    for dual, block, rule in itertools.product(CACHES, (8, 24, 4, 1), RULES)
    if rule.get("steps", 24) * block % 24 == 0  # blocks divide steps
    for only in (FILTERS if block == 8 else FILTERS[:1])
]
FAST_BASE = {"max_new_tokens": 24, "block_length": 8, "steps": 24}
FAST_QUICK = [
    {**FAST_BASE, "dual_cache": False, "alg": "confidence_threshold", "threshold": 0.6},
    {**FAST_BASE, "dual_cache": True, "alg": "confidence_threshold", "threshold": 0.3},
    {**FAST_BASE, "dual_cache": True, "alg": "entropy", "steps": 15},
]


def name_of(settings) -> str:
    return "-".join(f"{name}={value}" for name, value in settings.items())


@pytest.mark.parametrize("settings", OWN_QUICK + FAST_QUICK, ids=name_of)
def test_generation_is_the_published_one(pair, settings):
    assert pair.compare(**settings) == len(LENGTHS)


EVERYWHERE = [("GQA", settings) for settings in OWN + FAST]
EVERYWHERE += itertools.product(("MHA", "MQA, tied"), (OWN + FAST)[::4])


@SLOW
@pytest.mark.parametrize(("shape", "settings"), EVERYWHERE, ids=str)
def test_generation_is_the_published_one_everywhere(shape, settings):
    """Of several networks, which share a program."""
    compared = sum(pair_of(shape, seed).compare(**settings) for seed in range(4))
    assert compared >= 5, f"{compared} of 12 responses have clear decisions"


def test_predicted_masks_stay_open_as_published():
    """And a later step, or none, fills them."""
    pair, settings = Pair(mask=2.5), OWN_QUICK[0]
    assert pair.compare(**settings) == len(LENGTHS)
    tokens = pair.denoise(DecodeConfig.dream(**settings)).tokens
    assert (tokens == pair.config["mask_token_id"]).any()


class Replayed(dream.Draws):
    """Draws of "origin" that take the masks that our steps took, each bool [prompt + response]."""

    def __init__(self, steps):
        self.steps = iter(steps)

    def uniform(self, masks: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.where(next(self.steps)[masks], 0.0, 0.9999))


def test_origin_is_the_published_one_for_the_same_draws(pair):
    """The tokens, given which masks were drawn; and each is drawn as often as it should be."""
    settings = {"max_new_tokens": 16, "steps": 5, "alg": "origin"}
    config, mask_id = DecodeConfig.dream(**settings), pair.config["mask_token_id"]
    drawn, masked = np.zeros(5), np.zeros(5)
    for seed in range(12):
        state, steps = pair.start(config, seed=seed), []
        for _ in range(5):
            before = np.asarray(state.tokens) == mask_id
            state = denoise_step(pair.model, None, state, config=config)
            steps.append(before & (np.asarray(state.tokens) != mask_id))
            drawn[len(steps) - 1] += steps[-1].sum()
            masked[len(steps) - 1] += before.sum()
        for b, prompt in enumerate(pair.prompts if seed < 3 else ()):
            draws = Replayed(np.pad(step[b], (len(prompt), 0)) for step in steps)
            run = pair.published(prompt, draws=draws, **settings)
            assert state.tokens[b].tolist() == run.tokens[len(prompt) :].tolist()
    times = np.linspace(1, 1e-3, 6)
    share = np.append(1 - times[1:-1] / times[:-2], 1)
    assert (abs(drawn / masked - share) <= 4 * np.sqrt(share * (1 - share) / masked)).all()


# Identities of the method under the shift.

PARTS = {"prefix": 5, "context": 18, "question": 7}  # tokens
ONE_BLOCK = {"max_new_tokens": 8, "block_length": 8, "dual_cache": True, "steps": 8}


def parts_of(seed: int, **lengths) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 250, n).tolist() for name, n in (PARTS | lengths).items()}


def whole_document(pair: Pair, decoding: DecodeConfig) -> Engine:
    """Keeps all chunks, of 6 tokens without anchors, and encodes them together."""
    chunking, selection = ChunkConfig(6, anchors=False), SelectionConfig(scorer="all")
    return Engine(pair.model, None, chunking, selection, decoding, bos_id=250)


@pytest.mark.parametrize(
    "rule",
    [
        {"alg": "confidence_threshold", "threshold": 0.5},
        pytest.param({"alg": "entropy"}, marks=SLOW),
    ],
    ids=name_of,
)
def test_all_chunks_together_are_fast_dllms_dual_cache(pair, rule):
    """Of a response of one block: identity 1."""
    settings, compared = {**ONE_BLOCK, **rule}, 0
    engine = whole_document(pair, DecodeConfig.fast_dllm_dream(**settings))
    for seed in range(4):
        parts = parts_of(seed)
        run = pair.published([*itertools.chain(*parts.values())], **settings)
        answer = engine.answer(**parts)
        if run.closest > CLEAR:
            assert answer.tokens == run.tokens[-8:].tolist()
            assert answer.evaluations == run.evaluations
            compared += 1
    assert compared >= 3


def test_the_first_evaluation_of_all_chunks_is_the_plain_one(pair):
    """Probabilities of all slots, by Qwen2Model."""
    decoding = DecodeConfig.dream(max_new_tokens=8, steps=1, alg="entropy", recompute="block")
    parts = parts_of(0)
    answer = whole_document(pair, decoding).answer(**parts)
    ids = [*itertools.chain(*parts.values()), *[pair.config["mask_token_id"]] * 8]
    best = pair.qwen(torch.tensor([ids]))[0, -9:-1].double().softmax(-1).max(-1)
    assert answer.tokens == best.indices.tolist()
    np.testing.assert_allclose(answer.confidence, best.values, rtol=1e-4)


DRAWN = {"max_new_tokens": 8, "steps": 5, "temperature": 0.8, "recompute": "block"}


@pytest.mark.parametrize(
    "rule",
    [
        {"alg": "entropy", "alg_temp": 0.5, "top_p": 0.9},
        pytest.param({"alg": "origin"}, marks=SLOW),
    ],
    ids=name_of,
)
def test_draws_do_not_depend_on_the_batch_or_its_padding(pair, rule):
    """Behind a causally scored document, alone and beside a longer one."""
    selection = SelectionConfig(top_k=2, scorer="causal", encode_batch=2)
    decoding = DecodeConfig.dream(**DRAWN, **rule)
    engine = Engine(pair.model, None, ChunkConfig(6), selection, decoding, bos_id=250)
    sizes = {"prefix": 2, "context": 60}, {"context": 14, "question": 3}
    requests = [Request(**parts_of(i, **size), seed=i) for i, size in enumerate(sizes)]
    together = engine.answer_batch(requests)[1]
    alone = engine.answer(**requests[1]._asdict())
    assert together.tokens == alone.tokens
    assert together.selection["chunks"] == alone.selection["chunks"]
    assert engine.answer(**requests[1]._replace(seed=9)._asdict()).tokens != alone.tokens


def test_a_converted_checkpoint_generates_as_published(pair, tmp_path):
    """By the public way: convert, load, ask."""
    checkpoints.write_checkpoint(tmp_path / "source", pair.tensors, pair.config, shards=2)
    convert(tmp_path / "source", tmp_path / "converted")
    model, prompt = load_model(tmp_path / "converted"), pair.prompts[0].tolist()
    for method, kind, settings in (
        ("plain", DecodeConfig.dream, OWN_QUICK[0]),
        ("dual-cache", DecodeConfig.fast_dllm_dream, FAST_QUICK[1]),
    ):
        engine = Engine(model, decoding=kind(**settings), method=method)
        answer = engine.answer(prompt[:5], prompt[8:], prefix=prompt[5:8])
        ids = [*prompt[5:8], *prompt[:5], *prompt[8:]]
        run = pair.published(ids, **settings)
        assert run.closest > CLEAR
        assert answer.tokens == run.tokens[len(ids) :].tolist()
        assert answer.evaluations == run.evaluations
