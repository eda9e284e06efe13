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

NAMES = {
    r"wte": "embedding",
    r"ln_f": "final_norm",
    r"ff_out": "lm_head",
    r"blocks\.(\d+)\.ff_proj": r"blocks.\1.gate_proj",
    r"blocks\.(\d+)\.ff_out": r"blocks.\1.down_proj",
}


def model_from_tensors(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: Any = jnp.float32
) -> MaskPredictor:
    """The library's model with PyTorch tensors under LLaDA's names, without the converter."""
    sizes = ModelConfig.from_dict(config)
    model = nnx.eval_shape(lambda: MaskPredictor(sizes, rngs=nnx.Rngs(0), dtype=dtype))
    graph, state = nnx.split(model)
    given = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("model.transformer.").removesuffix(".weight")
        for pattern, replacement in NAMES.items():
            path, hits = re.subn(f"^{pattern}$", replacement, path)
            if hits:
                break
        given[path] = jnp.asarray(tensor.float().numpy(), dtype)

    def take(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        value = given.pop(".".join(str(key.key) for key in path).removesuffix(".weight"))
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
