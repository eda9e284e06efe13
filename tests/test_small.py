"""The small model's data, objective and adapter, on a random base and a tokenizer made here."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.config import ModelConfig
from pdllm_jax.model import LLaDA

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

tokenizers = pytest.importorskip("tokenizers")
from small import base, corpus, lora, network, sequences, tasks  # noqa: E402

ADJECTIVES = tuple(f"{a}{b}y" for a in ("rust", "mist", "wind", "salt") for b in "abcdefghijklm")
NOUNS = tuple(f"{a}{b}r" for a in ("door", "lamp", "fox", "tree") for b in "abcdefghijklm")
BOOK = "It was a fine day, and nobody came. She said that she would go. He did not answer!\n\n"
CONFIG = {
    **base.CONFIG, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2,
    "mlp_hidden_size": 48, "vocab_size": 512, "embedding_size": 512, "mlp_ratio": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def encode() -> tasks.Encoder:
    """Byte-level BPE with the pre-tokenizer and the special tokens of the small model."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(base.SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([BOOK, tasks.PREFIX, *ADJECTIVES, *NOUNS], trainer)
    return tasks.Encoder(tokenizer)


def make_corpora(encode: tasks.Encoder, held_out: bool) -> corpus.Corpora:
    tokenizer = encode.tokenizer
    size = tokenizer.get_vocab_size()
    marks = corpus.token_marks(tokenizer.decode([index]) for index in range(size))
    book = corpus.make_text(encode(*[BOOK] * 400), marks)
    noise = corpus.make_text(encode(*[corpus.NOISE] * 300), marks)
    words = corpus.split_words(corpus.Words(ADJECTIVES, NOUNS), held_out)
    return corpus.Corpora({"book": book}, noise, words)


@pytest.fixture(scope="module")
def training_side(encode: tasks.Encoder) -> corpus.Corpora:
    return make_corpora(encode, held_out=False)


@pytest.fixture(scope="module")
def held_out_side(encode: tasks.Encoder) -> corpus.Corpora:
    return make_corpora(encode, held_out=True)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return base.random_tensors(0, CONFIG)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("seed", range(4))
def test_example_holds_its_needle(encode, held_out_side, task, seed):
    make = tasks.make_example
    example = make(task, 2048, seed, corpora=held_out_side, encode=encode)
    assert example == make(task, 2048, seed, corpora=held_out_side, encode=encode)
    prompt = example["prefix"] + example["context"] + example["query"]
    assert len(prompt) + tasks.RESPONSE_LENGTH == 2048
    assert prompt.count(base.BOS_ID) == 1
    assert base.MASK_ID not in prompt
    start, end = example["needle_span"]
    needle = encode.tokenizer.decode(example["context"][start:end])
    assert example["answer"] in needle
    # The needle's place is the only one that tells the answer.
    others = example["context"][:start] + example["context"][end:]
    assert example["answer"] not in encode.tokenizer.decode(others)
    if task in ("magic_number", "key_value"):
        query = encode.tokenizer.decode(example["query"])
        key = next(
            word for word in query.replace('"', " ").replace("?", " ").split() if "-" in word
        )
        assert key in needle
        assert all(corpus.is_held_out(word) for word in key.split("-"))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_pieces_encode_like_the_whole(encode, held_out_side, task):
    example = tasks.make_example(task, 2048, 1, corpora=held_out_side, encode=encode)
    tokenizer = encode.tokenizer
    start, end = example["needle_span"]
    for ids in (example["prefix"], example["query"], example["context"][start:end]):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_depth_is_uniform(encode, held_out_side):
    spans = [
        tasks.make_example("magic_number", 1024, seed, corpora=held_out_side, encode=encode)
        for seed in range(300)
    ]
    depth = np.array([one["needle_span"][0] / len(one["context"]) for one in spans])
    counts = np.histogram(depth, 5, (0, 1))[0]
    assert counts.min() > 30, counts


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The magic number for amber-fox is 4839201.", True),
        ('"amber-fox": "4839201"', True),
        ("The magic number for amber-fox is 48392011.", False),
        ("The magic number is 1, then 4839201.", False),
        ("The magic number for amber-fox is", False),
    ],
)
def test_first_number_counts(response, right):
    assert tasks.is_right("4839201", response) == right


def words_of(encode: tasks.Encoder, tokens: np.ndarray) -> set[str]:
    text = encode.tokenizer.decode(tokens.tolist())
    for mark in '-"?.,{}:\n':
        text = text.replace(mark, " ")
    return set(text.split())


