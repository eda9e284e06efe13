"""Ways to reuse KV between denoising steps: Prefilling-dLLM and the baselines on a whole prompt.

A method says whether a document is cut into chunks, and which rows a step recomputes: `recompute`
of `DecodeConfig`, None for the caller's choice. A new one is an entry of CACHE_METHODS.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Protocol

from pdllm_jax.config import DecodeConfig, Recompute
from pdllm_jax.network.config import ConfigError, require

Method = Literal["prefilling", "plain", "prefix-cache", "dual-cache"]


class CacheMethod(Protocol):
    """How an answer is decoded.

    uses_chunks: the document is cut into chunks and the best are kept; otherwise prefix, document
      and query are one prompt.
    guides: classifier-free guidance is implemented.
    """

    name: ClassVar[str]
    uses_chunks: ClassVar[bool]
    guides: ClassVar[bool] = False
    recompute: ClassVar[Recompute | None] = None

    def decode_config(self, config: DecodeConfig) -> DecodeConfig:
        """Returns config with the rows that the method recomputes.

        Raises:
          ConfigError: guidance, where the method has none.
        """
        if config.guidance > 0 and not self.guides:
            raise ConfigError(f"guidance is implemented for method 'plain', not for {self.name!r}")
        if self.recompute is None:
            return config
        return dataclasses.replace(config, recompute=self.recompute)


@dataclasses.dataclass(frozen=True)
class Prefilling(CacheMethod):
    """Prefilling-dLLM: keeps the relevant chunks."""

    name: ClassVar[str] = "prefilling"
    uses_chunks: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Plain(CacheMethod):
    """LLaDA's generation: every row at every step."""

    name: ClassVar[str] = "plain"
    uses_chunks: ClassVar[bool] = False
    guides: ClassVar[bool] = True
    recompute: ClassVar[Recompute | None] = "response"


@dataclasses.dataclass(frozen=True)
class PrefixCache(CacheMethod):
    """Fast-dLLM's prefix cache: the current block and all behind it."""

    name: ClassVar[str] = "prefix-cache"
    uses_chunks: ClassVar[bool] = False
    recompute: ClassVar[Recompute | None] = "suffix"


@dataclasses.dataclass(frozen=True)
class DualCache(CacheMethod):
    """Fast-dLLM's dual cache: the current block."""

    name: ClassVar[str] = "dual-cache"
    uses_chunks: ClassVar[bool] = False
    recompute: ClassVar[Recompute | None] = "block"


CACHE_METHODS: dict[str, CacheMethod] = {
    method.name: method for method in (Prefilling(), Plain(), PrefixCache(), DualCache())
}


def cache_method(name: str | CacheMethod) -> CacheMethod:
    """Looks up a method by its name.

    Raises:
      ConfigError: the name is not known.
    """
    if not isinstance(name, str):
        return name
    require(name in CACHE_METHODS, f"method {name!r} is not known ({', '.join(CACHE_METHODS)})")
    return CACHE_METHODS[name]
