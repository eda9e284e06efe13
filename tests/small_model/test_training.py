"""Tests the small model's data, objective and adapter with random weights and a new tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")
optax = pytest.importorskip("optax")
from small_model import (  # noqa: E402
    base,
    corpus,
    evaluation,
    masking,
    network,
    phrases,
    sequences,
    tasks,
    training,
)
from tests.support.small_network import MODEL, random_tensors, stack  # noqa: E402

ADJECTIVES = tuple(f"{a}{b}y" for a in ("rust", "mist", "wind", "salt") for b in "abcdefghijklm")
NOUNS = tuple(f"{a}{b}r" for a in ("door", "lamp", "fox", "tree") for b in "abcdefghijklm")
BOOK = "It was a fine day, and nobody came. She said that she would go. He did not answer!\n\n"


def make_tokenizer(model, *, digits: bool):
    """Returns a byte-level tokenizer; digits: split numbers as the small model does."""
    tokenizer = tokenizers.Tokenizer(model)
    splits = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        splits.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def encode() -> tasks.Encoder:
    """Returns byte-level BPE with the pre-tokenizer and the special tokens of the small model."""
    tokenizer = make_tokenizer(tokenizers.models.BPE(), digits=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": list(base.SPECIAL_TOKENS), "initial_alphabet": alphabet}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, show_progress=False, **settings)
    tokenizer.train_from_iterator([BOOK, tasks.PREFIX, *ADJECTIVES, *NOUNS], trainer)
    return tasks.Encoder(tokenizer)


def make_corpora(encode: tasks.Encoder, held_out: bool) -> corpus.Corpora:
    marks = corpus.vocabulary_marks(encode.tokenizer)
    book = corpus.make_text(encode(*[BOOK] * 400), marks)
    noise = corpus.make_text(encode(*[corpus.NOISE] * 300), marks)
    words = corpus.split_words(corpus.Words(ADJECTIVES, NOUNS), held_out)
    return corpus.Corpora({"book": book}, noise, words)


@pytest.fixture(scope="module")
def training_side(encode: tasks.Encoder) -> corpus.Corpora:
    return make_corpora(encode, held_out=False)


@pytest.fixture(scope="module")
def make_maker(encode, training_side):
    return functools.partial(sequences.SequenceMaker, training_side, encode)


@pytest.fixture(scope="module")
def held_out_side(encode: tasks.Encoder) -> corpus.Corpora:
    return make_corpora(encode, held_out=True)


def answer_spans(sequence: sequences.TrainingSequence) -> list[tuple[int, int]]:
    edges = np.diff((sequence.role == sequences.ANSWER).astype(int), prepend=0, append=0)
    return list(zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True))


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("seed", range(4))
def test_example_holds_its_needle(encode, held_out_side, task, seed):
    settings = {"corpora": held_out_side, "encode": encode}
    example, repeated = (tasks.make_example(task, 2048, seed, **settings) for _ in range(2))
    assert example == repeated
    prompt = example["prefix"] + example["context"] + example["query"]
    assert len(prompt) + tasks.RESPONSE_LENGTH == 2048
    assert prompt.count(base.BOS_ID) == 1
    assert base.MASK_ID not in prompt
    start, end = example["needle_span"]
    needle = encode.tokenizer.decode(example["context"][start:end])
    assert example["answer"] in needle
    # Only the needle states the answer.
    others = example["context"][:start] + example["context"][end:]
    assert example["answer"] not in encode.tokenizer.decode(others)
    if task in ("magic_number", "key_value"):
        query = encode.tokenizer.decode(example["query"])
        (key,) = re.findall(r"\w+-\w+", query)
        assert key in needle
        assert all(corpus.is_held_out(word) for word in key.split("-"))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_pieces_encode_like_joined_text(encode, held_out_side, task):
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
    """Published accuracies were measured with these examples.

    The tokens are bytes, so that the examples do not depend on a tokenizer's training.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*base.SPECIAL_TOKENS, *letters])}
    tokenizer = make_tokenizer(tokenizers.models.BPE(vocabulary, []), digits=False)
    tokenizer.add_special_tokens(list(base.SPECIAL_TOKENS))
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