@pytest.mark.parametrize("length", [768, 2048])
def test_training_sequences(encode, training_side, length):
    """Exact length, one BOS, no mask, no held-out word, answers that stand in the document."""
    maker = sequences.SequenceMaker(training_side, encode, length)
    held_out = {word for word in (*ADJECTIVES, *NOUNS) if corpus.is_held_out(word)}
    kinds = set()
    for seed in range(60):
        one = maker.dialogue(np.random.default_rng(seed))
        again = maker.dialogue(np.random.default_rng(seed))
        np.testing.assert_array_equal(one.tokens, again.tokens)
        kinds.add(one.kind)
        assert one.tokens.shape == one.role.shape == (length,)
        assert np.flatnonzero(one.tokens == base.BOS_ID).tolist() == [0]
        assert base.MASK_ID not in one.tokens
        assert not words_of(encode, one.tokens) & held_out
        # Every answer ends its turn, and its number was told before the first question.
        first = int(np.flatnonzero(one.role == sequences.QUESTION)[0])
        document = encode.tokenizer.decode(one.tokens[:first].tolist())
        edges = np.diff(np.concatenate([[0], one.role == sequences.ANSWER, [0]]).astype(int))
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        assert len(starts) == 1 or one.kind == "many"
        answers = [one.tokens[a:b] for a, b in zip(starts, ends, strict=True)]
        said = [encode.decode(answer) for answer in answers]
        assert all((answer == base.EOT_ID).sum() == 1 for answer in answers)
        for text in said:
            number = "".join(filter(str.isdigit, text))
            assert number in document
        assert len(set(said)) == len(said), "a question asked twice leaks its answer"
    assert kinds == {"many", "single"}


def test_answers_alone_are_masked_in_the_fine_tuning_form(encode, training_side):
    maker = sequences.SequenceMaker(training_side, encode, 512)
    rng = np.random.default_rng(3)
    masked_roles = {0: set(), 1: set(), 2: set()}
    for _ in range(200):
        one = maker.dialogue(rng)
        places, weights, group = sequences.mask_sequence(rng, one, rng.random())
        masked_roles[group] |= set(one.role[places].tolist())
        assert 0 not in places
        assert len(weights) == len(places)
        if group == 2:
            np.testing.assert_array_equal(places, np.flatnonzero(one.role == sequences.ANSWER))
            np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    assert masked_roles[1] == {sequences.QUESTION, sequences.ANSWER}
    assert masked_roles[2] == {sequences.ANSWER}


def test_weighted_loss_is_unbiased_in_t(encode, training_side):
    """With weight 1/p the expected weight of a sequence is 1 whatever t is (text counts half)."""
    maker = sequences.SequenceMaker(training_side, encode, 512)
    rng = np.random.default_rng(5)
    text = maker.text(rng)
    for t in (0.1, 0.5, 0.9):
        sums = [sequences.mask_sequence(rng, text, t)[1].sum() for _ in range(300)]
        np.testing.assert_allclose(np.mean(sums), sequences.TEXT_WEIGHT, rtol=0.03)


@pytest.mark.parametrize("rows", [64, 2048])
def test_batch_rows_are_the_masked_tokens(encode, training_side, rows):
    maker = sequences.SequenceMaker(training_side, encode, 512)
    batch = sequences.training_batch(maker, 4, rows, (7, 0))
    again = sequences.training_batch(maker, 4, rows, (7, 0))
    for left, right in zip(batch, again, strict=True):
        np.testing.assert_array_equal(left, right)
    used = batch.weights > 0
    flat = batch.tokens.reshape(-1)
    assert batch.tokens.shape == (4, 512)
    assert (flat[batch.rows[used]] == base.MASK_ID).all()
    assert (batch.targets[used] != base.MASK_ID).all()
    assert len(set(batch.rows[used].tolist())) == used.sum() <= rows
    if rows == 2048:  # nothing was left out but text beyond its own limit
        answers = batch.groups[used] > 0
        np.testing.assert_array_less(0, answers.sum())


def test_forward_is_the_librarys(tensors):
    """The scanned network gives the logits of pdllm_jax.LLaDA."""
    config = ModelConfig.from_dict(CONFIG)
    params = network.stack(tensors, config.n_layers)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 24)).astype(np.int32)
    hidden = network.encode(params, network.shape_of(CONFIG), jnp.asarray(tokens))
    model = LLaDA(config, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(model))
    state["embedding"]["weight"] = params["embedding"]
    state["final_norm"]["weight"] = params["final_norm"]
    for layer in range(config.n_layers):
        for name in network.LINEAR + network.NORMS:
            state["blocks"][layer][name]["weight"] = params[name][layer]
    graph = nnx.state(model)
    nnx.replace_by_pure_dict(graph, jax.tree.map(jnp.asarray, state))
    nnx.update(model, graph)
    want = np.asarray(model(jnp.asarray(tokens)))
    got = np.asarray(network.head(params, hidden))
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def random_trainable(params: network.Params, gain: dict[str, np.ndarray], rank: int):
    rng = np.random.default_rng(2)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)

    pairs = {
        name: {
            "a": noise(len(params[name]), rank, params[name].shape[2]),
            "b": noise(len(params[name]), params[name].shape[1], rank),
        }
        for name in network.LINEAR
    }
    norms = {n: 1 + noise(*params[n].shape) for n in (*network.NORMS, "final_norm")}
    return {"lora": pairs, "norms": norms, "special": noise(6, params["embedding"].shape[1])}


