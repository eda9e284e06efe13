"""Random weights of the small model's network, in two layers."""

from __future__ import annotations

import numpy as np

from convert.mapping import targets
from pdllm_jax import ModelConfig
from small_model import base, network

CONFIG = dict(base.CONFIG, d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=48)
CONFIG |= {"vocab_size": 512, "embedding_size": 512, "mlp_ratio": 1.5}
MODEL = ModelConfig.from_dict(CONFIG)


def random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {name: row.shape for name, row in targets(MODEL).items()}
    scales = {name: shape[-1] ** -0.5 if shape[1:] else 0 for name, shape in shapes.items()}
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: np.float32(x * scales[name] + (x.ndim == 1)) for name, x in drawn.items()}


def stack(tensors: dict[str, np.ndarray]):
    """Returns the weights as training has them, and the adapter's gains."""
    params = network.stack(tensors, MODEL.n_layers)
    return params, network.gains(params, 0.5)