@pytest.mark.parametrize("length", [768, 2048])
def test_training_sequences(encode, length, make_maker):
    """Checks length, BOS, masks, held-out words, and that the document states the answers."""
    maker = make_maker(length)
    held_out = {word for word in (*ADJECTIVES, *NOUNS) if corpus.is_held_out(word)}
    kinds = set()
    for seed in range(60):
        one = maker.dialogue(np.random.default_rng(seed))
        repeated = maker.dialogue(np.random.default_rng(seed))
        np.testing.assert_array_equal(one.tokens, repeated.tokens)
        kinds.add(one.kind)
        assert one.tokens.shape == one.role.shape == (length,)
        assert np.flatnonzero(one.tokens == base.BOS_ID).tolist() == [0]
        assert base.MASK_ID not in one.tokens
        text = encode.tokenizer.decode(one.tokens.tolist())
        assert not set(re.split(r'[-"?.,{}:\s]+', text)) & held_out
        # The document states the number of every answer, except for absent needles.
        first = int(np.flatnonzero(one.role == sequences.QUESTION)[0])
        document = encode.tokenizer.decode(one.tokens[:first].tolist())
        answers = [one.tokens[start:end] for start, end in answer_spans(one)]
        assert len(answers) == 1 or one.kind == "many"
        said = [encode.decode(answer) for answer in answers]
        assert all((answer == base.EOT_ID).sum() == 1 for answer in answers)
        for text in said:
            number = "".join(filter(str.isdigit, text))
            value = number or text.rstrip(".").split()[-1]  # a secret word
            assert (value in document) == (one.kind != "absent"), text
        assert len(set(said)) == len(said), "a question asked twice leaks its answer"
    assert kinds == {"many", "single", "absent"}


def test_names_are_many_and_share_their_words(training_side):
    """No name and no pair of words is common enough to be learned by heart."""
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
def test_sentences_encode_like_joined_text(encode, template):
    """The tokenizer must not merge across the pieces' ends."""
    pieces = phrases.fill(template, [" magic number for", " rustay", "-", "doorbr"], "40417")
    text = "".join(pieces)
    assert text.count("magic number for rustay-doorbr") == template.count("{X}") > 0
    assert text.count("40417") == template.count("{N}")
    joined = encode.tokenizer.encode(text, add_special_tokens=False).ids
    assert encode(*pieces).tolist() == joined


def test_questions_are_reworded_and_evaluated_wording_is_most_common(encode):
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


def test_noise_hides_several_names(training_side, make_maker):
    """InfiniteBench's noise also has needles that are not asked for."""
    maker = make_maker(2048)
    told = []
    for seed in range(300):
        needles, asked, source = maker._single(np.random.default_rng(seed))
        if source is training_side.noise:
            told.append(len(needles))
            assert len(asked) == 1
    assert 25 < len(told) < 85
    assert np.mean(np.array(told) > 1) > 0.4


def test_fine_tuning_form_masks_answers_only(make_maker):
    maker = make_maker(512)
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
        assert name == "question" or one.kind != "absent", "predicts an unknown answer"
        if name == "full":
            np.testing.assert_array_equal(places, np.flatnonzero(one.role == sequences.ANSWER))
            np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    named = dict(zip(masking.GROUPS, roles.values(), strict=True))
    assert named["question"] == {sequences.QUESTION, sequences.ANSWER}
    assert named["answer"] == named["full"] == {sequences.ANSWER}


def test_hidden_answer_does_not_reveal_its_question(encode, make_maker):
    """With a masked question, the answer after its opening is masked and not predicted."""
    maker = make_maker(768)
    rng, checked, shares = np.random.default_rng(4), 0, []
    for _ in range(400):
        one = maker.dialogue(rng)
        hidden, places, _, group = masking.mask_sequence(rng, one, rng.random())
        if masking.GROUPS[group] != "question" or len(hidden) == len(places):
            continue
        checked += 1
        answer = one.role == sequences.ANSWER
        for start, end in answer_spans(one):
            after = np.arange(start + masking.OPENING, end)
            assert np.isin(after, hidden).all()
            assert not np.isin(after, places).any()
        opening = one.tokens[places[answer[places]]].tolist()
        assert not any(map(str.isdigit, encode.tokenizer.decode(opening)))
        question = np.flatnonzero(one.role == sequences.QUESTION)
        shares.append(np.isin(question, places).mean())
    assert checked > 50
    assert 0.15 < np.mean(shares) < 0.35


