"""The small model's data, objective and adapter, on a random base and a tokenizer made here."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor

tokenizers = pytest.importorskip("tokenizers")
from small_model import base, corpus, lora, masking, network, phrases, sequences, tasks  # noqa: E402

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


EXAMPLES = {
    "passkey": "7c9fac9c3c0f6146",
    "number_string": "2048a89c4d17371c",
    "magic_number": "beaad3464c7e068f",
    "key_value": "0cfb9543c724571e",
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_examples_stay_as_published(task):
    """Measured accuracies are of these examples: a change of them is a new benchmark.

    Bytes are the tokens here, so that no tokenizer's training enters.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*base.SPECIAL_TOKENS, *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(list(base.SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    encode = tasks.Encoder(tokenizer)
    corpora = make_corpora(encode, held_out=True)
    digest = hashlib.sha256()
    for seed in range(6):
        example = tasks.make_example(task, 4096, seed, corpora=corpora, encode=encode)
        digest.update(json.dumps(example).encode())
    assert digest.hexdigest()[:16] == EXAMPLES[task]


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
        # Every answer ends its turn, and its number was told before the first question, but for
        # questions that their document cannot answer.
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
            value = number or text.rstrip(".").split()[-1]  # a secret word
            assert (value in document) == (one.kind != "absent"), text
        assert len(set(said)) == len(said), "a question asked twice leaks its answer"
    assert kinds == {"many", "single", "absent"}


def test_names_are_many_and_share_their_words(training_side):
    """No name is so common, no word so bound to another, that it is known without a document."""
    counts: dict[phrases.Name, int] = {}
    for seed in range(600):
        names = phrases.Names(training_side.words, np.random.default_rng(seed))
        drawn = [names.draw() for _ in range(5)]
        assert len(set(drawn)) == 5
        for name in drawn:
            counts[name] = counts.get(name, 0) + 1
    total = sum(counts.values())
    assert len(counts) > 1000
    for name in phrases.EVALUATED:
        assert 0.01 < counts[name] / total < 0.06
        for place in (0, 1):
            alike = sum(n for other, n in counts.items() if other[-place] == name[-place])
            assert counts[name] < 0.4 * alike, name
    held_out = {word for name in counts for word in name if corpus.is_held_out(word)}
    assert held_out <= {"pass"}


@pytest.mark.parametrize("template", phrases.PATTERNS + phrases.QUESTIONS)
def test_sentences_encode_like_the_whole(encode, template):
    """Pieces must not be cut where the tokenizer would not."""
    pieces = phrases.fill(template, [" magic number for", " rustay", "-", "doorbr"], "40417")
    text = "".join(pieces)
    assert text.count("magic number for rustay-doorbr") == template.count("{X}") > 0
    assert text.count("40417") == template.count("{N}")
    whole = encode.tokenizer.encode(text, add_special_tokens=False).ids
    assert encode(*pieces).tolist() == whole


def test_questions_are_reworded_and_the_evaluated_wording_leads(encode):
    rng, key = np.random.default_rng(1), ("rustay", "doorbr")
    keyed = tasks.keyed_needle(encode, tasks.ATTRIBUTES[0], key, "40417")
    block = tasks.block_needle(encode, [(key, "40417")])
    for needle, templates in ((keyed, phrases.QUESTIONS), (block, phrases.BLOCK_QUESTIONS)):
        counts: dict[str, int] = {}
        for _ in range(300):
            (fact,) = phrases.reworded(rng, needle, templates).facts
            assert (fact.answer, fact.value) == (needle.facts[0].answer, "40417")
            text = "".join(fact.question)
            assert "rustay-doorbr" in text
            assert encode(*fact.question).tolist() == encode(text).tolist()
            counts[text] = counts.get(text, 0) + 1
        assert len(counts) == len(templates)
        usual = "".join(needle.facts[0].question)
        assert 0.6 < counts[usual] / 300 < 0.8


