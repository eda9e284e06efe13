"""The oracles against each other and against the definitions that they are written from."""

from __future__ import annotations

import itertools
import json
import math

import pytest

torch = pytest.importorskip("torch")

from tests.oracles import checkpoints, dream  # noqa: E402
from tests.oracles.generation import Network, Rule, dual_cache, plain, prefix_cache  # noqa: E402
from tests.oracles.llada import LlamaOracle  # noqa: E402
from tests.support.models import relative_error  # noqa: E402

ARCHITECTURES = {
    "MHA": {},
    "GQA": {"n_kv_heads": 2},
    "MQA, tied": {"n_kv_heads": 1, "weight_tying": True},
}


def build(seed: int = 0, **changes):
    config = checkpoints.tiny_config(**changes)
    return config, checkpoints.random_tensors(config, seed)


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Bytes only: no special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, checkpoints.N_BYTES, (batch, length), generator=generator)


@pytest.fixture(scope="module")
def network() -> Network:
    config, tensors = build(n_kv_heads=2)
    return Network(tensors, config)


def test_attention_is_bidirectional():
    config, tensors = build()
    oracle = LlamaOracle(tensors, config)
    ids = random_ids(1, 9)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % checkpoints.N_BYTES
    change = (oracle(ids) - oracle(other)).abs().amax(-1)[0]
    assert (change > 1e-3).all(), "every row must see the last token"


def test_mask_and_positions_reach_the_network():
    config, tensors = build(n_kv_heads=2)
    oracle = LlamaOracle(tensors, config)
    ids = random_ids(2, 8)
    full = oracle(ids)

    # Two halves that do not see each other, each at its own positions, are two sequences.
    mask = torch.full((2, 1, 8, 8), -math.inf)
    mask[:, :, :4, :4] = mask[:, :, 4:, 4:] = 0
    halves = oracle(ids, position_ids=torch.arange(8).expand(2, -1) % 4, mask=mask)
    for half in (slice(4), slice(4, 8)):
        assert relative_error(halves[:, half], oracle(ids[:, half])) < 1e-6
    assert relative_error(halves, full) > 0.01

    # RoPE is relative: a common shift changes nothing, a gap does.
    shifted = torch.arange(8).expand(2, -1) + 5
    assert relative_error(oracle(ids, position_ids=shifted), full) < 1e-5
    gapped = shifted + 9 * (shifted >= 9)
    assert relative_error(oracle(ids, position_ids=gapped), full) > 0.01


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_own_layers_agree_with_llama_model(changes):
    config, tensors = build(**changes)
    ids = random_ids(2, 13)
    want = LlamaOracle(tensors, config)(ids)
    assert relative_error(Network(tensors, config)(ids), want) < 1e-5
    assert relative_error(Network(tensors, config, torch.float64)(ids), want) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 1, "tie_word_embeddings": True}], ids=["GQA", "tied"]
)
def test_own_layers_with_biases_agree_with_qwen2_model(changes):
    config = checkpoints.tiny_dream_config(**changes)
    tensors, ids = checkpoints.random_tensors(config), random_ids(2, 13)
    want = LlamaOracle(tensors, config)(ids)
    assert relative_error(dream.Network(tensors, config)(ids), want) < 1e-5
    without = {name: 0 * x if name.endswith("bias") else x for name, x in tensors.items()}
    assert relative_error(dream.Network(without, config)(ids), want) > 0.1


@pytest.mark.parametrize(("steps", "due"), [(4, [3, 4, 4, 5]), (1, [16]), (20, [0] * 4)])
def test_dreams_schedule_takes_a_share_of_what_is_left(steps, due):
    """1 - s / t of 16 masks with t from 1 to 0.001: 0.24975, then 0.33289 of 13, and so on."""
    times, left = torch.linspace(1, 1e-3, steps + 1), 16
    for step, count in enumerate(due):
        assert dream.due(left, times, step) == count
        left -= count


