"""Requests, from document and question to tokens, through one pipeline for one and for many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

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
from pdllm_jax.engine.inputs import (
    Request,
    RequestReader,
    Text,
    map_named,
    oracle_ids,
    stack_ids,
)
from pdllm_jax.engine.memory import require_document_memory, require_memory
from pdllm_jax.engine.programs import Shapes
from pdllm_jax.engine.request import (
    PreparedRequest,
    SelectedRequest,
    StartedRequest,
    Timer,
    WholePrompts,
    document_prompt,
    question_prompt,
    request_keys,
    require_kv_format,
    select_chunks,
    start_decoding,
)
from pdllm_jax.method.cache import ChunkCache, pool_dtype
from pdllm_jax.method.caches import CacheMethod, Method, cache_method
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    TokenIds,
    batch_prompts,
    batch_size,
    check_bos_id,
    chunk_prompt,
)
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

    `on_block` of its methods is called with (request, block, its tokens) when a block is final: its
    tokens are the answer's. The blocks after the end of a text are left out. A block in which the
    model has left a slot masked waits for the later block that fills it, or for the request's end.

    Args:
      model: from `load_model`.
      tokenizer: of text; None where requests are token ids.
      chunking, selection, decoding: settings of the method.
      method: "prefilling", or a method on the whole prompt: "plain" (published generation),
        "prefix-cache" and "dual-cache" (Fast-dLLM), and those of docs/rivals.md. A name, a name
        with settings ("NAME:SETTING=VALUE"), or a `CacheMethod`.
      instruction: text before the document.
      system: text of a system turn before it, for a chat template that takes one.
      chat: text is a user's turn in the checkpoint's chat template; False puts BOS in front alone.
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
    method: Method = "prefilling"
    instruction: str = INSTRUCTION
    system: str = ""
    chat: bool = True
    bos_id: int | None = None
    implementation: Implementation | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        self._method.decode_config(self.decoding)  # checks method and guidance
        if self._method.uses_chunks:
            self.selection.scorer.check(self.model.config)
        decoding, eot = self.decoding, self.tokenizer.eot_id if self.tokenizer else None
        if decoding.confidence_eos_eot_inf and decoding.eot_token_id is None and eot is not None:
            decoding = dataclasses.replace(decoding, eot_token_id=eot)
            object.__setattr__(self, "decoding", decoding)
        check_bos_id(self.bos_id, *self._vocabulary)
        if self.system:  # checks that the template takes it
            self._reader.document("any", None)

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
          context, question, prefix, oracle, seed: the fields of `Request`. The prompt of a method
            on the whole prompt is prefix, context and question one after the other; on ids any of
            them may be empty.
          on_block: see `Engine`.
        """
        request = Request(context, question, prefix, oracle, seed)
        return self.answer_batch([request], on_block=on_block)[0]

    def answer_batch(
        self, requests: Sequence[Request | tuple[Text, Text]], *, on_block: OnBlock | None = None
    ) -> list[Answer]:
        """Answers many requests in one batch, each as `answer` would answer it alone.

        Documents, questions and the number of evaluations may differ. The batch is padded to a
        power of two.

        Args:
          requests: requests, or tuples of their first fields. on_block: see `Engine`.

        Raises:
          ValueError: also where there are no requests; of several, the message has the request's
            number.
        """
        if not requests:
            raise ValueError("no requests")
        given = [Request(*request) for request in requests]
        if self._method.uses_chunks:
            return self._run(self._prepare(given), on_block)
        return self._whole(self._prepare_whole(given), on_block)

    def check(self, requests: Sequence[Request | tuple[Text, Text]]) -> None:
        """Raises what `answer_batch` would raise for these requests, and computes nothing."""
        given = [Request(*request) for request in requests]
        if self._method.uses_chunks:
            self._require_memory(self._prepare(given))
        else:
            self._prepare_whole(given)

    def encode(self, context: Text, *, prefix: TokenIds | None = None) -> ChunkCache:
        """Encodes a document for `ask`, independently of any question.

        Args:
          context, prefix: as in `Request`.

        Returns:
          The KV of every chunk.
        """
        parts = self._reader.document(context, prefix)
        prompt = document_prompt(*parts, self.chunking, self._bos_id)
        group, kind = self.selection.encode_batch, self.selection.kv_format
        require_document_memory(self.model, prompt, group, kind, limit=self.memory_limit)
        return encode_document(self.model, prompt, encode_batch=group, kv_format=kind)

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
          on_block: see `Engine`; its request is the number of the question.
        """
        if not questions:
            raise ValueError("no questions")
        if not self._method.uses_chunks:
            raise ValueError(f"a document is asked with method 'prefilling', not '{self._method}'")
        check_scorable(document)
        require_kv_format(document.pool, self.selection)
        if document.documents > 1:
            raise ValueError(f"document must be one, the cache holds {document.documents}")
        for name, values in (("oracle", oracle), ("seeds", seeds)):
            if values is not None and len(values) != len(questions):
                raise ValueError(f"{name} has {len(values)} entries for {len(questions)} questions")
        chunks = int(np.count_nonzero(np.asarray(document.lengths)))

        def read(item: tuple[Text, Sequence[int] | None]) -> tuple[np.ndarray, np.ndarray | None]:
            return self._reader.question(item[0]), oracle_ids(item[1], self.selection, chunks)

        count, size = len(questions), batch_size(len(questions))
        given = list(zip(questions, [None] * count if oracle is None else oracle, strict=True))
        ids, named = zip(*map_named("question", read, given), strict=True)
        prompt = question_prompt(document, ids, size)
        keys = request_keys([0] * count if seeds is None else seeds, size, "question")
        table = stack_ids(named, size)
        request = PreparedRequest(prompt, self.selection, keys, count, document, table)
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
        if not self._method.uses_chunks:
            raise ValueError(f"method '{self._method}' has nothing to prefill")
        request = self._prepare([Request(context, question, prefix, oracle, seed)])
        selected = self._select(request, Timer())
        if encode:
            return self._start(selected, Timer())
        return dataclasses.replace(selected, decoding=self.decoding)

    def decode(
        self, request: StartedRequest | SelectedRequest, *, on_block: OnBlock | None = None
    ) -> list[Answer]:
        """Decodes what `prefill` has returned; the state of a started request is consumed.

        Args:
          request: its own settings apply; the engine's `decoding` where it has none.
          on_block: see `Engine`.

        Returns:
          An answer to each of the requests.
        """
        timer = Timer()
        if isinstance(request, SelectedRequest):
            request = self._start(request, timer)
        return self._decode(request, timer, on_block)

    @property
    def _method(self) -> CacheMethod:
        return cache_method(self.method)

    @property
    def _vocabulary(self) -> tuple[int, int]:
        """Its size, and the mask token, which is refused in a prompt."""
        return self.model.config.vocab_size, self.model.config.mask_token_id

    @property
    def _bos_id(self) -> int | None:
        if self.bos_id is None and self.tokenizer is not None:
            return self.tokenizer.bos_id
        return self.bos_id

    @property
    def _reader(self) -> RequestReader:
        turn = {"chat": self.chat, "system": self.system}
        parts = self._method.uses_chunks
        return RequestReader(self.tokenizer, self._vocabulary, self.instruction, turn, parts)

    def token_ids(self, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the checked token ids of a request: (prefix, context, question), int32.

        For a method on the whole prompt the text is tokenized in one part, the question.
        """
        return self._reader.request(request)

    def _prepare(self, requests: Sequence[Request]) -> PreparedRequest:
        count, size = len(requests), batch_size(len(requests))
        tight = self.selection.keeps_pool(documents=size)

        def read(request: Request) -> tuple[ChunkedPrompt, np.ndarray | None]:
            parts = self.token_ids(request)
            prompt = chunk_prompt(*parts, self.chunking, bos_id=self._bos_id, tight=tight)
            return prompt, oracle_ids(request.oracle, self.selection, prompt.n_chunks)

        prompts, named = zip(*map_named("request", read, requests), strict=True)
        keys, oracle = request_keys([x.seed for x in requests], size), stack_ids(named, size)
        prompt = batch_prompts(prompts, size)
        return PreparedRequest(prompt, self.selection, keys, count, oracle=oracle)

    def _run(self, request: PreparedRequest, on_block: OnBlock | None) -> list[Answer]:
        timer = Timer()
        started = self._start(self._select(request, timer), timer)
        return self._decode(started, timer, on_block)

    def _require_memory(self, request: PreparedRequest) -> None:
        require_memory(
            self.model,
            Shapes.of(request.prompt, request.cache),
            request.config,
            self.decoding,
            implementation=self._path(request.prompt.chunk_size, request.config),
            limit=self.memory_limit,
        )

    def _select(self, request: PreparedRequest, timer: Timer) -> SelectedRequest:
        self._require_memory(request)
        return select_chunks(self.model, request, implementation=self.implementation, timer=timer)

    def _start(self, request: SelectedRequest, timer: Timer) -> StartedRequest:
        self._path(request.cache.tokens.shape[-1], request.config)
        decoding, path = request.decoding or self.decoding, self.implementation
        return start_decoding(self.model, request, decoding, implementation=path, timer=timer)

    def _decode(
        self, request: StartedRequest, timer: Timer, on_block: OnBlock | None
    ) -> list[Answer]:
        path = self._path(request.pool.k.shape[3], request.config)
        answers = decode_request(self.model, request, path, timer, on_block)
        return [self._with_text(answer) for answer in answers]

    def _path(self, chunk_size: int, config: SelectionConfig) -> Implementation:
        """The implementation of the attention over chunks; ValueError if it does not run here."""
        path = resolve_implementation(
            self.implementation,
            dtype=self.model.dtype,
            head_size=self.model.config.head_dim,
            chunk_size=min(config.keep_tokens or chunk_size, chunk_size),
            pool_dtype=pool_dtype(config.kv_format),
        )
        require_device(path)
        return path

    def _prepare_whole(self, requests: Sequence[Request]) -> WholePrompts:
        def read(request: Request) -> np.ndarray:
            if request.oracle is not None:
                raise ValueError(f"oracle is for method 'prefilling', not for '{self._method}'")
            prompt = np.concatenate(self.token_ids(request))
            if prompt.size == 0:
                raise ValueError("prompt is empty: prefix, context and question have no tokens")
            return prompt

        ids: list[np.ndarray] = map_named("request", read, requests)
        prompts = WholePrompts.of(ids, [request.seed for request in requests])
        (size, rows), method = prompts.ids.shape, self._method
        decode, shapes = method.decode_config(self.decoding), Shapes(size, 0, rows, 0, 1)
        method.check(self.model.config, decode, rows + decode.gen_length)
        require_memory(self.model, shapes, decode=decode, limit=self.memory_limit)
        return prompts

    def _whole(self, prompts: WholePrompts, on_block: OnBlock | None) -> list[Answer]:
        config, timer = self._method.decode_config(self.decoding), Timer()
        with timer.phase("decode"):
            state = prompts.start(self.model, config)
            state = denoise_blocks(self.model, None, state, on_block, config=config)
        paths = used_paths(self.model, len(prompts.ids) * config.block_length)
        answers = [read_answer(state, i, None, timer, paths) for i in range(prompts.requests)]
        return [self._with_text(answer) for answer in answers]

    def _with_text(self, answer: Answer) -> Answer:
        if self.tokenizer is None:
            return answer
        return dataclasses.replace(answer, text=self.tokenizer.decode(answer.tokens))
