"""Tests the small model's network and its adapter with random weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("optax")
from small_model import base, lora, network
from tests.support.small_network import MODEL, random_tensors, stack


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors()


@pytest.fixture(scope="module")
def stacked(tensors):
    return stack(tensors)


def test_forward_equals_mask_predictor(tensors):
    """The scanned network gives MaskPredictor's logits."""
    params = network.stack(tensors, MODEL.n_layers)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 24)).astype(np.int32)
    hidden = network.encode(params, MODEL, jnp.asarray(tokens))
    model = network.to_model(params, MODEL)
    want = np.asarray(model(jnp.asarray(tokens)))
    got = np.asarray(network.head(params, hidden))
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def random_trainable(params: network.Params, rank: int):
    rng = np.random.default_rng(2)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * np.float32(0.1)

    shapes = {name: params[name].shape for name in network.LINEAR}
    pairs = {
        name: {"a": noise(layers, rank, inner), "b": noise(layers, outer, rank)}
        for name, (layers, outer, inner) in shapes.items()
    }
    norms = {n: 1 + noise(*params[n].shape) for n in (*network.NORMS, "final_norm")}
    return {"lora": pairs, "norms": norms, "special": noise(6, params["embedding"].shape[1])}


def test_adapter_merges_as_w0_plus_b_a(tensors, stacked, tmp_path):
    params, gain = stacked
    trainable = random_trainable(params, rank=4)
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
    # Training merges the same weights inside its loss.
    trained = lora.to_trainable(adapter, gain, 2)
    inside = network.merge({**params, "gain": gain}, trained, jnp.float32)
    for name, values in network.stack(merged, 2).items():
        np.testing.assert_allclose(np.asarray(inside[name]), values, atol=1e-5)


def test_adapter_of_another_base_raises(tensors, stacked):
    params, gain = stacked
    adapter = lora.from_trainable(random_trainable(params, rank=4), gain)
    name = network.tensor_name(0, "q_proj")
    with pytest.raises(ValueError, match="does not fit"):
        lora.apply({**tensors, name: tensors[name][:, :-1]}, adapter)
    fewer = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(ValueError, match="the base has no tensor"):
        lora.apply(fewer, adapter)


def test_unpermute_turns_pairs_into_halves():
    """Rows 2i and 2i + 1 of llama.cpp become rows i and i + D/2 of every head."""
    heads, dim = 2, 8
    rows = np.arange(heads * dim, dtype=np.float32)[:, None]
    got = base._unpermute(rows, heads)[:, 0].reshape(heads, dim)
    np.testing.assert_array_equal(got, [[0, 2, 4, 6, 1, 3, 5, 7], [8, 10, 12, 14, 9, 11, 13, 15]])