@pytest.mark.parametrize(
    ("settings", "confidence"),
    [
        ({"order": "maskgit_plus"}, 0.5),
        ({"order": "topk_margin"}, 0.2),
        ({"order": "entropy"}, sum(p * math.log(p) for p in (0.5, 0.3, 0.15, 0.05))),
        # What is in front of the third token, 0.8, is too much; so is that of the fourth.
        ({"order": "maskgit_plus", "top_p": 0.7}, 0.5 / 0.8),
        ({"order": "maskgit_plus", "top_p": 0.4}, 1.0),
        ({"order": "topk_margin", "top_k": 3}, 0.2 / 0.95),
        ({"order": "topk_margin", "top_k": 3, "top_p": 0.7}, 0.2 / 0.8),
    ],
)
def test_dreams_confidences_by_hand(settings, confidence):
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    tokens, got = dream.Sampler(**settings).predict(logits)
    assert tokens.tolist() == [1]
    assert got.item() == pytest.approx(confidence, abs=1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_fast_dllm_on_dream_sets_the_first_slot_alone(dual, monkeypatch):
    config = checkpoints.tiny_dream_config()
    network, seen = dream.Network(checkpoints.random_tensors(config), config), []
    rows = network.rows

    def recorded(ids, start, cache):
        seen.append((start, ids.shape[1], (ids == config["mask_token_id"]).sum().item()))
        return rows(ids, start, cache)

    monkeypatch.setattr(network, "rows", recorded)
    settings = {"gen_length": 8, "block_length": 4, "steps": 8, "alg": "entropy"}
    generate = dream.dual_cache if dual else dream.prefix_cache
    run = generate(network, random_ids(1, 5)[0], mask_id=config["mask_token_id"], **settings)
    ends = (4, 4) if dual else (8, 4)
    assert [x[:2] for x in seen if x[0] == 0] == [(0, 13)] * 2
    assert {x[:2] for x in seen if x[0] > 0} == {(5, ends[0]), (9, ends[1])}
    assert [x[2] for x in seen[:2]] == ([8, 3] if dual else [8, 7])
    assert run.evaluations == len(seen) <= 8


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_rope_scaling_changes_the_network(kind):
    config, tensors = build()
    ids = random_ids(1, 48)
    want = LlamaOracle(tensors, config)(ids)
    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    got = LlamaOracle(tensors, {**config, "rope_scaling": scaling})(ids)
    assert relative_error(got, want) > 0.01


def test_linear_scaling_divides_positions_and_ntk_raises_the_base():
    config, tensors = build()
    ids = random_ids(1, 10)
    linear = LlamaOracle(tensors, {**config, "rope_scaling": {"type": "linear", "factor": 2.0}})
    doubled = linear(ids, position_ids=2 * torch.arange(10)[None])
    assert relative_error(doubled, LlamaOracle(tensors, config)(ids)) < 1e-6

    ntk = LlamaOracle(tensors, {**config, "rope_scaling": {"rope_type": "ntk", "factor": 2.0}})
    raised = {**config, "rope_theta": config["rope_theta"] * 2 ** (16 / 14)}
    assert relative_error(ntk(ids), Network(tensors, raised)(ids)) < 1e-5


def test_missing_and_surplus_tensors_are_refused():
    config, tensors = build()
    lacking = {name: t for name, t in tensors.items() if "q_proj" not in name}
    with pytest.raises(RuntimeError, match="q_proj"):
        LlamaOracle(lacking, config)


def test_logits_are_far_from_uniform():
    """Comparisons token by token must not hinge on rounding: the best token has to stand out."""
    for changes in ARCHITECTURES.values():
        config, tensors = build(**changes)
        ids = random_ids(1, 24)
        ids[0, 12:] = config["mask_token_id"]
        logits = Network(tensors, config)(ids)[0, 12:]
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        assert (best - second).min() > 1e-3
        confidence = logits.softmax(-1).amax(-1)
        assert confidence.max() > 0.3
        assert confidence.std() > 0.03


def test_kept_rows_reproduce_the_full_forward(network):
    ids = random_ids(2, 12)
    logits, cache = network.rows(ids, 0, None)
    for start, stop in [(0, 12), (5, 12), (4, 8), (0, 3)]:
        repeat, updated = network.rows(ids[:, start:stop], start, cache)
        assert relative_error(repeat, logits[:, start:stop]) < 1e-6
        assert [k.shape for k, _ in updated] == [k.shape for k, _ in cache]


SETTINGS = {"gen_length": 12, "mask_id": checkpoints.tiny_config()["mask_token_id"]}


def agree(first, second) -> bool:
    return torch.equal(first.tokens, second.tokens)


def test_one_evaluation_is_the_same_with_and_without_caches(network):
    prompt = random_ids(2, 9)
    settings = {**SETTINGS, "block_length": 12, "steps": 1}
    want = plain(network, prompt, **settings)
    assert want.evaluations == 1
    assert agree(prefix_cache(network, prompt, **settings), want)
    assert agree(dual_cache(network, prompt, **settings), want)
    best = network(torch.cat((prompt, torch.full((2, 12), SETTINGS["mask_id"])), 1)).argmax(-1)
    assert torch.equal(want.tokens[:, 9:], best[:, 9:])


def test_both_caches_agree_on_a_single_block(network):
    """Without masks after the block, recomputing to the end is recomputing the block."""
    prompt = random_ids(2, 9)
    settings = {**SETTINGS, "block_length": 12, "steps": 5}
    assert agree(prefix_cache(network, prompt, **settings), dual_cache(network, prompt, **settings))


def test_caches_are_approximations(network):
    """Stale keys and values show: else the comparisons elsewhere would test nothing."""
    settings = {**SETTINGS, "gen_length": 24, "block_length": 8, "steps": 24}
    prompts = [random_ids(1, 9, seed) for seed in range(6)]
    runs = [
        [generate(network, prompt, **settings) for prompt in prompts]
        for generate in (plain, prefix_cache, dual_cache)
    ]
    for first, second in itertools.combinations(runs, 2):
        assert not all(map(agree, first, second))


@pytest.mark.parametrize("generate", [plain, prefix_cache, dual_cache])
def test_fixed_schedule_fills_blocks_from_left_to_right(network, generate, monkeypatch):
    seen, rows = [], network.rows

    def recorded(ids, start, cache):
        seen.append((ids.clone(), start))
        return rows(ids, start, cache)

    monkeypatch.setattr(network, "rows", recorded)
    result = generate(network, random_ids(1, 5), block_length=6, steps=8, **SETTINGS)
    assert result.evaluations == 8
    masks = []
    for ids, start in seen:
        full = torch.full((1, 17), -1)
        full[:, start : start + ids.shape[1]] = ids
        masks.append((full[0, 5:] == SETTINGS["mask_id"]).tolist())
    # 6 tokens in 4 evaluations: 2, 2, 1, 1.
    assert [sum(m[:6]) for m in masks[:4]] == [6, 4, 2, 1]
    assert [sum(m[6:]) for m in masks[4:]] == [6, 4, 2, 1]
    assert not any(any(m[:6]) for m in masks[4:])
    assert (result.tokens != SETTINGS["mask_id"]).all()


@pytest.mark.parametrize(("steps", "masked", "due"), [(4, 10, [3, 3, 2, 2]), (3, 2, [1, 1, 0])])
def test_schedule_gives_the_remainder_to_the_first_evaluations(steps, masked, due):
    assert [Rule(steps).schedule(masked, step) for step in range(steps)] == due


@pytest.mark.parametrize(
    ("rule", "confidences", "due", "count"),
    [
        # The best one and all that reach the threshold.
        ({"threshold": 0.9}, [0.95, 0.9, 0.89], 1, 2),
        ({"threshold": 0.9}, [0.5, 0.4], 2, 1),
        ({"threshold": 0.9}, [], 0, 0),
        # The factor's thresholds: none, 2/3, 3/4, 4/5.
        ({"factor": 1.0}, [0.9, 0.8, 0.7, 0.1], 0, 2),
        ({"factor": 1.0}, [0.9, 0.5, 0.4, 0.1], 0, 1),
        ({"factor": 1.0}, [0.2], 0, 1),
        # The published loop's ends: reaching the last candidate takes it, at any confidence.
        ({"factor": 1.0}, [0.9, 0.8, 0.8, 0.1], 0, 4),
        ({"factor": 1.0}, [0.9, 0.1], 0, 2),
    ],
)
def test_rules_of_parallel_decoding_by_hand(rule, confidences, due, count):
    assert Rule(1, **rule).count(confidences, due) == count


def test_guidance_of_zero_is_none_and_more_changes_the_text(network):
    prompt = random_ids(2, 9)
    settings = {**SETTINGS, "block_length": 6, "steps": 6}
    without = plain(network, prompt, **settings)
    assert agree(plain(network, prompt, **settings, cfg_scale=1e-9), without)
    assert not agree(plain(network, prompt, **settings, cfg_scale=1.5), without)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_written_checkpoint_reads_back(make_checkpoint, shards, format):
    safetensors = pytest.importorskip("safetensors.torch")
    written = make_checkpoint(n_kv_heads=2, shards=shards, format=format, tokenizer=True)
    assert json.loads((written.folder / "config.json").read_text()) == written.config
    read = {}
    for file in written.folder.glob(f"*.{format}"):
        read |= safetensors.load_file(file) if format == "safetensors" else torch.load(file)
    assert read.keys() == written.tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.tensors.items())


def test_tokenizer_is_byte_level_with_lladas_special_tokens(tmp_path):
    from transformers import AutoTokenizer

    checkpoints.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    config = checkpoints.tiny_config()
    assert tokenizer.mask_token_id == config["mask_token_id"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config["eos_token_id"]
    assert tokenizer.bos_token == "<|startoftext|>"
    text = "Ümlaut and\n\nblank lines"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