def test_weighted_loss_is_unbiased_in_t(make_maker):
    """With weight 1/p the expected weight of a text is TEXT_WEIGHT for every t."""
    maker = make_maker(512)
    rng = np.random.default_rng(5)
    text = maker.text(rng)
    for t in (0.1, 0.5, 0.9):
        sums = [masking.mask_sequence(rng, text, t).weights.sum() for _ in range(300)]
        np.testing.assert_allclose(np.mean(sums), masking.TEXT_WEIGHT, rtol=0.03)


@pytest.mark.parametrize("rows", [64, 2048])
def test_batch_rows_are_the_masked_tokens(rows, make_maker):
    maker = make_maker(512)
    batch, repeated = (masking.training_batch(maker, 4, rows, (7, 0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, batch, repeated)
    used = batch.weights > 0
    flat = batch.tokens.reshape(-1)
    assert batch.tokens.shape == (4, 512)
    assert (flat[batch.rows[used]] == base.MASK_ID).all()
    assert (batch.targets[used] != base.MASK_ID).all()
    assert len(set(batch.rows[used].tolist())) == used.sum() <= rows
    if rows == 2048:
        assert (batch.groups[used] > 0).any()


@pytest.mark.parametrize("right", [False, True])
def test_evaluation_counts_answers_and_needles(monkeypatch, encode, held_out_side, right):
    """The engine keeps the needle's chunk of 511 tokens and answers right, or neither."""
    settings = {"corpora": held_out_side, "encode": encode}
    examples = [
        tasks.make_example(t, 2048, seed, **settings) for t in tasks.TASKS for seed in (0, 1)
    ]
    spans = {tuple(e["context"]): (e["needle_span"], e["answer"]) for e in examples}

    class Engine:
        def __init__(self, model, method="prefilling", **_):
            self.selects = method == "prefilling"

        def answer_batch(self, requests):
            for request in requests:
                (start, _), answer = spans[tuple(request.context)]
                chunk = start // 511 if right else 9
                chosen = {"chunks": [0, chunk], "scores": [float(i == chunk) for i in range(10)]}
                tokens = encode(answer if right else "no 1")
                yield SimpleNamespace(tokens=tokens, selection=chosen if self.selects else None)

    monkeypatch.setattr(evaluation, "Engine", Engine)
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: held_out_side)
    monkeypatch.setattr(evaluation.tasks.Encoder, "load", lambda folder: encode)
    measures = evaluation.Evaluator("folder")(None, 2048, 2)
    shares = dict.fromkeys(tasks.TASKS, float(right))
    assert measures["exact"] == measures["prefilling"] == shares
    for place, task in enumerate(tasks.TASKS):
        pair = [e["needle_span"] for e in examples[2 * place : 2 * place + 2]]
        complete = [right and start // 511 == (end - 1) // 511 for start, end in pair]
        assert measures["fit_first"][task] == np.mean(complete)
        assert measures["fit"][task] >= np.mean(complete)


def test_initial_adapter_changes_nothing_and_learns(make_maker):
    params, gain = stack(random_tensors())
    trainable = training.initial(params, seed=0, rank=4)
    with_gain = {**params, "gain": gain}
    merged = network.merge(with_gain, trainable, jnp.float32)
    for name, values in params.items():
        np.testing.assert_array_equal(np.asarray(merged[name]), values)
    batch = masking.training_batch(make_maker(512), 4, 256, (1, 0))
    moments = training.OPTIMIZER.init(trainable)
    # Compiling takes most of this test's time.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    step = functools.partial(training.train_step, config=MODEL, dtype=jnp.float32)
    step, losses = jax.jit(step, compiler_options=quick), []
    for _ in range(12):
        arguments = (trainable, moments, with_gain, batch, np.float32(3e-2))
        trainable, moments, metrics = step(*arguments)
        sums = np.asarray(metrics["sums"])
        losses.append(sums[0].sum() / sums[2].sum())
    assert losses[-1] < losses[0] - 0.5, losses


def test_stages_are_parsed():
    assert training.parse_stages("512:10s,1024:20s") == ((512, 10.0), (1024, 20.0))
    with pytest.raises(ValueError, match="must be LENGTH:SECONDSs"):
        training.parse_stages("512:10s,1024:20")
