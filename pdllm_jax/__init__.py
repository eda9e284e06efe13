"""Long-context inference for the diffusion language model LLaDA (Prefilling-dLLM) in JAX."""

from pdllm_jax.answer import GenerationResult, finish
from pdllm_jax.batch import Request, ask, ask_ids, encode_text, generate_batch_ids
from pdllm_jax.cache import ChunkCache, ChunkPool, LiveCache
from pdllm_jax.checkpoint import CheckpointError, load_config, load_model
from pdllm_jax.chunking import ChunkedPrompt, batch_prompts, chunk_prompt
from pdllm_jax.config import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    ModelConfig,
    RopeScaling,
    SelectionConfig,
)
from pdllm_jax.denoise import denoise, denoise_step
from pdllm_jax.fingerprint import ModelIdentity, model_identity
from pdllm_jax.generate import generate, generate_ids, prefill_request
from pdllm_jax.model import LLaDA
from pdllm_jax.parallel import make_mesh, shard_model
from pdllm_jax.plan import MemoryLimitError, Plan
from pdllm_jax.planner import plan_memory
from pdllm_jax.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.prefilled import Prefilled, begin, choose, without_other_chunks
from pdllm_jax.reselect import reselect
from pdllm_jax.riders import (
    Draft,
    draft_response,
)
from pdllm_jax.scoring import score_chunks
from pdllm_jax.selection import Selection, select_top_k
from pdllm_jax.snapshot import load_document, load_prefilled, save_document, save_prefilled
from pdllm_jax.snapshot_format import SnapshotError
from pdllm_jax.start import init_denoise
from pdllm_jax.state import DenoiseState
from pdllm_jax.store import DocumentStore
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
    "LLaDA",
    "LiveCache",
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
    "make_mesh",
    "model_identity",
    "plan_memory",
    "prefill",
    "prefill_request",
    "prefill_top_k",
    "reselect",
    "save_document",
    "save_prefilled",
    "score_chunks",
    "select_top_k",
    "shard_model",
    "without_other_chunks",
]
