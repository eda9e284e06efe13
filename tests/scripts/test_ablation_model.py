"""Ablations on a tiny random model: records end to end, FLOPs, attention, denoising order."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tokenizers")
from bench.memory import tree_bytes
from experiments import calibrating, measurements, retrieval, summary
from experiments.cache_methods import costs
from experiments.flops import Sizes, answer_flops
from experiments.grids import Cell, Grid
from experiments.records import Records

from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    Engine,
    MaskPredictor,
    ModelConfig,
    Tokenizer,
    chunk_prompt,
    denoise_step,
    init_denoise,
    prefill,
    select_top_k,
)
from pdllm_jax.method.prefill import prefill_top_k
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.network.rope import rotate, rotation
from pdllm_jax.rules import ConfigError
from small_model import corpus, tasks
from tests.small_model.test_training import encode, held_out_side, make_corpora  # noqa: F401
from tests.support.ablation import answer_all
from tests.support.method import sharpen
from tests.support.small_network import CONFIG

PAIR = ("passkey", "number_string")
CELL = Cell(length=320, chunk_size=64, top_k=2, tasks=PAIR, draft_length=2)


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return sharpen(MaskPredictor(ModelConfig.from_dict(CONFIG), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tiny_bench(model, encode, held_out_side) -> retrieval.Retrieval:  # noqa: F811
    ids = encode.tokenizer.token_to_id
    tokenizer = Tokenizer(encode.tokenizer, ids("<|startoftext|>"), encode.mask, encode.eos, None)
    sizes = {"batch_tokens": 2 * CELL.length, "encode_batch": 4}
    return retrieval.Retrieval(model, tokenizer, held_out_side, first_seed=0, **sizes)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_needles_stand_at_the_depth_that_is_asked_for(encode, held_out_side, task, depth):  # noqa: F811
    make = tasks.make_example
    for seed in range(3):
        example = make(task, 2048, seed, corpora=held_out_side, encode=encode, depth=depth)
        assert len(example["context"]) == len(
            make(task, 2048, seed, corpora=held_out_side, encode=encode)["context"]
        )
        start, end = example["needle_span"]
        assert example["answer"] in encode.tokenizer.decode(example["context"][start:end])
        # At a sentence's end near by; other needles before it, and within its own block, move it.
        slack = 60 if task in PAIR else 700
        assert abs(start - depth * (len(example["context"]) - (end - start))) < slack
    with pytest.raises(ValueError, match="depth must lie"):
        make(task, 2048, 0, corpora=held_out_side, encode=encode, depth=1.2)


def test_every_depth_gets_every_task():
    cell = Cell(depths=11)
    pairs = {(cell.tasks[i % 4], cell.depth(i)) for i in range(44)}
    assert len(pairs) == 44
    assert {depth for _, depth in pairs} == {i / 10 for i in range(11)}


def test_given_chunks_hold_the_needle_or_nothing_of_it(tiny_bench):
    for selection in ("oracle", "needle", "without"):
        cell = dataclasses.replace(CELL, selection=selection, length=1024, chunk_size=128)
        for index in range(8):
            example = tiny_bench.example(cell, index)
            kept = retrieval.given_chunks(cell, index, example)
            assert kept == retrieval.given_chunks(cell, index, example)
            start, end = example["needle_span"]
            held = {place for i in kept for place in range(i * 127, i * 127 + 127)}
            inside = set(range(start, end)) & held
            assert inside == (set() if selection == "without" else set(range(start, end)))
            assert selection == "needle" or len(kept) == cell.top_k


def test_texts_of_the_repository_need_no_other_files(encode):  # noqa: F811
    pytest.importorskip("wonderwords")
    texts = corpus.from_repository(encode.tokenizer)
    assert set(texts.texts) == set(corpus.HELD_OUT)
    assert "Elliot" in encode.tokenizer.decode(texts.texts["persuasion"].tokens[:400].tolist())
    assert all(corpus.is_held_out(word) for word in texts.words.nouns)
    name = corpus.fingerprint(texts)
    assert name == corpus.fingerprint(texts)
    fewer = dataclasses.replace(texts, words=corpus.Words(texts.words.adjectives[1:], ()))
    assert corpus.fingerprint(fewer) != name


def test_other_weights_have_another_name(model):
    name = retrieval.weights_fingerprint(model)
    assert name == retrieval.weights_fingerprint(model)
    changed = jax.tree.map(lambda x: x.at[-1].add(1e-3) if x.shape == (32,) else x, model)
    assert retrieval.weights_fingerprint(changed) != name


@pytest.mark.slow  # `make ablate-quick` is one, of the small model
def test_a_run_end_to_end(tiny_bench, tmp_path, monkeypatch):
    """Records, summary and checks; dense tokens of a batch equal the tokens of the prompt alone."""
    base = CELL.settings() | {"tasks": PAIR}
    arms = ({"selection": "dense"}, {"selection": "all"}, {"top_k": 8})
    grid = Grid("All of it, tiny.", base=base, arms=arms)
    monkeypatch.setitem(summary.GRIDS, "tiny", grid)
    note = {"device": "cpu", "versions": {"jax": jax.__version__}}
    assert answer_all(tiny_bench, grid.cells(), 3, tmp_path, note=note)
    record = summary.summarise(tmp_path, ["tiny"], 3)
    json.dumps(record)
    assert record["complete"]
    assert [check["name"] for check in record["checks"] if not check["ok"]] == []
    assert sum(check["name"].startswith("K = N") for check in record["checks"]) == 1
    assert {cell["examples"] for cell in record["cells"].values()} == {3}
    cell = dataclasses.replace(CELL, selection="dense").canonical()
    with Records(tmp_path, tiny_bench.identity) as opened:
        row = retrieval.records_of(cell, opened.done, 3)[2]
    example = tiny_bench.example(cell, 2)
    ids = [*example["prefix"], *example["context"], *example["query"]]
    engine = Engine(tiny_bench.model, decoding=CELL.decode_config(), method="plain")
    alone = engine.answer([], ids, prefix=[], seed=2)
    assert row["tokens"] == alone.tokens
    assert row["evaluations"] == alone.evaluations


def test_heads_are_calibrated_on_other_tasks_than_they_are_tested_on(tiny_bench, tmp_path):
    """Selecting alone keeps what an answer keeps, with the heads that the run's folder holds."""
    change = {"scorer": "heads", "selects_only": True, "streamed": True}
    cell = dataclasses.replace(CELL, **change).canonical()
    bench = dataclasses.replace(tiny_bench, folder=tmp_path)
    limited = dataclasses.replace(cell, head_layers=1)
    wanted = calibrating.missing_calibrations(tmp_path, [CELL, cell, limited])
    assert wanted == [cell, limited]
    with pytest.raises(ConfigError, match="needs the model's retrieval heads"):
        bench.records(cell, [0])
    calibrating.calibrate_heads(bench, wanted, [(1536, 64)])
    assert calibrating.missing_calibrations(tmp_path, [cell, limited]) == []
    made = calibrating.read_calibrations(tmp_path)
    assert [*made] == ["magic_number+key_value", "magic_number+key_value-1"]
    assert {layer for layer, _ in made["magic_number+key_value-1"]["heads"]} == {0}
    (row,), example = bench.records(cell, [0]), bench.example(cell, 0)
    request = example["context"], example["query"]
    selected = bench.engine(cell).prefill(*request, prefix=example["prefix"], encode=False)
    assert row["chunks"] == selected.selection.chunk_ids[0].tolist()
    assert row["scores"] == selected.scores[0, : row["n_chunks"]].tolist()
    assert row["score"] == float({*row["needle"]} <= {*row["chunks"]})
    assert row["flops"]["score"] > 0 == row["flops"]["decode"]
    with pytest.raises(ConfigError, match="none is left to calibrate"):
        calibrating.calibrate_heads(bench, [dataclasses.replace(cell, tasks=tasks.TASKS)])


