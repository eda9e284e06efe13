"""Requests, from document and question to tokens, through one pipeline for one and for many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import Implementation, require_device, resolve_implementation
from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.engine.answer import (
    Answer,
    OnBlock,
    decode_request,
    denoise_blocks,
    read_answer,
    used_paths,
)
from pdllm_jax.engine.inputs import Request, Text, naming, oracle_ids, stack_ids
from pdllm_jax.engine.memory import require_baseline_memory, require_document_memory, require_memory
from pdllm_jax.engine.request import (
    PreparedRequest,
    SelectedRequest,
    StartedRequest,
    Timer,
    document_prompt,
    prepare,
    question_prompt,
    request_keys,
    select_chunks,
    start_decoding,
)
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.cache_methods import CacheMethod, Method, cache_method
from pdllm_jax.method.chunking import (
    TokenIds,
    batch_prompts,
    batch_size,
    bucket,
    check_bos_id,
    check_token_ids,
    chunk_prompt,
    pad_to,
)
from pdllm_jax.method.encoding import init_denoise
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.method.scoring import check_scorable
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer


@dataclasses.dataclass(frozen=True)
class Engine:
    """Answers questions about long documents.

    All methods check their arguments before any computation and raise ValueError, which names the
    argument and its value, or MemoryLimitError (a ValueError) where the plan (`plan_memory`) needs
    more device memory than there is.

    Args:
      model: from `load_model`.
      tokenizer: of text; None where requests are token ids.
      chunking, selection, decoding: settings of the method.
      method: "prefilling", or a baseline on the whole prompt: "plain" (LLaDA's generation),
        "prefix-cache" or "dual-cache" (Fast-dLLM).
      instruction: text before the document.
      bos_id: token of the anchors; by default the tokenizer's, or the first token of the prefix.
      implementation: of the attention over chunks, by default the device's.
      memory_limit: bytes that the device may hold; by default what the device reports. Where it
        reports nothing (the CPU), nothing is refused.
    """

    model: MaskPredictor
    tokenizer: Tokenizer | None = None
    chunking: ChunkConfig = ChunkConfig()
    selection: SelectionConfig = SelectionConfig()
    decoding: DecodeConfig = DecodeConfig()
    method: Method | CacheMethod = "prefilling"
    instruction: str = INSTRUCTION
    bos_id: int | None = None
    implementation: Implementation | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        cache_method(self.method).decode_config(self.decoding)
        check_bos_id(self.bos_id, self.model.config.vocab_size)

    def answer(
        self,
        context: Text,
        question: Text,
        *,
        prefix: TokenIds | None = None,
        oracle: Sequence[int] | None = None,
        seed: int = 0,
        on_block: OnBlock | None = None,
    ) -> Answer:
        """Answers a question about a document.

        Args:
          context, question, prefix, oracle, seed: the fields of `Request`. A baseline's prompt is
            prefix, context and question one after the other; on ids any of them may be empty.
          on_block: called with (0, block, its tokens) when a block is finished; the blocks after
            the end of a text are left out. A slot that holds the mask token (the model predicted
            it) may be filled with a later block.
        """
        return self._answer([Request(context, question, prefix, oracle, seed)], [""], on_block)[0]

    def answer_batch(
        self, requests: Sequence[Request | tuple[Text, Text]], *, on_block: OnBlock | None = None
    ) -> list[Answer]:
        """Answers many requests in one batch, each as `answer` would answer it alone.

        Documents, questions and the number of evaluations may differ. The batch is padded to a
        power of two. Baselines are answered one after another.

        Args:
          requests: requests, or tuples of their first fields.
          on_block: called with (request, block, its tokens).

        Raises:
          ValueError: also where there are no requests; the message has the request's number.
        """
        if not requests:
            raise ValueError("no requests")
        names = [f"request {i}: " for i in range(len(requests))]
        return self._answer([Request(*request) for request in requests], names, on_block)

    def encode(self, context: Text, *, prefix: TokenIds | None = None) -> ChunkCache:
        """Encodes a document for `ask`, independently of any question.

        Args:
          context, prefix: as in `Request`.

        Returns:
          The KV of every chunk.
        """
        parts = self._document_ids(context, prefix)
        prompt = document_prompt(*parts, self.chunking, self._bos_id)
        group = self.selection.encode_batch
        require_document_memory(self.model, prompt, group, limit=self.memory_limit)
        return encode_document(self.model, prompt, encode_batch=group)

    def ask(
        self,
        document: ChunkCache,
        questions: Sequence[Text],
        *,
        oracle: Sequence[Sequence[int]] | None = None,
        seeds: Sequence[int] | None = None,
        on_block: OnBlock | None = None,
    ) -> list[Answer]:
        """Answers questions about one encoded document, which they share.

        Each question costs its draft, its rows against the cached KV, the encoding of its own
        chunks if that is not "independent", and its decoding.

        Args:
          document: from `encode`, or `prefill` with keep_pool.
          questions: text or token ids.
          oracle: for each question the ids of the chunks to keep, for the scorer "oracle" alone.
          seeds: of each question, 0 by default.
          on_block: called with (question, block, its tokens).
        """
        if not questions:
            raise ValueError("no questions")
        if not self._uses_chunks:
            raise ValueError(f"a document is asked with method 'prefilling', not {self.method!r}")
        check_scorable(document)
        if document.documents > 1:
            raise ValueError(f"document must be one, the cache holds {document.documents}")
        for name, values in (("oracle", oracle), ("seeds", seeds)):
            if values is not None and len(values) != len(questions):
                raise ValueError(f"{name} has {len(values)} entries for {len(questions)} questions")
        ids = [self._ids(f"question {i}", q, Tokenizer.query) for i, q in enumerate(questions)]
        chunks = int(np.count_nonzero(np.asarray(document.lengths)))
        named = []
        for i in range(len(questions)):
            with naming(f"question {i}: "):
                chosen = None if oracle is None else oracle[i]
                named.append(oracle_ids(chosen, self.selection, chunks))
        size = batch_size(len(ids))
        request = prepare(
            question_prompt(document, ids, size),
            self.selection,
            request_keys(seeds or [0] * len(ids), size),
            cache=document,
            requests=len(ids),
            oracle=stack_ids(named, size),
        )
        return self._run(request, on_block)

    def prefill(
        self,
        context: Text,
        question: Text,
        *,
        prefix: TokenIds | None = None,
        oracle: Sequence[int] | None = None,
        seed: int = 0,
        encode: bool = True,
    ) -> StartedRequest | SelectedRequest:
        """Computes `answer` up to its decoding, for `decode` here or (`save_request`) elsewhere.

        Args:
          context, question, prefix, oracle, seed: the fields of `Request`.
          encode: False stops before the chosen chunks are encoded.

        Returns:
          A started request, or with encode=False a selected one.
        """
        if not self._uses_chunks:
            raise ValueError(f"method {self.method!r} has nothing to prefill")
        request = self._prepare([Request(context, question, prefix, oracle, seed)], [""])
        self._require_memory(request)
        selected = select_chunks(self.model, request, implementation=self.implementation)
        if not encode:
            return dataclasses.replace(selected, decoding=self.decoding)
        return start_decoding(
            self.model, selected, self.decoding, implementation=self.implementation
        )

    def decode(
        self, request: StartedRequest | SelectedRequest, *, on_block: OnBlock | None = None
    ) -> list[Answer]:
        """Decodes what `prefill` has returned; the state of a started request is consumed.

        Args:
          request: its own settings apply; the engine's `decoding` where it has none.
          on_block: called with (request, block, its tokens).

        Returns:
          An answer to each of the requests.
        """
        timer = Timer()
        if isinstance(request, SelectedRequest):
            decoding = request.decoding or self.decoding
            self._path(request.cache.tokens.shape[-1], request.config)
            request = start_decoding(
                self.model, request, decoding, implementation=self.implementation, timer=timer
            )
        return self._decode(request, timer, on_block)

    @property
    def _uses_chunks(self) -> bool:
        return cache_method(self.method).uses_chunks

    @property
    def _bos_id(self) -> int | None:
        if self.bos_id is None and self.tokenizer is not None:
            return self.tokenizer.bos_id
        return self.bos_id

    def _ids(
        self, name: str, value: Text, encode: Callable[[Tokenizer, str], list[int]]
    ) -> np.ndarray:
        """Checked token ids of text or ids, int32 [n]."""
        if isinstance(value, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, the engine has no tokenizer: give token ids")
            if not value.strip():
                raise ValueError(f"{name} is empty")
            value = encode(self.tokenizer, value)
        ids = check_token_ids(name, value, self.model.config.vocab_size)
        if ids.size == 0 and self._uses_chunks:
            raise ValueError(f"{name} is empty")
        return ids

    def _document_ids(
        self, context: Text, prefix: TokenIds | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(prefix, context)."""
        ids = self._ids("context", context, Tokenizer.encode)
        if isinstance(context, str):
            if prefix is not None:
                raise ValueError("prefix is for token ids: text has the engine's instruction")
            assert self.tokenizer is not None
            prefix = self.tokenizer.prefix(self.instruction)
        vocab = self.model.config.vocab_size
        return check_token_ids("prefix", [] if prefix is None else prefix, vocab), ids

    def token_ids(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the checked token ids of a request: (prefix, context, question), int32."""
        if isinstance(request.context, str) != isinstance(request.question, str):
            raise ValueError("context and question must both be text, or both token ids")
        prefix, context = self._document_ids(request.context, request.prefix)
        return prefix, context, self._ids("question", request.question, Tokenizer.query)

    def _prepare(self, requests: Sequence[Request], names: Sequence[str]) -> PreparedRequest:
        size = batch_size(len(requests))
        tight = self.selection.keeps_pool(documents=size)
        prompts, named = [], []
        for name, request in zip(names, requests, strict=True):
            with naming(name):
                parts = self.token_ids(request)
                prompt = chunk_prompt(*parts, self.chunking, bos_id=self._bos_id, tight=tight)
                prompts.append(prompt)
                named.append(oracle_ids(request.oracle, self.selection, prompt.n_chunks))
        return prepare(
            batch_prompts(prompts, size),
            self.selection,
            request_keys([request.seed for request in requests], size),
            requests=len(requests),
            oracle=stack_ids(named, size),
        )

    def _answer(
        self, requests: Sequence[Request], names: Sequence[str], on_block: OnBlock | None
    ) -> list[Answer]:
        if self._uses_chunks:
            return self._run(self._prepare(requests, names), on_block)
        prompts = []
        for name, request in zip(names, requests, strict=True):
            with naming(name):
                if request.oracle is not None:
                    raise ValueError(f"oracle is for method 'prefilling', not for {self.method!r}")
                prompts.append(np.concatenate(self.token_ids(request)))
                if prompts[-1].size == 0:
                    raise ValueError("prompt is empty: prefix, context and question have no tokens")
                self._require_baseline_memory(prompts[-1])
        keys = [request_keys([request.seed], 1) for request in requests]
        return [
            self._baseline(i, prompt, key, on_block)
            for i, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
        ]

    def _run(self, request: PreparedRequest, on_block: OnBlock | None) -> list[Answer]:
        self._require_memory(request)
        timer = Timer()
        started = start_decoding(
            self.model,
            select_chunks(self.model, request, implementation=self.implementation, timer=timer),
            self.decoding,
            implementation=self.implementation,
            timer=timer,
        )
        del request  # the document's KV may go
        return self._decode(started, timer, on_block)

    def _baseline(
        self, number: int, prompt: np.ndarray, keys: Array, on_block: OnBlock | None
    ) -> Answer:
        config, timer = cache_method(self.method).decode_config(self.decoding), Timer()
        numbered = None
        if on_block is not None:
            numbered = lambda _, block, tokens: on_block(number, block, tokens)  # noqa: E731
        with timer.phase("decode"):
            ids = jnp.asarray(pad_to(prompt, bucket(prompt.size, 8))[None])
            length = jnp.asarray([prompt.size], jnp.int32)
            state = init_denoise(self.model, None, None, ids, config, keys, query_length=length)
            state = denoise_blocks(self.model, None, state, config, on_block=numbered)
        paths = used_paths(self.model, config.block_length)
        return self._with_text(read_answer(state, 0, None, timer, paths))

    def _decode(
        self, request: StartedRequest, timer: Timer, on_block: OnBlock | None
    ) -> list[Answer]:
        path = self._path(request.pool.k.shape[3], request.config)
        answers = decode_request(self.model, request, path, timer, on_block)
        return [self._with_text(answer) for answer in answers]

    def _with_text(self, answer: Answer) -> Answer:
        if self.tokenizer is None:
            return answer
        return dataclasses.replace(answer, text=self.tokenizer.decode(answer.tokens))

    def _path(self, chunk_size: int, config: SelectionConfig) -> Implementation:
        """The implementation of the attention over chunks; ValueError if it does not run here."""
        path = resolve_implementation(
            self.implementation,
            dtype=self.model.dtype,
            head_size=self.model.config.head_dim,
            chunk_size=min(config.keep_tokens or chunk_size, chunk_size),
        )
        require_device(path)
        return path

    def _require_memory(self, request: PreparedRequest) -> None:
        prompt = request.prompt
        path = self._path(prompt.chunk_size, request.config)
        require_memory(
            self.model,
            prompt,
            request.config,
            self.decoding,
            cache=request.cache,
            implementation=path,
            limit=self.memory_limit,
        )

    def _require_baseline_memory(self, prompt: np.ndarray) -> None:
        config = cache_method(self.method).decode_config(self.decoding)
        rows = bucket(prompt.size, 8)
        require_baseline_memory(self.model, rows, config, limit=self.memory_limit)
