"""Documents that were encoded, kept on disk: encode once, ask again after a restart.

    STORE/KEY/        a snapshot (`snapshot`), KEY from content, model, tokenizer and settings
    STORE/.KEY.lock   held by whoever encodes that document; empty

A store needs no server and no clean-up: a process that dies, at whatever point, leaves snapshots
that are whole and locks that the system has let go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.memory import require_document_memory
from pdllm_jax.method.cache import ChunkCache
from pdllm_jax.method.chunking import (
    ChunkedPrompt,
    TokenIds,
    check_bos_id,
    check_token_ids,
    chunk_prompt,
)
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage.atomic import discard
from pdllm_jax.storage.fingerprint import (
    ModelIdentity,
    document_fingerprint,
    model_identity,
    settings_fingerprint,
    tokenizer_fingerprint,
)
from pdllm_jax.storage.snapshot import Placement, load_document, require_one_process, save_document
from pdllm_jax.storage.snapshot_format import VERSION, SnapshotError, model_fields
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

_KEY = re.compile(r"[0-9a-f]{64}")


class DocumentStore:
    """A folder of encoded documents of one model and tokenizer; other models' lie beside them.

    Args:
      folder: made if it does not exist; its parent exists.
      model: that encodes, and that answers.
      tokenizer: of text; None where documents and questions are token ids.
      placement: where restored arrays go, as `load_document` takes it.
    """

    def __init__(
        self,
        folder: str | Path,
        model: MaskPredictor,
        tokenizer: Tokenizer | None = None,
        *,
        placement: Placement | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(exist_ok=True)
        self.model, self.tokenizer, self.placement = model, tokenizer, placement
        self.identity: ModelIdentity = model_identity(model)

    def encode_text(
        self,
        context: str,
        *,
        instruction: str = INSTRUCTION,
        chunking: ChunkConfig = ChunkConfig(),
        encode_batch: int = 8,
        memory_limit: int | None = None,
    ) -> ChunkCache:
        """As `pdllm_jax.encode_text`, from the store where it has the document."""
        if self.tokenizer is None:
            raise ValueError("the store has no tokenizer: use encode_ids")
        prefix, _ = self.tokenizer.around_document("?", instruction)
        ids = self.tokenizer.encode(context)
        return self.encode_ids(
            prefix, ids, chunking=chunking, bos_id=self.tokenizer.bos_id,
            encode_batch=encode_batch, memory_limit=memory_limit,
        )  # fmt: skip

    def encode_ids(
        self,
        prefix_ids: TokenIds,
        context_ids: TokenIds,
        *,
        chunking: ChunkConfig = ChunkConfig(),
        bos_id: int | None = None,
        encode_batch: int = 8,
        memory_limit: int | None = None,
    ) -> ChunkCache:
        """The document's cache, for `ask_ids`: restored, or encoded here and kept.

        Where another process is encoding the same document, waits for it and restores what it has
        kept. A snapshot that is damaged is replaced, with a RuntimeWarning that says what was wrong
        with it.

        Raises:
          ValueError: ids outside the vocabulary, an empty document, anchors without BOS.
          SnapshotError: the disk is full, the store can't be written, or several processes of one
            mesh ask for a document that it does not have.
          MemoryLimitError: encoding would take more than the device gives, or memory_limit (bytes).
        """
        vocab = self.model.config.vocab_size
        bos_id = check_bos_id(bos_id, vocab)
        prefix = check_token_ids("prefix", prefix_ids, vocab)
        context = check_token_ids("context", context_ids, vocab)
        # The query is not read; a prompt needs one.
        prompt = chunk_prompt(prefix, context, [0], chunking, bos_id=bos_id, tight=True)
        key = self.key(prompt, chunking)
        if (cache := self._restored(key, replacing=False)) is not None:
            return cache
        # Before the lock: encoding takes all processes, of which one would hold it.
        require_one_process(self.folder / key)
        with self._lock(key):
            if (cache := self._restored(key, replacing=True)) is not None:
                return cache
            require_document_memory(self.model, prompt, encode_batch, limit=memory_limit)
            if os.path.lexists(self.folder / key):  # damaged, perhaps past looking like a snapshot
                self._discard(key)
            cache = encode_document(self.model, prompt, encode_batch=encode_batch)
            save_document(
                self.folder / key,
                self.identity,
                cache,
                chunking=chunking,
                tokenizer=self.tokenizer,
                overwrite=True,
            )
            return cache

    def key(self, prompt: ChunkedPrompt, chunking: ChunkConfig) -> str:
        """The document's name: of its tokens, model, weights, dtype, RoPE, tokenizer, chunking."""
        return settings_fingerprint(
            {
                "version": VERSION,
                "document": document_fingerprint(
                    prompt.prefix, prompt.prefix_length, prompt.chunks, prompt.chunk_lengths
                ),
                "model": model_fields(self.identity),
                "tokenizer": self.tokenizer and tokenizer_fingerprint(self.tokenizer),
                "chunking": [chunking.chunk_size, chunking.anchors, chunking.overlap],
            }
        )

    def keys(self) -> list[str]:
        """The documents that are there, of whatever model."""
        try:
            names = [entry.name for entry in self.folder.iterdir()]
        except OSError as error:
            raise SnapshotError(f"{self.folder} can not be read: {error.strerror}") from None
        return sorted(name for name in names if _KEY.fullmatch(name))

    def remove(self, key: str) -> None:
        """Forgets a document, and what an interrupted encoding of it has left; none is fine."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no document's key")
        with self._lock(key):
            self._discard(key)
            for rest in ("partial", "replaced"):
                discard(self.folder / f".{key}.{rest}")

    def _discard(self, key: str) -> None:
        """Under its own name a snapshot is whole: it gets another before it is taken apart."""
        removed = self.folder / f".{key}.removed"
        discard(removed)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.folder / key, removed)
        discard(removed)

    def _restored(self, key: str, *, replacing: bool) -> ChunkCache | None:
        folder = self.folder / key
        if not os.path.lexists(folder):
            return None
        try:
            return load_document(
                folder, self.identity,
                tokenizer=self.tokenizer, placement=self.placement, mesh=self.model.mesh,
            ).cache  # fmt: skip
        except SnapshotError as error:
            # Without the lock it may be on its way out (`remove`, or another process's repair).
            if replacing and os.path.lexists(folder):
                warnings.warn(f"encoded again: {error}", RuntimeWarning, stacklevel=4)
            return None

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        # The file stays: were it removed, two processes could hold two locks of one name.
        path = self.folder / f".{key}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise SnapshotError(f"{path} can not be locked: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