def test_formats_of_8_bits_reach_the_engine(tiny_bench):
    loaded = []
    bench = dataclasses.replace(tiny_bench, load=lambda weights: loaded.append(weights) or "narrow")
    assert [bench.model_of(Cell(weight_format="fp8")) for _ in range(2)] == ["narrow"] * 2
    assert loaded == ["fp8"]
    assert bench.engine(dataclasses.replace(CELL, kv_format="fp8")).selection.kv_format == "fp8"


# ---- FLOPs, against the products of the traced programs


def matmul_flops(jaxpr) -> float:
    """Two for each multiply-add of every dot_general; scans by their length, other loops once."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            out = equation.outvars[0].aval.shape
            total += 2 * np.prod(out, dtype=float) * np.prod([shape[i] for i in contract])
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params.get("length", 1) if name == "scan" else 1
            for value in params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += times * matmul_flops(inner)
    return total


# Nothing is padded: with 32 of a response there are 128 live rows.
PREFIX, QUERY, DRAFT, COUNT, SIZE = 32, 64, 16, 4, 64


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoding": "independent"},
        {"encoding": "query-conditioned"},
        {"encoding": "bridge", "scorer": "query"},
        {"scorer": "confidence"},
        {"scorer": "attention"},
        {"scorer": "heads", "selects_only": True},
        {"scorer": "heads", "encoding": "independent"},
        {"masked_copies": None},
        {"selection": "first", "encoding": "independent"},
        {"selection": "all"},
    ],
    ids=str,
)
def test_flops_are_the_products_of_the_traced_programs(model, change):
    cell = Cell(**{**CELL.settings(), "tasks": PAIR, "draft_length": DRAFT, **change}).canonical()
    config = cell.selection_config(COUNT)
    if cell.scorer == "heads":
        config = dataclasses.replace(config, heads=((0, 1),))
    if cell.selection == "all":
        config = dataclasses.replace(config, top_k=COUNT)
    decode = DecodeConfig(gen_length=32, block_length=32, threshold=0.9)
    rng = np.random.default_rng(0)
    ids = [rng.integers(6, 500, n) for n in (PREFIX, COUNT * (SIZE - 1), QUERY)]
    prompt = chunk_prompt(*ids, ChunkConfig(SIZE), bos_id=0)
    assert prompt.prefix.shape == (1, PREFIX)
    assert prompt.query.shape == (1, QUERY)
    draft = None
    counted = {"draft": 0.0}

    def traced(function, *args, **kwargs):
        return matmul_flops(jax.make_jaxpr(lambda *a: function(*a, **kwargs))(*args).jaxpr)

    if config.scorer.name == "draft":
        counted["draft"] = traced(lambda m, p: draft_response(m, p, config), model, prompt)
        draft = jax.eval_shape(lambda: draft_response(model, prompt, config))
        draft = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), draft)
    run = prefill_top_k if config.streams() else prefill
    counted["score"] = traced(lambda m, p: run(m, p, config, draft=draft), model, prompt)
    cache, *chosen, scores = jax.eval_shape(lambda: run(model, prompt, config, draft=draft))
    chosen = chosen or [jax.eval_shape(lambda s: select_top_k(s, config.top_k), scores)]

    def begin(cache, chosen):
        inputs = model, cache, chosen, prompt.query, decode, jax.random.key(0)
        return init_denoise(*inputs, settings=config)

    counted["encode"] = matmul_flops(jax.make_jaxpr(begin)(cache, *chosen).jaxpr)
    state = jax.eval_shape(begin, cache, *chosen)
    counted["decode"] = matmul_flops(
        jax.make_jaxpr(lambda c, s: denoise_step(model, c, s, config=decode))(cache, state).jaxpr
    )
    kept = range(COUNT) if cell.selection == "all" else range(cell.top_k)
    sizes = Sizes(PREFIX, QUERY, 32, COUNT * (SIZE - 1), [SIZE] * COUNT, list(kept))
    want = answer_flops(model.config, cell, sizes, 1, config)
    if cell.selects_only:
        assert want.pop("encode") == want.pop("decode") == 0
    for phase, value in want.items():
        assert counted[phase] == pytest.approx(value, rel=0.02), phase


# ---- what the pictures are made of


def test_attention_shares_are_those_of_one_forward_over_everything(model):
    """Joint encoding of whole chunks is a plain forward; its softmax, written out."""
    rng = np.random.default_rng(3)
    prefix, context, query = rng.integers(6, 500, 5), rng.integers(6, 500, 3 * 15), [7, 8, 9]
    prompt = chunk_prompt(prefix, context, query, ChunkConfig(16), bos_id=0)
    decode = DecodeConfig(gen_length=8, block_length=8)
    config = Cell(selection="all", top_k=3).selection_config()
    cache, scores = prefill(model, prompt, config)
    inputs = model, cache, select_top_k(scores, 3), prompt.query, decode, jax.random.key(0)
    state = init_denoise(*inputs, query_length=prompt.query_length, settings=config)
    shares = measurements.attention_shares(model, state.pool, state)

    mask = model.config.mask_token_id
    chunks = np.insert(context.reshape(3, 15), 0, 0, axis=1).ravel()
    tokens = np.array([[*prefix, *chunks, *query, *[mask] * 8]])
    by = rotation(model.config, jnp.arange(tokens.shape[1]))
    weights = []

    def attend(layer, q, k, v, carry):
        repeats = q.shape[2] // k.shape[2]
        keys, values = (jnp.repeat(x, repeats, axis=2) for x in (rotate(k, by), v))
        scores = jnp.einsum("bthd,bshd->bhts", rotate(q, by), keys) * q.shape[-1] ** -0.5
        share = jax.nn.softmax(scores, axis=-1)
        weights.append(np.asarray(share)[0, :, -8:].mean(axis=1))  # [H, S]
        return jnp.einsum("bhts,bshd->bthd", share, values), carry

    model.run(jnp.asarray(tokens), attend, None)
    want = np.array(weights)  # [L, H, S]
    inside = want[..., 5 : 5 + 48].reshape(*want.shape[:2], 3, 16)
    np.testing.assert_allclose(shares.chunk[:, 0], inside.sum(axis=-1), atol=1e-4)
    np.testing.assert_allclose(shares.first[:, 0], inside[..., 0], atol=1e-4)
    np.testing.assert_allclose(shares.bos[:, 0], want[..., 0], atol=1e-4)


def test_measurements_on_a_tiny_model(tiny_bench, tmp_path):
    """Every slot is filled once, and the tokens are the answer's; speed is resumed."""
    cell = dataclasses.replace(CELL, threshold=None)
    cache, state, _ = measurements.start(tiny_bench, cell, [0])
    steps, tokens = measurements.denoising_order(tiny_bench, cache, state, cell)
    filled = [step for step in steps if step]
    assert sorted(filled) == list(range(1, len(filled) + 1))
    example = tiny_bench.example(cell, 0)
    settings = {"chunking": cell.chunk_config(), "selection": cell.selection_config(4)}
    engine = Engine(tiny_bench.model, **settings, decoding=cell.decode_config())
    alone = engine.answer(example["context"], example["query"], prefix=example["prefix"])
    assert tokens == alone.tokens
    path = tmp_path / "speed.json"
    record = {"rows": [{"method": name, "length": 320} for name in measurements.SPEED]}
    del record["rows"][-1]  # the later question's
    assert measurements.measure_speed(tiny_bench, CELL, path, record, lengths=(320,), repeats=1)
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows[-1:]] == [measurements.LATER]
    assert rows[-1]["least"] <= rows[-1]["seconds"] <= rows[-1]["most"]
    assert len(rows) == 5
    assert not measurements.measure_speed(tiny_bench, CELL, path, {}, lengths=(320,), deadline=0.0)


