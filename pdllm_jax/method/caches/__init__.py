"""Cache methods: the KV that denoising steps reuse. `base.py` says how to write one."""

from __future__ import annotations

from pdllm_jax.method.caches.base import CacheMethod, Evaluation
from pdllm_jax.method.caches.dllm_cache import DLLMCache
from pdllm_jax.method.caches.mask_kv import MaskKV
from pdllm_jax.method.caches.published import DualCache, Plain, Prefilling, PrefixCache
from pdllm_jax.rules import require

_ALL: tuple[type[CacheMethod], ...] = (Prefilling, Plain, PrefixCache, DualCache, DLLMCache, MaskKV)
Method = str | CacheMethod
CACHE_METHODS = {method.name: method for method in _ALL}
# `DecodeConfig.recompute` by name.
RECOMPUTE: dict[str, CacheMethod] = {
    "block": DualCache(),
    "suffix": PrefixCache(),
    "response": Plain(),
}


def cache_method(method: str | CacheMethod) -> CacheMethod:
    """Returns a method, which may be given by its name.

    Raises:
      ConfigError: the name is not known.
    """
    if not isinstance(method, str):
        return method
    require(method in CACHE_METHODS, f"method {method!r} is not known ({', '.join(CACHE_METHODS)})")
    return CACHE_METHODS[method]()


__all__ = ["CACHE_METHODS", "RECOMPUTE", "CacheMethod", "Evaluation", "Method", "cache_method"]
