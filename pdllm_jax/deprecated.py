"""Public names of version 0.1, as thin aliases of the new ones.

`pdllm_jax.NAME` finds them through the package's `__getattr__`, with a DeprecationWarning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from pdllm_jax.engine import memory, request
from pdllm_jax.engine.answer import Answer
from pdllm_jax.engine.engine import Engine, Request
from pdllm_jax.method import cache, prefill, scorers, scoring
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage import fingerprint, snapshot
from pdllm_jax.tokenizer import TokenizerError


def engine_of(model: MaskPredictor, tokenizer: Any = None, **settings: Any) -> Engine:
    """Returns an engine from settings under their old names."""
    decode = settings.pop("decode", None)
    if decode is not None:
        settings["decoding"] = decode
    return Engine(model, tokenizer, **settings)


def _split(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """Takes the arguments of a single call out of the settings."""
    return {name: settings.pop(name) for name in names if name in settings}


def generate(
    model: MaskPredictor, tokenizer: Any, *, context: str, question: str, **settings: Any
) -> Answer:
    """Use `Engine.answer`."""
    call = _split(settings, "oracle", "seed", "on_block")
    return engine_of(model, tokenizer, **settings).answer(context, question, **call)


def generate_ids(
    model: MaskPredictor, prefix_ids: Any, context_ids: Any, query_ids: Any, **settings: Any
) -> Answer:
    """Use `Engine.answer`."""
    call = _split(settings, "oracle", "seed", "on_block")
    return engine_of(model, **settings).answer(context_ids, query_ids, prefix=prefix_ids, **call)


def generate_batch_ids(
    model: MaskPredictor, requests: Sequence[Any], **settings: Any
) -> list[Answer]:
    """Use `Engine.answer_batch`. requests: tuples (prefix, context, query) of ids."""
    on_block = settings.pop("on_block", None)
    given = _split(settings, "oracle", "seeds")
    for name, values in given.items():
        if values is not None and len(values) != len(requests):
            raise ValueError(f"{name} has {len(values)} entries for {len(requests)} requests")
    oracle, seeds = (
        given.get(name) or [default] * len(requests)
        for name, default in (("oracle", None), ("seeds", 0))
    )
    if any(isinstance(one, Request) for one in requests):
        raise ValueError("requests must be tuples (prefix, context, query): Request has changed")
    batch = [
        Request(context, query, prefix, ids, seed)
        for (prefix, context, query), ids, seed in zip(requests, oracle, seeds, strict=True)
    ]
    return engine_of(model, **settings).answer_batch(batch, on_block=on_block)


def encode_text(
    model: MaskPredictor, tokenizer: Any, context: str, *, encode_batch: int = 8, **settings: Any
) -> cache.ChunkCache:
    """Use `Engine.encode`."""
    selection = dataclasses.replace(Engine.selection, encode_batch=encode_batch)
    return engine_of(model, tokenizer, selection=selection, **settings).encode(context)


def ask(
    model: MaskPredictor, tokenizer: Any, document: Any, questions: Sequence[Any], **settings: Any
) -> list[Answer]:
    """Use `Engine.ask`."""
    call = _split(settings, "oracle", "seeds", "on_block")
    return engine_of(model, tokenizer, **settings).ask(document, questions, **call)


def ask_ids(
    model: MaskPredictor, document: Any, queries: Sequence[Any], **settings: Any
) -> list[Answer]:
    """Use `Engine.ask`."""
    return ask(model, None, document, queries, **settings)


def prefill_request(
    model: MaskPredictor, prefix_ids: Any, context_ids: Any, query_ids: Any, **settings: Any
) -> request.StartedRequest | request.SelectedRequest:
    """Use `Engine.prefill`."""
    call = _split(settings, "oracle", "seed")
    encode = settings.get("decode", True) is not None
    return engine_of(model, **settings).prefill(
        context_ids, query_ids, prefix=prefix_ids, encode=encode, **call
    )


def choose(
    model: MaskPredictor, prompt: Any, selecting: Any, keys: Any, **settings: Any
) -> request.SelectedRequest:
    """Use `Engine.prefill` with encode=False."""
    call = _split(settings, "implementation")
    return request.select_chunks(
        model, request.prepare(prompt, selecting, keys, **settings), **call
    )


def finish(model: MaskPredictor, prefilled: Any, **settings: Any) -> list[Answer]:
    """Use `Engine.decode`."""
    call = _split(settings, "on_block")
    return Engine(model, **settings).decode(prefilled, **call)


_NAMES: dict[str, Any] = {
    "LLaDA": MaskPredictor,
    "GenerationResult": Answer,
    "Prefilled": request.StartedRequest,
    "Plan": memory.Plan,
    "ChunkPool": cache.ChunkPool,
    "LiveCache": cache.LiveCache,
    "Draft": scorers.Draft,
    "draft_response": scoring.draft_response,
    "prefill_top_k": prefill.prefill_top_k,
    "ModelIdentity": fingerprint.ModelIdentity,
    "model_identity": fingerprint.model_identity,
    "TokenizerError": TokenizerError,
    "begin": request.start_decoding,
    "without_other_chunks": request.drop_other_chunks,
    "save_prefilled": snapshot.save_request,
    "load_prefilled": snapshot.load_request,
    "generate": generate,
    "generate_ids": generate_ids,
    "generate_batch_ids": generate_batch_ids,
    "encode_text": encode_text,
    "ask": ask,
    "ask_ids": ask_ids,
    "choose": choose,
    "prefill_request": prefill_request,
    "finish": finish,
}


def lookup(name: str) -> Any:
    """Returns an old name's replacement, with a warning; AttributeError for an unknown name."""
    if name not in _NAMES:
        raise AttributeError(f"module 'pdllm_jax' has no attribute {name!r}")
    new = _NAMES[name]
    where = f"{new.__module__}.{new.__name__}"
    hint = new.__doc__.splitlines()[0] if new.__module__ == __name__ else f"Use {where}."
    warnings.warn(f"pdllm_jax.{name} is deprecated. {hint}", DeprecationWarning, stacklevel=3)
    return new
