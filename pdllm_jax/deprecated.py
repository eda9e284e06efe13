"""Public names of version 0.1 for those of today: `pdllm_jax.NAME` finds them, with a warning."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from typing import Any

from pdllm_jax.config import SelectionConfig
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.engine.request import PreparedRequest, select_chunks

_MOVED = {
    "LLaDA": "network.transformer.MaskPredictor",
    "GenerationResult": "engine.answer.Answer",
    "Prefilled": "engine.request.StartedRequest",
    "Plan": "engine.plan.Plan",
    "ChunkPool": "method.cache.ChunkPool",
    "LiveCache": "method.cache.LiveCache",
    "Draft": "method.scorers.Draft",
    "draft_response": "method.scoring.draft_response",
    "prefill_top_k": "method.prefill.prefill_top_k",
    "ModelIdentity": "storage.fingerprint.ModelIdentity",
    "model_identity": "storage.fingerprint.model_identity",
    "TokenizerError": "tokenizer.TokenizerError",
    "begin": "engine.request.start_decoding",
    "without_other_chunks": "engine.request.drop_other_chunks",
    "save_prefilled": "storage.snapshot.save_request",
    "load_prefilled": "storage.snapshot.load_request",
}
_ARGUMENTS = {
    "prefix_ids": "prefix",
    "context_ids": "context",
    "query_ids": "question",
    "queries": "questions",
    "cache": "document",
    "prefilled": "request",
    "decode": "decoding",
}


def _method(method: str, *names: str) -> Callable[..., Any]:
    """Returns an old function (model, *names, **settings) that calls a method of `Engine`."""

    def call(model: Any, *args: Any, **settings: Any) -> Any:
        settings |= dict(zip(names, args, strict=False))
        given = {_ARGUMENTS.get(name, name): value for name, value in settings.items()}
        if method == "prefill" and given.get("decoding", ...) is None:
            given["encode"] = given.pop("decoding") is not None
        if "encode_batch" in given:
            given["selection"] = SelectionConfig(encode_batch=given.pop("encode_batch"))
        fields = {field.name for field in dataclasses.fields(Engine)} & {*given}
        engine = Engine(model, **{name: given.pop(name) for name in fields})
        return getattr(engine, method)(**given)

    call.__doc__ = f"Use `Engine.{method}`."
    return call


def _generate_batch_ids(
    model: Any, requests: Any, *, oracle: Any = None, seeds: Any = None, **settings: Any
) -> Any:
    """Use `Engine.answer_batch`."""
    count = len(requests)
    rows = zip(requests, oracle or [None] * count, seeds or [0] * count, strict=True)
    batch = [Request(text, query, prefix, *row) for (prefix, text, query), *row in rows]
    return _method("answer_batch", "requests")(model, batch, **settings)


def _choose(model: Any, *prompt: Any, implementation: Any = None, **settings: Any) -> Any:
    """Use `Engine.prefill` with encode=False."""
    request = PreparedRequest(*prompt, **settings)
    return select_chunks(model, request, implementation=implementation)


_CALLS = {
    "generate": _method("answer", "tokenizer"),
    "generate_ids": _method("answer", "prefix", "context", "question"),
    "generate_batch_ids": _generate_batch_ids,
    "encode_text": _method("encode", "tokenizer", "context"),
    "ask": _method("ask", "tokenizer", "document", "questions"),
    "ask_ids": _method("ask", "document", "questions"),
    "choose": _choose,
    "prefill_request": _method("prefill", "prefix", "context", "question"),
    "finish": _method("decode", "request"),
}


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        return _CALLS[name]
    if name not in _MOVED:
        raise AttributeError(f"module 'pdllm_jax' has no attribute {name!r}")
    module, _, new = _MOVED[name].rpartition(".")
    return getattr(importlib.import_module(f"pdllm_jax.{module}"), new)


def lookup(name: str) -> Any:
    """Returns an old name's replacement, with a warning; AttributeError for an unknown name."""
    new = __getattr__(name)
    hint = f"Use pdllm_jax.{_MOVED[name]}." if name in _MOVED else new.__doc__
    warnings.warn(f"pdllm_jax.{name} is deprecated. {hint}", DeprecationWarning, stacklevel=3)
    return new