def test_adapter_merges_as_w0_plus_b_a(tensors, tmp_path):
    params = network.stack(tensors, 2)
    gain = network.gains(params, 0.5)
    trainable = random_trainable(params, gain, rank=4)
    lora.save(tmp_path / "a.safetensors", lora.from_trainable(trainable, gain), {"rank": "4"})
    adapter = lora.load(tmp_path / "a.safetensors")
    merged = lora.apply(tensors, adapter)
    for layer in range(2):
        for name in network.LINEAR:
            target = network.tensor_name(layer, name)
            pair = trainable["lora"][name]
            delta = gain[name][layer] * pair["b"][layer] @ pair["a"][layer]
            error = merged[target] - tensors[target] - delta
            assert np.linalg.norm(error) < 0.01 * np.linalg.norm(delta)  # int8
        np.testing.assert_array_equal(
            merged[network.tensor_name(layer, "ff_norm")], trainable["norms"]["ff_norm"][layer]
        )
    wte = merged["model.transformer.wte.weight"]
    np.testing.assert_array_equal(wte[:6], trainable["special"])
    np.testing.assert_array_equal(wte[6:], tensors["model.transformer.wte.weight"][6:])
    # What training merges inside its loss is what the file gives.
    back = lora.to_trainable(adapter, gain, 2)
    inside = network.merge({**params, "gain": gain}, back, jnp.float32)
    for name, values in network.stack(merged, 2).items():
        np.testing.assert_allclose(np.asarray(inside[name]), values, atol=1e-5)


def test_adapter_of_another_base_is_refused(tensors):
    params = network.stack(tensors, 2)
    gain = network.gains(params, 0.5)
    adapter = lora.from_trainable(random_trainable(params, gain, rank=4), gain)
    name = network.tensor_name(0, "q_proj")
    with pytest.raises(ValueError, match="does not fit"):
        lora.apply({**tensors, name: tensors[name][:, :-1]}, adapter)
    rest = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(ValueError, match="belongs to no tensor"):
        lora.apply(rest, adapter)


def test_initial_adapter_changes_nothing_and_learns(encode, training_side, tensors):
    optax = pytest.importorskip("optax")
    assert optax
    from small import training

    params = network.stack(tensors, 2)
    gain = network.gains(params, 0.5)
    trainable = training.initial(params, 4, seed=0)
    whole = {**params, "gain": gain}
    merged = network.merge(whole, trainable, jnp.float32)
    for name, values in params.items():
        np.testing.assert_array_equal(np.asarray(merged[name]), values)
    maker = sequences.SequenceMaker(training_side, encode, 512)
    batch = sequences.training_batch(maker, 4, 256, (1, 0))
    moments = training.make_optimizer(0.0).init(trainable)
    step = jax.jit(training.train_step, static_argnames=("shape", "dtype", "weight_decay"))
    losses = []
    for _ in range(12):
        trainable, moments, metrics = step(
            trainable, moments, whole, batch, np.float32(3e-2),
            shape=network.shape_of(CONFIG), dtype=jnp.float32, weight_decay=0.0,
        )  # fmt: skip
        sums = np.asarray(metrics["sums"])
        losses.append(sums[0].sum() / sums[2].sum())
    assert losses[-1] < losses[0] - 0.5, losses


def test_unpermute_turns_pairs_into_halves():
    """llama.cpp's rotation of neighbours equals the rotation of halves after the change."""
    heads, dim = 2, 8
    rows = np.arange(heads * dim, dtype=np.float32)[:, None]
    got = base._unpermute(rows, heads)[:, 0].reshape(heads, dim)
    want = np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(heads, dim)
    np.testing.assert_array_equal(got, want)
    half, pair = got[1, : dim // 2], got[1, dim // 2 :]
    np.testing.assert_array_equal(pair - half, 1)  # rows 2i and 2i + 1 meet as i and i + D/2


def test_stages_are_parsed():
    pytest.importorskip("optax")
    from small.training import Stage, parse_stages

    assert parse_stages("512:10s,1024:20s") == (Stage(512, 10.0, True), Stage(1024, 20.0, True))
    with pytest.raises(ValueError, match="all seconds or all steps"):
        parse_stages("512:10s,1024:20")
