"""The programs that quickstart compiles ahead are those that its engine runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from pdllm_jax import Engine, MaskPredictor, ModelConfig

PROGRAMS = ("encode_document", "draft_response", "score_chunks", "init_denoise", "denoise")


@pytest.fixture
def cache(tmp_path):
    """An empty folder in which JAX keeps every program, however short its compilation."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield tmp_path


def test_the_engine_compiles_nothing_anew(cache, monkeypatch):
    import quickstart

    from small_model import base

    small = {"n_layers": 1, "vocab_size": 512, "embedding_size": 512}
    monkeypatch.setattr(base, "CONFIG", {**base.CONFIG, **small})
    monkeypatch.setattr(quickstart, "LENGTHS", (2600, 20, 20))
    jax.clear_caches()

    def kept():
        return {name: len(list(cache.glob(f"jit_{name}-*-cache"))) for name in PROGRAMS}

    for lower in quickstart.programs():
        lower().compile()
    assert kept() == dict.fromkeys(PROGRAMS, 1)

    config = ModelConfig.from_dict(base.CONFIG)
    model = MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    engine = Engine(
        jax.device_put(model, jax.devices()[0]),  # bound to it, as a loaded model is
        chunking=quickstart.CHUNKING,
        selection=quickstart.SELECTION,
        decoding=quickstart.DECODE,
    )
    document = engine.encode([7] * 2600, prefix=[base.BOS_ID] * 23)
    for length in (17, 25):
        engine.ask(document, [[9] * length])
    assert kept() == dict.fromkeys(PROGRAMS, 1)
