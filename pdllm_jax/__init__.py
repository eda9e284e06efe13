"""Long-context inference for the diffusion language model LLaDA (Prefilling-dLLM) in JAX."""

from pdllm_jax.cache import ChunkCache, ChunkPool, LiveCache
from pdllm_jax.checkpoint import CheckpointError, load_config, load_model
from pdllm_jax.chunking import ChunkedPrompt, chunk_prompt
from pdllm_jax.config import (
    ChunkConfig,
    ConfigError,
    DecodeConfig,
    ModelConfig,
    RopeScaling,
    SelectionConfig,
)
from pdllm_jax.denoise import denoise, denoise_step
from pdllm_jax.generate import GenerationResult, generate, generate_ids
from pdllm_jax.model import LLaDA
from pdllm_jax.prefill import encode_document, prefill, prefill_top_k
from pdllm_jax.scoring import Draft, draft_response, score_chunks
from pdllm_jax.selection import Selection, select_top_k
from pdllm_jax.state import DenoiseState, init_denoise
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
    "Draft",
    "GenerationResult",
    "LLaDA",
    "LiveCache",
    "ModelConfig",
    "RopeScaling",
    "Selection",
    "SelectionConfig",
    "Tokenizer",
    "TokenizerError",
    "chunk_prompt",
    "denoise",
    "denoise_step",
    "draft_response",
    "encode_document",
    "generate",
    "generate_ids",
    "init_denoise",
    "load_config",
    "load_model",
    "prefill",
    "prefill_top_k",
    "score_chunks",
    "select_top_k",
]
