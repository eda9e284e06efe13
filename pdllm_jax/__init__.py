"""Long-context inference for the diffusion language model LLaDA (Prefilling-dLLM) in JAX."""

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.engine import (
    GenerationResult,
    Request,
    ask,
    ask_ids,
    encode_text,
    finish,
    generate,
    generate_batch_ids,
    generate_ids,
    prefill_request,
)
from pdllm_jax.engine.memory import MemoryLimitError, Plan, plan_memory
from pdllm_jax.engine.request import Prefilled, begin, choose, without_other_chunks
from pdllm_jax.method.cache import ChunkCache, ChunkPool, DenoiseState, LiveCache
from pdllm_jax.method.chunking import ChunkedPrompt, batch_prompts, chunk_prompt
from pdllm_jax.method.denoise import denoise, denoise_step
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.method.reselect import reselect
from pdllm_jax.method.scoring import Draft, draft_response, score_chunks
from pdllm_jax.method.selection import Selection, select_top_k
from pdllm_jax.network.config import ConfigError, ModelConfig, RopeScaling
from pdllm_jax.network.sharding import make_mesh
from pdllm_jax.network.transformer import MaskPredictor, shard_model
from pdllm_jax.storage.checkpoint import CheckpointError, load_config, load_model
from pdllm_jax.storage.fingerprint import ModelIdentity, model_identity
from pdllm_jax.storage.snapshot import (
    SnapshotError,
    load_document,
    load_prefilled,
    load_request,
    save_document,
    save_prefilled,
    save_request,
)
from pdllm_jax.storage.store import DocumentStore
from pdllm_jax.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "CheckpointError",
    "ChunkCache",
    "ChunkConfig",
    "ChunkPool",
    "ChunkedPrompt",
    "ConfigError",
    "DecodeConfig",
    "DenoiseState",
    "DocumentStore",
    "Draft",
    "GenerationResult",
    "LiveCache",
    "MaskPredictor",
    "MemoryLimitError",
    "ModelConfig",
    "ModelIdentity",
    "Plan",
    "Prefilled",
    "Request",
    "RopeScaling",
    "Selection",
    "SelectionConfig",
    "SnapshotError",
    "Tokenizer",
    "TokenizerError",
    "ask",
    "ask_ids",
    "batch_prompts",
    "begin",
    "choose",
    "chunk_prompt",
    "denoise",
    "denoise_step",
    "draft_response",
    "encode_document",
    "encode_text",
    "finish",
    "generate",
    "generate_batch_ids",
    "generate_ids",
    "init_denoise",
    "load_config",
    "load_document",
    "load_model",
    "load_prefilled",
    "load_request",
    "make_mesh",
    "model_identity",
    "plan_memory",
    "prefill",
    "prefill_request",
    "prefill_top_k",
    "reselect",
    "save_document",
    "save_prefilled",
    "save_request",
    "score_chunks",
    "select_top_k",
    "shard_model",
    "without_other_chunks",
]
