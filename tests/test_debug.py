"""NaN and infinity are found where they first appear, and what the search computes is the model."""

from __future__ import annotations

import json

import generate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.cli import commands
from pdllm_jax.debug import _look_into, find_nonfinite, find_nonfinite_leaf
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.rope import rotation
from pdllm_jax.network.transformer import MaskPredictor
from tests.support.models import relative_error

IDS = np.arange(1, 20)


@pytest.fixture
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))


def test_a_sound_model_has_nothing_to_find(model):
    assert find_nonfinite(model, IDS) is None
    by = rotation(model.config, jnp.arange(len(IDS)))
    x = model.embedding(IDS[None])
    for block in model.blocks:
        x, _ = _look_into(block, x, by)
    assert relative_error(model.final_norm(x), model.encode(IDS[None])) < 1e-6


def test_a_weight_is_named(model):
    weight = model.blocks[1].up_proj.weight
    weight[...] = weight[...].at[3, 4].set(jnp.nan).at[5, 6].set(jnp.inf)
    found = find_nonfinite(model, IDS)
    assert (found.where, found.layer) == ("blocks.1.up_proj.weight", 1)
    assert (found.nan, found.infinite, found.size) == (1, 1, 96 * 64)
    assert "blocks.1.up_proj.weight is the first" in str(found)


@pytest.mark.parametrize(
    ("scaled", "where"),
    [
        ("attn_norm", "attn_norm"),
        ("q_proj", "q_proj"),
        ("v_proj", "v_proj"),
        ("attn_out", "attn_out"),
        ("ff_norm", "ff_norm"),
        ("up_proj", "swiglu"),
        ("down_proj", "down_proj"),
    ],
)
def test_what_a_layer_computes_is_named(model, scaled, where):
    """Weights that are finite, and too large for what goes through them."""
    weight = getattr(model.blocks[1], scaled).weight
    weight[...] = jnp.where(weight[...] < 0, -1.0, 1.0) * 3e38
    found = find_nonfinite(model, IDS)
    assert (found.where, found.layer) == (f"blocks.1.{where}", 1)
    assert found.nan + found.infinite > 0


def test_the_head_and_a_cache(model):
    model.lm_head.weight[...] = model.lm_head.weight[...] * 1e38
    assert find_nonfinite(model, IDS).where == "logits"
    tree = {"pool": {"k": jnp.ones((2, 3)), "ids": jnp.arange(3)}, "v": jnp.array([0.0, -jnp.inf])}
    assert find_nonfinite_leaf(tree).where == "v"
    assert find_nonfinite_leaf(jax.tree.map(jnp.abs, tree["pool"])) is None


def test_the_command_line_says_where(tmp_path, monkeypatch, capsys):
    """--check-nan: silent with a sound model; one line and status 2 with another."""
    prompt = tmp_path / "ids.json"
    prompt.write_text(
        json.dumps({"prefix": [253], "context": IDS.tolist() * 2, "query": IDS[:4].tolist()})
    )
    (tmp_path / "model").mkdir()
    made = MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    monkeypatch.setattr(commands, "load", lambda args, folder: made)
    command = [
        "--prompt-ids", prompt, "--method", "plain", "--gen-length", 2, "--check-nan",
    ]  # fmt: skip
    command = list(map(str, [tmp_path / "model", *command]))
    assert generate.main(command) == 0
    capsys.readouterr()
    weight = made.blocks[0].down_proj.weight
    weight[...] = weight[...] * jnp.nan
    assert generate.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: blocks.0.down_proj.weight is the first tensor that is not finite")


def test_what_are_no_ids_is_refused():
    made = MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="token_ids is empty"):
        find_nonfinite(made, [])
    with pytest.raises(ValueError, match=r"token_ids\[1\] = 9999 is outside the vocabulary"):
        find_nonfinite(made, [1, 9999])