def test_noise_hides_several_names(encode, training_side):
    """InfiniteBench's noise too holds more than the needle that is asked for."""
    maker = sequences.SequenceMaker(training_side, encode, 2048)
    told = []
    for seed in range(300):
        _, _, source = drawn = maker._single(np.random.default_rng(seed))
        if source is training_side.noise:
            told.append(len(drawn[0]))
            assert len(drawn[1]) == 1
    assert 25 < len(told) < 85
    assert np.mean(np.array(told) > 1) > 0.4


def test_answers_alone_are_masked_in_the_fine_tuning_form(encode, training_side):
    maker = sequences.SequenceMaker(training_side, encode, 512)
    rng = np.random.default_rng(3)
    roles = {group: set() for group in range(len(masking.GROUPS))}
    for _ in range(200):
        one = maker.dialogue(rng)
        hidden, places, weights, group = masking.mask_sequence(rng, one, rng.random())
        roles[group] |= set(one.role[hidden].tolist())
        assert 0 not in hidden
        assert len(weights) == len(places)
        assert set(places) <= set(hidden)
        name = masking.GROUPS[group]
        assert name == "question" or len(hidden) == len(places)
        assert name == "question" or one.kind != "absent", "its answer cannot be known"
        if name == "full":
            np.testing.assert_array_equal(places, np.flatnonzero(one.role == sequences.ANSWER))
            np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    named = dict(zip(masking.GROUPS, roles.values(), strict=True))
    assert named["question"] == {sequences.QUESTION, sequences.ANSWER}
    assert named["answer"] == named["full"] == {sequences.ANSWER}


def test_a_hidden_answer_does_not_give_its_question_away(encode, training_side):
    """Beyond its opening an answer is masked and not predicted while its question is."""
    maker = sequences.SequenceMaker(training_side, encode, 768)
    rng, checked, shares = np.random.default_rng(4), 0, []
    for _ in range(400):
        one = maker.dialogue(rng)
        hidden, places, _, group = masking.mask_sequence(rng, one, rng.random())
        if masking.GROUPS[group] != "question" or len(hidden) == len(places):
            continue
        checked += 1
        answer = one.role == sequences.ANSWER
        edges = np.diff(np.concatenate([[0], answer, [0]]).astype(int))
        for start, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
            after = np.arange(start + masking.OPENING, end)
            assert np.isin(after, hidden).all()
            assert not np.isin(after, places).any()
        opening = one.tokens[places[answer[places]]].tolist()
        assert not any(map(str.isdigit, encode.tokenizer.decode(opening)))
        question = np.flatnonzero(one.role == sequences.QUESTION)
        shares.append(np.isin(question, places).mean())
    assert checked > 50
    assert 0.15 < np.mean(shares) < 0.35


def test_weighted_loss_is_unbiased_in_t(encode, training_side):
    """With weight 1/p the expected weight of a sequence is 1 whatever t is (text counts half)."""
    maker = sequences.SequenceMaker(training_side, encode, 512)
    rng = np.random.default_rng(5)
    text = maker.text(rng)
    for t in (0.1, 0.5, 0.9):
        sums = [masking.mask_sequence(rng, text, t).weights.sum() for _ in range(300)]
        np.testing.assert_allclose(np.mean(sums), masking.TEXT_WEIGHT, rtol=0.03)


@pytest.mark.parametrize("rows", [64, 2048])
def test_batch_rows_are_the_masked_tokens(encode, training_side, rows):
    maker = sequences.SequenceMaker(training_side, encode, 512)
    batch = masking.training_batch(maker, 4, rows, (7, 0))
    again = masking.training_batch(maker, 4, rows, (7, 0))
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
    model = MaskPredictor(config, rngs=nnx.Rngs(0))
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


