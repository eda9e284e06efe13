"""What several test files need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor

if TYPE_CHECKING:
    import torch

# Published names, LLaDA's and Dream's, and the library's.
NAMES = {
    r"(?:transformer\.wte|embed_tokens)": "embedding",
    r"(?:transformer\.ln_f|norm)": "final_norm",
    r"transformer\.ff_out": "lm_head",
    r"transformer\.blocks\.(\d+)\.ff_proj": r"blocks.\1.gate_proj",
    r"transformer\.blocks\.(\d+)\.ff_out": r"blocks.\1.down_proj",
    r"layers\.(\d+)\.self_attn\.o_proj": r"blocks.\1.attn_out",
    r"layers\.(\d+)\.input_layernorm": r"blocks.\1.attn_norm",
    r"layers\.(\d+)\.post_attention_layernorm": r"blocks.\1.ff_norm",
    r"(?:transformer\.blocks|layers)\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)": r"blocks.\1.\2",
}


def model_from_tensors(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: Any = jnp.float32
) -> MaskPredictor:
    """The library's model with PyTorch tensors under published names, without the converter."""
    sizes = ModelConfig.from_dict(config)
    model = nnx.eval_shape(lambda: MaskPredictor(sizes, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(model)
    given = {}
    for name, tensor in tensors.items():
        path, _, kind = name.removeprefix("model.").rpartition(".")
        for pattern, replacement in NAMES.items():
            path, hits = re.subn(f"^{pattern}$", replacement, path)
            if hits:
                break
        given[f"{path}.{kind}"] = jnp.asarray(tensor.float().numpy(), dtype)

    def take(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        value = given.pop(".".join(str(key.key) for key in path))
        assert value.shape == leaf.shape, path
        return value

    values = jax.tree_util.tree_map_with_path(take, nnx.to_pure_dict(state))
    assert not given, f"the model has no place for {list(given)}"
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)


def relative_error(got: Any, want: Any) -> float:
    """|got - want| / |want| in the Euclidean norm, computed in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
