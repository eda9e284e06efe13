"""Cache methods: the KV that denoising steps reuse. `base.py` says how to write one."""

from __future__ import annotations

from pdllm_jax.method.caches.base import CacheMethod, Evaluation, Prediction
from pdllm_jax.method.caches.d2_cache import D2Cache
from pdllm_jax.method.caches.dkv_cache import DKVCacheDecode, DKVCacheGreedy
from pdllm_jax.method.caches.dllm_cache import DLLMCache
from pdllm_jax.method.caches.elastic_cache import ElasticCache
from pdllm_jax.method.caches.mask_kv import MaskKV
from pdllm_jax.method.caches.published import DualCache, Plain, Prefilling, PrefixCache
from pdllm_jax.method.caches.sparse_d import SparseD
from pdllm_jax.method.caches.sparse_dllm import SparseDLLM
from pdllm_jax.naming import read_named
from pdllm_jax.rules import ConfigError

_ALL: tuple[type[CacheMethod], ...] = (
    Prefilling,
    Plain,
    PrefixCache,
    DualCache,
    D2Cache,
    DKVCacheDecode,
    DKVCacheGreedy,
    DLLMCache,
    ElasticCache,
    MaskKV,
    SparseD,
    SparseDLLM,
)
Method = str | CacheMethod
CACHE_METHODS = {method.name: method for method in _ALL}
# `DecodeConfig.recompute` by name.
RECOMPUTE: dict[str, CacheMethod] = {
    "block": DualCache(),
    "suffix": PrefixCache(),
    "response": Plain(),
}


def cache_method(method: str | CacheMethod) -> CacheMethod:
    """Returns a method, which may be given as text: a name, or a name with settings.

    Raises:
      ConfigError: neither text nor a method; or see `naming.read_named`.
    """
    if isinstance(method, str):
        return read_named("method", method, CACHE_METHODS)
    if not isinstance(method, CacheMethod):
        raise ConfigError(f"method must be a name or a CacheMethod, got {method!r}")
    return method


__all__ = [
    "CACHE_METHODS",
    "RECOMPUTE",
    "CacheMethod",
    "Evaluation",
    "Method",
    "Prediction",
    "cache_method",
]
