"""Compiles the programs of requests side by side, before the first of them is answered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import pdllm_jax
from pdllm_jax.engine import answer, request

# Where an engine, and then a benchmark, looks up the jitted functions of an answer.
PROGRAMS: tuple[tuple[ModuleType, str], ...] = (
    (request, "draft_response"),
    (request, "prefill"),
    (request, "prefill_top_k"),
    (request, "init_denoise"),
    (answer, "denoise"),
    (pdllm_jax, "init_denoise"),
    (pdllm_jax, "denoise"),
)
LAST = "denoise"


class _LastError(Exception):
    """The last program of an answer is known."""


class Programs(dict[Hashable, Callable[[], Any]]):
    """What compiles each program of requests, by function and shapes; `jax.jit` keeps the result.

    Nothing runs while programs compile: a CUDA graph that one thread records fails on what another
    thread does to the device.

    nbytes: by program, what it takes on the device: weights and other arguments, results and
    temporaries, as the compiler says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: dict[Hashable, int] = {}
        self._answer: list[Hashable] = []

    def find(self, answers: Iterable[Callable[[], Any]]) -> list[list[Hashable]]:
        """Adds the programs of answers. They get zeros instead of computing, and are not ended.

        Returns:
          The programs of each answer.
        """
        found = []
        with contextlib.ExitStack() as patches:
            for module, name in PROGRAMS:
                recorded = self._recorded(name, getattr(module, name))
                patches.enter_context(mock.patch.object(module, name, recorded))
            for one in answers:
                self._answer = []
                with contextlib.suppress(_LastError):
                    one()
                found.append(self._answer)
        return found

    def compile(self) -> None:
        """Compiles all programs, as many at a time as there are processors."""
        with ThreadPoolExecutor() as threads:
            built = list(threads.map(lambda build: build(), self.values()))
        for key, program in zip(self, built, strict=True):
            if (sizes := program.memory_analysis()) is not None:
                parts = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
                self.nbytes[key] = sum(parts) - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes

    def peak(self, programs: Iterable[Hashable]) -> int:
        """Returns the most bytes that one of these programs takes."""
        return max(self.nbytes.get(key, 0) for key in programs)

    def _recorded(self, name: str, function: Any) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            leaves, tree = jax.tree.flatten((args, settings))
            key = (function, tree, *(getattr(leaf, "aval", leaf) for leaf in leaves))
            shapes = jax.tree.map(_shape, (args, settings))
            self[key] = lambda: function.lower(*shapes[0], **shapes[1]).compile()
            self._answer.append(key)
            if name == LAST:
                raise _LastError
            return jax.tree.map(_zeros, function.eval_shape(*args, **settings))

        return call


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x


def _zeros(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    return jnp.zeros(x.shape, x.dtype)
