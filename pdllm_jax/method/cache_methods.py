"""Ways to reuse KV between denoising steps: Prefilling-dLLM and the baselines on a whole prompt.

A method says whether a document is cut into chunks, and which rows a step recomputes. A new one is
an entry of CACHE_METHODS.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pdllm_jax.config import DecodeConfig, Recompute
from pdllm_jax.rules import ConfigError, require

Method = Literal["prefilling", "plain", "prefix-cache", "dual-cache"]


@dataclasses.dataclass(frozen=True)
class CacheMethod:
    """How an answer is decoded.

    recompute: of `DecodeConfig`; None for the caller's choice.
    uses_chunks: the document is cut into chunks and the best are kept; otherwise prefix, document
      and query are one prompt.
    guides: classifier-free guidance is implemented.
    """

    name: str
    recompute: Recompute | None = None
    uses_chunks: bool = False
    guides: bool = False

    def decode_config(self, config: DecodeConfig) -> DecodeConfig:
        """Returns config with the rows that the method recomputes.

        Raises:
          ConfigError: guidance, where the method has none.
        """
        if config.guidance > 0 and not self.guides:
            raise ConfigError(f"guidance is implemented for method 'plain', not for {self.name!r}")
        return dataclasses.replace(config, recompute=self.recompute or config.recompute)


_METHODS = (
    CacheMethod("prefilling", uses_chunks=True),
    CacheMethod("plain", "response", guides=True),  # the published generation of LLaDA and of Dream
    CacheMethod("prefix-cache", "suffix"),  # Fast-dLLM's caches
    CacheMethod("dual-cache", "block"),
)
CACHE_METHODS = {method.name: method for method in _METHODS}


def cache_method(name: str | CacheMethod) -> CacheMethod:
    """Looks up a method by its name.

    Raises:
      ConfigError: the name is not known.
    """
    if not isinstance(name, str):
        return name
    require(name in CACHE_METHODS, f"method {name!r} is not known ({', '.join(CACHE_METHODS)})")
    return CACHE_METHODS[name]
