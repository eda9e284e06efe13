"""Retrieval heads: examples, choice on held-out examples, the command, and the scorer after it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import calibrate, convert
from pdllm_jax import ConfigError, Engine, Request, SelectionConfig, Tokenizer, load_config
from pdllm_jax.cli import commands
from pdllm_jax.config import ChunkConfig
from pdllm_jax.evaluation import lm_eval
from pdllm_jax.evaluation.calibration import (
    Calibration,
    Shares,
    choose_heads,
    measure,
    plan_needles,
)
from pdllm_jax.evaluation.needles import Example, Prose
from pdllm_jax.method.scorers.calibration import HEADS_FILE, read_heads
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.checkpoint import open_checkpoint
from tests.conftest import ROOT
from tests.support.method import BOS

sys.path.insert(0, str(ROOT / "scripts"))
import evaluate
import generate


def made_shares(rng, examples: int, layers: int = 4, heads: int = 3, n: int = 6, **good) -> Shares:
    """Random shares; good: "l_h" names a head that finds the needle in this share of examples."""
    values = rng.random((examples, layers, heads, n))
    needle = np.eye(n, dtype=bool)[rng.integers(n, size=examples)]
    for name, share in good.items():
        layer, head = map(int, name.removeprefix("h").split("_"))
        right = np.arange(examples) < share * examples
        values[:, layer, head] += 9 * (needle & right[:, None])
    order = rng.permutation(examples)
    return Shares(values.astype(np.float32)[order], needle[order])


@pytest.mark.parametrize(
    ("good", "most", "layers"),
    [
        ({"h2_1": 1.0}, None, 3),
        ({"h0_0": 0.995, "h3_2": 1.0}, None, 1),  # within one point of the best
        ({"h0_0": 0.95, "h3_2": 1.0}, None, 4),
        ({"h0_0": 0.95, "h3_2": 1.0}, 3, 1),
    ],
)
def test_the_fewest_layers_with_nearly_the_best_recall(rng, good, most, layers):
    found = choose_heads(made_shares(rng, 200, **good), 1, layers=most)
    name = next(name for name in good if name.startswith(f"h{layers - 1}"))
    assert found.heads == (tuple(map(int, name.removeprefix("h").split("_"))),)
    assert found.layers == layers
    assert found.recall >= good[name] - 0.01
    assert found.clarity_by_layers[layers - 1] >= found.clarity_by_layers.max() - 0.01
    assert found.head_recall[found.heads[0]] == pytest.approx(good[name], abs=0.03)
    assert (found.examples, len(found.clarity_by_layers)) == (200, most or 4)
    assert found.head_recall.shape == (4, 3)


def test_a_set_is_judged_by_the_mean_of_its_shares():
    """Two heads that are wrong alone, on different sides, are right together."""
    values = np.array([[[[0.4, 0.6, 0.0], [0.4, 0.0, 0.6]]]])
    shares = Shares(values, np.array([[True, False, False]]))
    assert (shares.margins() < 0).all()
    assert shares.recalled(((0, 0), (0, 1))).all()
    padded = Shares.joined([shares, Shares(values[..., :2], shares.needle[:, :2])])
    assert padded.values.shape == (2, 1, 2, 3)
    assert padded.recalled(((0, 0),)).tolist() == [False, False]


def test_examples_that_chose_the_heads_do_not_test_them():
    """Of many heads that know nothing, the luckiest looks good where it was chosen alone."""
    found = [choose_heads(made_shares(np.random.default_rng(i), 40, 8, 12, 4), 1) for i in range(6)]
    assert np.mean([x.head_recall[x.heads[0]] for x in found]) > 0.35
    assert np.mean([x.recall for x in found]) == pytest.approx(0.25, abs=0.08)
    assert np.mean([x.clarity_by_layers for x in found]) < 0.15


def test_the_number_of_heads_is_chosen_too(rng):
    """A second head that is better than the others, but drowns the first one, is left out."""
    shares = made_shares(rng, 80, n=4, h1_1=1.0)
    loud = made_shares(rng, 80, n=4, h1_2=0.5).values[:, 1, 2]
    shares.values[:, 1, 2] = 9 * loud
    assert choose_heads(shares, 4).heads == ((1, 1),)
    same = made_shares(rng, 80, n=4, h0_0=1.0, h0_2=1.0)
    assert sorted(choose_heads(same, 2).heads) == [(0, 0), (0, 2)]


def test_of_two_right_heads_the_one_with_the_greater_lead_is_chosen(rng):
    """Among few chunks both are always right; only one would be among many."""
    shares = made_shares(rng, 80, n=4)
    for layer, lead in ((0, 1.5), (3, 3)):
        shares.values[:, layer, 1] = 1 + (lead - 1) * shares.needle
    found = choose_heads(shares, 1)
    assert (found.heads, found.recall) == (((3, 1),), 1)
    assert found.clarity_by_layers == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize(("examples", "count"), [(7, 4), (8, 0)])
def test_too_little_to_choose_from_is_refused(rng, examples, count):
    with pytest.raises(ConfigError, match=r"at least 8|positive integer"):
        choose_heads(made_shares(rng, examples), count)


def test_a_head_that_retrieves_is_found(rng):
    """Head 2 of layer 1 compares tokens; the query holds tokens that one chunk alone has."""
    config = dataclasses.replace(ModelConfig.tiny(), n_kv_heads=4, rope_theta=1e30)
    model = MaskPredictor(config, rngs=nnx.Rngs(0))
    first, second = model.blocks
    for matrix in (first.attn_out, first.down_proj):  # layer 1 reads the embeddings
        matrix.weight[...] = jnp.zeros_like(matrix.weight[...])
    size = config.head_dim
    rows = np.linalg.qr(rng.normal(size=(config.d_model, size)))[0].T * 4
    for matrix in (second.q_proj, second.k_proj):
        weight = np.array(matrix.weight[...])
        weight[2 * size : 3 * size] = rows
        matrix.weight[...] = jnp.asarray(weight)
    examples = []
    for _ in range(16):
        context, key = rng.integers(0, 200, 60), rng.integers(200, 250, 4)
        start = int(rng.integers(57))
        context[start : start + 4] = key
        request = Request(context.tolist(), key.tolist(), [BOS])
        examples.append(Example(request, (start, start + 4)))
    shares = measure(Engine(model, chunking=ChunkConfig(13)), examples)
    np.testing.assert_allclose(shares.values.sum(axis=-1), 1, rtol=1e-4)
    found = choose_heads(shares, 1)
    assert (found.heads, found.layers) == (((1, 2),), 2)
    assert found.recall > 0.9  # a needle may lie in two chunks


def test_needles_are_asked_for_as_requests_are(folder):
    tokenizer = Tokenizer.load(folder, load_config(folder))
    prose = Prose.read(tokenizer)
    sets = plan_needles(prose, [600, 1200], [64, 256, 2048], 12, seed=3)
    assert [(cut.chunk_size, len(made)) for cut, made in sets] == [(64, 8), (256, 4)]
    lengths = [[len(x.request.context) for x in made] for _, made in sets]
    assert lengths == [[600] * 4 + [1200] * 4, [1200] * 4]
    again = plan_needles(prose, [600, 1200], [64, 256, 2048], 12, seed=3)
    other = plan_needles(prose, [600, 1200], [64, 256, 2048], 12, seed=4)
    assert sets == again != other
    depths = []
    for _, made in sets:
        for (context, query, prefix, *_), (start, stop) in made:
            text = tokenizer.backend.decode(context)
            needle, before = text[start:stop], text[:start]
            question = tokenizer.backend.decode(query, skip_special_tokens=False)
            question = question.partition("<|")[0].strip()
            assert (list(prefix), list(query)) == tokenizer.around_document(question)
            key = set(needle.strip(" .").split()) & set(question.strip("?").split())
            assert len(key) >= 2, (needle, question)
            assert sum(c.isdigit() for c in needle) == 5
            assert before.rstrip()[-1] in ".!?\"')"
            depths.append(start / len(context))
    assert min(depths) < 0.3 < 0.7 < max(depths)


@pytest.mark.parametrize(
    ("lengths", "chunks", "message"),
    [
        ([100], [64], "none of the lengths"),
        ([40], [8], "too short"),
        ([900], [64], "give a longer"),
    ],
)
def test_documents_that_cannot_be_made_are_refused(folder, tmp_path, lengths, chunks, message):
    (tmp_path / "short.txt").write_text("It rained. " * 50, encoding="utf-8")
    tokenizer = Tokenizer.load(folder, load_config(folder))
    prose = Prose.read(tokenizer, [tmp_path / "short.txt"])
    with pytest.raises(ConfigError, match=message) as caught:
        plan_needles(prose, lengths, chunks, 8, 0)
    assert "\n" not in str(caught.value)


SMALL = ["--lengths", "600", "--chunk-sizes", "128", "--examples", "8", "--heads", "3"]


def lines_of(folder: Path, tmp_path: Path) -> dict:
    """Command lines that score by heads."""
    text = tmp_path / "text.txt"
    text.write_text("Anne went to Lyme. " * 60, encoding="utf-8")
    asked = [folder, "--context-file", text, "--question", "Who?", "--score", "heads"]
    tested = [folder, "needle", text, "--out", tmp_path / "out", "--lengths", "400", "--score"]
    return {generate: asked, evaluate: [*tested, "heads"]}


def test_calibration_makes_the_scorer_work(folder, tmp_path, call_main, monkeypatch):
    """Refused before it; after it every way to read the folder finds the heads."""
    pytest.importorskip("matplotlib")
    lines = lines_of(folder, tmp_path)
    for script, argv in lines.items():
        status, out, err = call_main(script.main, *argv)
        assert (status, out) == (2, "")
        assert "scripts/calibrate.py CHECKPOINT" in err.splitlines()[-1]
    with pytest.raises(ConfigError, match="calibrate"):
        lm_eval.PrefillingLM(str(folder), scorer="heads")

    picture = tmp_path / "heads.png"
    status, out, err = call_main(calibrate.main, folder, *SMALL, "--picture", picture)
    assert status == 0, err
    assert out.count("\n") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    heads, record = read_heads(folder), json.loads((folder / HEADS_FILE).read_text())
    assert sorted(map(tuple, record["heads"])) == list(heads)
    assert 1 <= len(heads) <= 3
    assert record["layers"] == 1 + max(layer for layer, _ in heads)
    assert np.shape(record["head_recall"]) == np.shape(record["head_margin"]) == (2, 2)
    assert (record["examples"], record["settings"]["lengths"]) == (8, [600])
    assert record["model"]["n_layers"] == 2
    assert len(record["text"]["sha256"]) == len(record["model"]["weights"]) == 64

    def refuse(model, *args, selection=None, **settings):
        raise ValueError(f"{(selection or args[2]).scorer.heads}")

    for script, module in ((generate, commands), (evaluate, evaluate)):
        monkeypatch.setattr(module, "Engine", refuse)
        assert call_main(script.main, *lines[script])[2].splitlines()[-1] == f"error: {heads}"
    assert lm_eval.PrefillingLM(str(folder), scorer="heads").engine.selection.scorer.heads == heads
    assert SelectionConfig(scorer="heads").calibrated(folder).scorer.heads == heads
    assert SelectionConfig().calibrated(folder) == SelectionConfig()

    before = (folder / HEADS_FILE).read_bytes()
    (folder / HEADS_FILE).write_text(before.decode().replace('"n_layers": 2', '"n_layers": 30'))
    status, _, err = call_main(generate.main, *lines[generate])
    assert status == 2
    assert "they are of a model with n_layers 30, not 2" in err.splitlines()[-1]
    (folder / HEADS_FILE).write_bytes(before)
    status, _, err = call_main(calibrate.main, folder, *SMALL)
    assert status == 2
    assert "--overwrite" in err
    assert (folder / HEADS_FILE).read_bytes() == before
    open_checkpoint(folder, verify=True)  # the file is beside what the manifest covers
    convert(folder.parent / "pytorch", folder, overwrite=True)
    assert read_heads(folder) is None  # of other weights, for all that is known


def test_a_calibration_is_saved_in_one_step(rng, tmp_path):
    found = choose_heads(made_shares(rng, 40, h2_1=1.0), 2)
    path = found.save(tmp_path, {"text": {"name": "n"}})
    assert [x.name for x in tmp_path.iterdir()] == [HEADS_FILE]
    assert read_heads(tmp_path) == tuple(sorted(found.heads))
    with pytest.raises(FileExistsError, match="overwrite"):
        found.save(tmp_path, {})
    dataclasses.replace(found, heads=((0, 0),)).save(tmp_path, {}, overwrite=True)
    assert read_heads(tmp_path) == ((0, 0),)
    fields = {field.name for field in dataclasses.fields(Calibration)}
    assert fields | {"version"} == json.loads(path.read_text()).keys()


def test_the_small_model_has_its_heads():
    """They fit config.json, and are those of the ablation's calibration in the record."""
    folder = ROOT / "small_model"
    heads, record = read_heads(folder), json.loads((folder / HEADS_FILE).read_text())
    assert max(layer for layer, _ in heads) == record["layers"] - 1 < 30
    parts = json.loads((ROOT / "benchmarks" / "ablation.json").read_text())["parts"]
    (made,) = [part["calibrations"] for part in parts if "heads-long" in part["grids"]]
    assert made["passkey+magic_number-15"].items() <= record.items()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--examples", "3"], "examples must be at least 8"),
        (["--heads", "0"], "heads must be a positive integer"),
        (["--chunk-sizes", "0"], "--chunk-sizes must be a positive integer"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line(folder, call_main, flags, message):
    status, out, err = call_main(calibrate.main, folder, *flags)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