@pytest.mark.slow
def test_costs_are_of_requests_alone(tiny_bench, tmp_path):
    """Of plain generation by hand; a second call measures nothing again."""
    cells = [dataclasses.replace(CELL, selection=x).canonical() for x in ("dense", "sparse-dllm")]
    record, path = {}, tmp_path / "costs.json"
    assert costs.measure_costs(tiny_bench, cells, path, record, float("inf"), repeats=1)
    plain, sparse = record["rows"]
    assert plain["rows"] == plain["evaluations"] * CELL.length
    assert plain["bytes"] > tree_bytes(tiny_bench.model)
    assert 0 < plain["least"] <= plain["seconds"] <= plain["most"]
    assert costs.measure_costs(tiny_bench, cells, path, record, 0.0)
    assert json.loads(path.read_text())["rows"] == [plain, sparse]


@pytest.mark.slow
def test_the_command_line_with_two_processes(make_checkpoint, tmp_path, monkeypatch):
    """A PyTorch checkpoint, texts of the repository, the report; then again with nothing to do."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("wonderwords")
    import ablate

    monkeypatch.setenv("PDLLM_CACHE", str(tmp_path / "cache"))
    checkpoint = make_checkpoint(n_kv_heads=2, tokenizer=True, max_sequence_length=1024).folder
    settings = ["--set", "length=640", "chunk_size=128", "top_k=2", "tasks=passkey"]
    command = ["run", str(checkpoint), "--out", str(tmp_path / "run"), "--examples", "2"]
    command += ["--grid", "positions", "order", *settings, "--processes", "2"]
    assert ablate.main([*command, "--time-limit", "0"]) == 0
    record = json.loads((tmp_path / "run" / "ablation.json").read_text())
    assert not record["complete"]
    assert record["cells"] == {}
    assert record["command"].startswith("scripts/ablate.py run CHECKPOINT --out DIR --examples 2")
    assert ablate.main(command) == 0
    record = json.loads((tmp_path / "run" / "ablation.json").read_text())
    assert record["complete"]
    assert {cell["examples"] for cell in record["cells"].values()} == {2}
    assert len(record["order"]["rows"]) == 4
    assert ablate.main(command) == 0
    places = ["--results", str(tmp_path / "results.md")]
    source = str(tmp_path / "run" / "ablation.json")
    assert ablate.main(["report", source, *places, "--pictures", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "denoising_order.png").exists()
    with pytest.raises(SystemExit):
        ablate.main(["run", "--out", "x", "--grid", "unknown"])
    assert ablate.main(["run", "--out", "x", "--set", "colour=red"]) == 2