def test_question_fit_rows(encode, held_out_side):
    """Every known token of question and opening is masked once; each row sees one piece alone."""
    example = tasks.make_example("magic_number", 2048, 3, corpora=held_out_side, encode=encode)
    evaluation = pytest.importorskip("small_model.evaluation")
    prefix, context, query = (example[key] for key in ("prefix", "context", "query"))
    opening = [70, base.MASK_ID, 80, base.MASK_ID]
    length = len(prefix) + 1 + 300 + len(query) + 4
    rows = evaluation.fit_rows(example, np.array(opening), length, base.BOS_ID, base.MASK_ID)
    pieces = -(-len(context) // 300)
    assert rows.tokens.shape == (4 * pieces, length)
    start, end = example["needle_span"]
    for index in range(pieces):
        at = min(300 * index, len(context) - 300)
        masked = []
        for copy in range(4):
            row = rows.tokens[4 * index + copy]
            slots, targets = (x[4 * index + copy] for x in (rows.slots, rows.targets))
            slots, targets = slots[targets >= 0], targets[targets >= 0]
            assert (row[slots] == base.MASK_ID).all()
            whole = row.copy()
            whole[slots] = targets
            want = [*prefix, base.BOS_ID, *context[at : at + 300], *query, *opening]
            assert whole.tolist() == want
            masked += (slots - len(prefix) - 301).tolist()
        assert sorted(masked) == [*range(len(query)), len(query), len(query) + 2]
        if at <= start and end <= at + 300:
            assert index in rows.needle


def test_question_fit_scores_are_pseudo_log_likelihoods(encode, held_out_side, tensors):
    """Against a plain sum over copies, questions of unequal lengths in one call."""
    evaluation = pytest.importorskip("small_model.evaluation")
    params = jax.tree.map(jnp.asarray, network.stack(tensors, 2))
    shape = network.shape_of(CONFIG)
    examples = [
        tasks.make_example(task, 1024, 0, corpora=held_out_side, encode=encode)
        for task in ("passkey", "magic_number")
    ]
    logits_of = jax.jit(lambda ids: network.head(params, network.encode(params, shape, ids)))
    guesses = evaluation.openings(params, shape, examples, base.MASK_ID)
    assert ((guesses != base.MASK_ID).sum(axis=1) == 2).all()
    for example, guess in zip(examples, guesses, strict=True):  # without padding
        prompt = [*example["prefix"], *example["query"], *[base.MASK_ID] * 4]
        assert guess[0] == logits_of(np.array([prompt]))[0, -4].argmax()
    rows = [
        evaluation.fit_rows(one, guess, 448, base.BOS_ID, base.MASK_ID)
        for one, guess in zip(examples, guesses, strict=True)
    ]
    found = evaluation.fit_scores(params, shape, rows)
    for one, scores in zip(rows, found, strict=True):
        logits = np.asarray(logits_of(one.tokens), np.float64)
        known = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        want = [
            sum(known[row, slot, target] for row, slot, target in places)
            for places in (
                [
                    (row, slot, target)
                    for row in range(4 * piece, 4 * piece + 4)
                    for slot, target in zip(one.slots[row], one.targets[row], strict=True)
                    if target >= 0
                ]
                for piece in range(len(one.tokens) // 4)
            )
        ]
        np.testing.assert_allclose(scores, want, rtol=1e-4)


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
    assert lora.load_note(tmp_path / "a.safetensors") == {"rank": "4"}
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
    from small_model import training

    params = network.stack(tensors, 2)
    gain = network.gains(params, 0.5)
    trainable = training.initial(params, 4, seed=0)
    whole = {**params, "gain": gain}
    merged = network.merge(whole, trainable, jnp.float32)
    for name, values in params.items():
        np.testing.assert_array_equal(np.asarray(merged[name]), values)
    maker = sequences.SequenceMaker(training_side, encode, 512)
    batch = masking.training_batch(maker, 4, 256, (1, 0))
    moments = training.make_optimizer(0.0).init(trainable)
    step = jax.jit(
        training.train_step,
        static_argnames=("shape", "dtype", "weight_decay"),
        # Compiling is most of what this test costs.
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )
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
    from small_model.training import Stage, parse_stages

    assert parse_stages("512:10s,1024:20s") == (Stage(512, 10.0, True), Stage(1024, 20.0, True))
    with pytest.raises(ValueError, match="all seconds or all steps"):
        parse_stages("512:10s,1024:20")
