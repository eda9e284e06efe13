"""The network's logits against transformers' LlamaModel and Qwen2Model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax.network.config import PRESETS, ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from tests.support.models import model_from_tensors, relative_error

ODD = {"d_model": 36, "n_heads": 6, "n_kv_heads": 3}
ARCHITECTURES = {
    "MHA": {},
    "MHA tied": {"weight_tying": True},
    "GQA": {"n_kv_heads": 2},
    "GQA tied": {"n_kv_heads": 2, "weight_tying": True},
    "MQA": {"n_kv_heads": 1},
    "Dream": {"family": "dream"},
    "Dream tied, MQA": {"family": "dream", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "odd sizes": ODD | {"mlp_hidden_size": 50, "n_layers": 3, "embedding_size": 280},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "plain": None,
    "large base": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": 8.0}},
    "yarn": {"rope_scaling": YARN},
    # Chosen so that the ramp has both ends inside the frequencies.
    "yarn, all keys": {
        "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}
    },
    "yarn, trained length from max_sequence_length": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0}
    },
    "yarn, factor 1": {"rope_scaling": {**YARN, "factor": 1.0}},
}


def compare(checkpoint, dtype: str, length: int = 40) -> float:
    """Relative error against the oracle, which reads the same rounded weights, in float32."""
    torch = pytest.importorskip("torch")
    from tests.oracles.llada import LlamaOracle

    config = checkpoint.config
    rounded = getattr(torch, dtype)
    tensors = {name: x.to(rounded).float() for name, x in checkpoint.tensors.items()}
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], (2, length))
    want = LlamaOracle(tensors, config)(torch.from_numpy(ids)).numpy()
    model = model_from_tensors(tensors, config, jnp.dtype(dtype))
    got = forward(model, jnp.asarray(ids, jnp.int32))
    assert got.dtype == jnp.float32
    return relative_error(got, want)


encode = jax.jit(lambda model, ids, lengths=None: model.encode(ids, lengths))
forward = jax.jit(lambda model, ids: model(ids))

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# With sharper random weights LlamaModel itself, run in bfloat16, strays by 2e-2 to 4e-2.
GAIN = {"float32": 1.5, "bfloat16": 1.0}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_logits(make_checkpoint, changes, dtype):
    assert compare(make_checkpoint(gain=GAIN[dtype], **changes), dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_logits_with_rope_scaling(make_checkpoint, scaling, dtype):
    checkpoint = make_checkpoint(gain=GAIN[dtype], n_kv_heads=2, **(scaling or {}))
    # Longer than the trained length of YaRN, so that every plane has turned.
    assert compare(checkpoint, dtype, length=96) < TOLERANCE[dtype]


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(3))


def test_every_row_sees_every_token(model):
    """The network has no causal mask: a change at either end reaches all logits."""
    ids = jnp.arange(12)[None] * 7 % 250
    for position in (0, 11):
        changed = ids.at[0, position].add(1)
        change = jnp.abs(forward(model, changed) - forward(model, ids)).max(-1)[0]
        assert (change > 1e-5).all()


def test_padding_changes_no_row(model, rng):
    """A row depends neither on its neighbours nor on the padding behind its length."""
    ids = jnp.asarray(rng.integers(0, 250, (3, 16)), jnp.int32)
    lengths = jnp.array([16, 9, 1])
    hidden = encode(model, ids, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = encode(model, ids[b : b + 1, :length])
        assert relative_error(hidden[b : b + 1, :length], alone) < 1e-5
    other = jnp.where(jnp.arange(16) < lengths[:, None], ids, (ids + 1) % 250)
    for b, length in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(encode(model, other, lengths)[b, :length], hidden[b, :length])


def test_logits_of_some_rows_are_rows_of_the_logits(model, rng):
    ids = jnp.asarray(rng.integers(0, 250, (2, 10)), jnp.int32)
    rows = encode(model, ids)[:, 3:5]
    assert relative_error(model.logits(rows), forward(model, ids)[:, 3:5]) < 1e-6


def test_module_is_a_plain_pytree(model):
    """Parameters travel through jax.jit as arguments, not as constants."""
    ids = jnp.arange(6)[None]
    run = jax.jit(lambda model, ids: model(ids))
    doubled = jax.tree.map(lambda weight: 2 * weight, model)
    assert relative_error(run(doubled, ids), run(model, ids)) > 0.1
    assert run._cache_size() == 1


# 8.02, 7.62 and 7.62 billion, as the models' cards say.
PARAMETERS = {
    **dict.fromkeys(("llada-8b", "ultrallada-8b"), 8_015_581_184),
    "illada-8b": 155136 * 4096
    + 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    + 65 * 4096,
    **dict.fromkeys(("dream-7b", "diffucoder-7b", "dream-coder-7b"), 7_615_616_512),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_their_cards(preset):
    config = ModelConfig.preset(preset)
    abstract = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(nnx.state(abstract))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[preset]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
