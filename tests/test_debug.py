"""NaN and infinity are found where they first appear, and the search computes the model itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import generate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.cli import commands
from pdllm_jax.debug import find_nonfinite, find_nonfinite_leaf
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from tests.support.models import relative_error

IDS = np.arange(1, 20)


@pytest.fixture
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))


def scale(parameter, factor: float) -> None:
    parameter.weight[...] = parameter.weight[...] * factor


def test_the_hook_sees_the_residual_stream_after_every_layer(model):
    """The streams lead to the hidden rows, and hooking changes no value."""
    streams = {}
    hidden = model.encode(IDS[None], hook=streams.__setitem__)
    assert list(streams) == [0, 1]
    assert relative_error(hidden, model.encode(IDS[None])) < 1e-6
    np.testing.assert_array_equal(model.final_norm(streams[1]), hidden)
    del model.blocks[1]
    assert relative_error(model.final_norm(streams[0]), model.encode(IDS[None])) < 1e-6


def test_a_weight_is_named(model):
    weight = model.blocks[1].up_proj.weight
    weight[...] = weight[...].at[3, 4].set(jnp.nan).at[5, 6].set(jnp.inf)
    problem = find_nonfinite(model, IDS)
    assert (problem.where, problem.layer) == ("blocks.1.up_proj.weight", 1)
    assert (problem.nan, problem.infinite, problem.size) == (1, 1, 96 * 64)
    assert "blocks.1.up_proj.weight is the first" in str(problem)


@pytest.mark.parametrize(
    "scaled", ["attn_norm", "q_proj", "v_proj", "attn_out", "ff_norm", "up_proj", "down_proj"]
)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_with_the_first_infinity_is_named(model, scaled, layer):
    """Weights that are finite, but too large for the rows that they multiply."""
    weight = getattr(model.blocks[layer], scaled).weight
    weight[...] = jnp.where(weight[...] < 0, -1.0, 1.0) * 3e38
    problem = find_nonfinite(model, IDS)
    assert (problem.where, problem.layer) == (f"blocks.{layer}", layer)
    assert problem.nan + problem.infinite > 0
    assert problem.size == len(IDS) * 64
    assert "jax_debug_nans" in str(problem)


def test_the_final_norm_is_named(model):
    assert find_nonfinite(model, IDS) is None
    scale(model.final_norm, 3e38)
    assert find_nonfinite(model, IDS).where == "final_norm"


def test_layers_are_searched_in_their_order():
    """With more than ten layers the names do not sort as the numbers do."""
    config = dataclasses.replace(ModelConfig.tiny(), n_layers=11)
    model = MaskPredictor(config, rngs=nnx.Rngs(0))
    scale(model.blocks[2].up_proj, 3e38)
    assert find_nonfinite(model, IDS).where == "blocks.2"


def test_the_head_and_a_cache(model):
    scale(model.lm_head, 1e38)
    assert find_nonfinite(model, IDS).where == "logits"
    tree = {"pool": {"k": jnp.ones((2, 3)), "ids": jnp.arange(3)}, "v": jnp.array([0.0, -jnp.inf])}
    assert find_nonfinite_leaf(tree).where == "v"
    assert find_nonfinite_leaf(jax.tree.map(jnp.abs, tree["pool"])) is None


def test_the_command_line_says_where(model, tmp_path, monkeypatch, capsys):
    """--check-nan: silent with a finite model; one line and status 2 with NaN."""
    prompt = tmp_path / "ids.json"
    ids = {"prefix": [253], "context": IDS.tolist() * 2, "query": IDS[:4].tolist()}
    prompt.write_text(json.dumps(ids))
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(generate, "converted", Path)
    monkeypatch.setattr(commands, "load", lambda args, folder: model)
    options = ["--method", "plain", "--gen-length", "2", "--check-nan"]
    command = [str(tmp_path / "model"), "--prompt-ids", str(prompt), *options]
    assert generate.main(command) == 0
    capsys.readouterr()
    scale(model.blocks[0].down_proj, jnp.nan)
    assert generate.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: blocks.0.down_proj.weight is the first tensor that is not finite")


def test_empty_and_unknown_ids_are_refused(model):
    with pytest.raises(ValueError, match="token_ids is empty"):
        find_nonfinite(model, [])
    with pytest.raises(ValueError, match=r"token_ids\[1\] = 9999 is outside the vocabulary"):
        find_nonfinite(model, [1, 9999])
