"""Long-context inference for diffusion language models (Prefilling-dLLM) in JAX."""

import importlib
from typing import Any

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.engine.memory import MemoryLimitError, plan_memory
from pdllm_jax.method.cache import ChunkCache, DenoiseState
from pdllm_jax.method.chunking import ChunkedPrompt, batch_prompts, chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill
from pdllm_jax.method.reselect import reselect
from pdllm_jax.method.scoring import score_chunks
from pdllm_jax.method.selection import Selection, select_top_k
from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.network.sharding import make_mesh
from pdllm_jax.network.transformer import MaskPredictor, shard_model
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.checkpoint import CheckpointError, load_config, load_model
from pdllm_jax.storage.snapshot import (
    SnapshotError,
    load_document,
    load_request,
    save_document,
    save_request,
)
from pdllm_jax.storage.store import DocumentStore
from pdllm_jax.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "CheckpointError",
    "ChunkCache",
    "ChunkConfig",
    "ChunkedPrompt",
    "ConfigError",
    "DecodeConfig",
    "DenoiseState",
    "DocumentStore",
    "Engine",
    "MaskPredictor",
    "MemoryLimitError",
    "ModelConfig",
    "Request",
    "RopeScaling",
    "Selection",
    "SelectionConfig",
    "SnapshotError",
    "Tokenizer",
    "batch_prompts",
    "chunk_prompt",
    "denoise",
    "denoise_step",
    "encode_document",
    "init_denoise",
    "load_config",
    "load_document",
    "load_model",
    "load_request",
    "make_mesh",
    "plan_memory",
    "prefill",
    "reselect",
    "save_document",
    "save_request",
    "score_chunks",
    "select_top_k",
    "shard_model",
]


def __getattr__(name: str) -> Any:
    """Names of version 0.1, with a DeprecationWarning."""
    return importlib.import_module("pdllm_jax.deprecated").lookup(name)
