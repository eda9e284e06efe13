"""A folder of encoded documents: encode once, ask again after a restart.

    STORE/KEY/        a snapshot; KEY is the fingerprint of ids, model, tokenizer and settings
    STORE/.KEY.lock   empty; locked by the process that encodes the document

A store needs neither a server nor clean-up. A process that dies leaves complete snapshots, and the
system releases its lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.memory import require_document_memory
from pdllm_jax.engine.request import document_prompt
from pdllm_jax.method.cache import ChunkCache, KVFormat
from pdllm_jax.method.chunking import TokenIds, check_bos_id, check_token_ids
from pdllm_jax.method.prefill import encode_document
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.storage import fingerprint, snapshot
from pdllm_jax.storage.atomic import discard
from pdllm_jax.storage.manifest import errors_as
from pdllm_jax.storage.snapshot import SnapshotError
from pdllm_jax.tokenizer import INSTRUCTION, Tokenizer

_KEY = re.compile(r"[0-9a-f]{64}")


class DocumentStore:
    """A folder of encoded documents; documents of several models may share it.

    Args:
      folder: created if it does not exist; its parent exists.
      model: encodes the documents.
      tokenizer: of text; None where documents are token ids.
      placement: where restored arrays go, as in `load_document`.
    """

    def __init__(
        self,
        folder: str | Path,
        model: MaskPredictor,
        tokenizer: Tokenizer | None = None,
        *,
        placement: snapshot.Placement | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(exist_ok=True)
        self.model, self.tokenizer, self.placement = model, tokenizer, placement
        self.identity = fingerprint.model_identity(model)

    def encode_text(
        self, context: str, *, instruction: str = INSTRUCTION, **options: Any
    ) -> ChunkCache:
        """Encodes a document of text behind an instruction, or restores it; as `encode_ids`."""
        if self.tokenizer is None:
            raise ValueError("the store has no tokenizer: use encode_ids")
        prefix, ids = self.tokenizer.encode_document(context, instruction)
        return self.encode_ids(prefix, ids, bos_id=self.tokenizer.bos_id, **options)

    def encode_ids(
        self,
        prefix_ids: TokenIds,
        context_ids: TokenIds,
        *,
        chunking: ChunkConfig = ChunkConfig(),
        bos_id: int | None = None,
        encode_batch: int = 8,
        kv_format: KVFormat = "full",
        memory_limit: int | None = None,
    ) -> ChunkCache:
        """Encodes a document of token ids and keeps it, or restores it.

        While another process encodes the same document, waits and restores the result. Replaces a
        damaged snapshot, with a RuntimeWarning that says what was wrong.

        Raises:
          ValueError: ids outside the vocabulary, a mask token, an empty document, anchors without
            BOS.
          SnapshotError: the disk is full, the folder cannot be written, or several processes of one
            mesh ask for a document that the store does not have.
          MemoryLimitError: encoding needs more memory than the device has, or than memory_limit.
        """
        vocabulary = self.model.config.vocab_size, self.model.config.mask_token_id
        bos_id = check_bos_id(bos_id, *vocabulary)
        prefix = check_token_ids("prefix", prefix_ids, *vocabulary)
        context = check_token_ids("context", context_ids, *vocabulary)
        prompt = document_prompt(prefix, context, chunking, bos_id)
        document = fingerprint.document_fingerprint(
            prompt.prefix, prompt.prefix_length, prompt.chunks, prompt.chunk_lengths
        )
        key = self.key(document, chunking, kv_format)
        if (cache := self._restore(key, document, warn=False)) is not None:
            return cache
        # Before the lock: encoding takes all processes of a mesh, of which one would hold it.
        snapshot.require_one_process(self.folder / key)
        with self._lock(key):
            if (cache := self._restore(key, document, warn=True)) is not None:
                return cache
            how: Any = {"encode_batch": encode_batch, "kv_format": kv_format}
            require_document_memory(self.model, prompt, **how, limit=memory_limit)
            discard(self.folder / key)  # damaged
            cache = encode_document(self.model, prompt, **how)
            options: Any = {"chunking": chunking, "tokenizer": self.tokenizer}
            snapshot.save_document(self.folder / key, self.identity, cache, **options)
            return cache

    def key(self, document: str, chunking: ChunkConfig, kv_format: KVFormat = "full") -> str:
        """Returns a document's name in the folder.

        Args:
          document: its `document_fingerprint`.
          chunking: settings that it is chunked with.
          kv_format: of its KV.
        """
        settings: list[Any] = [chunking.chunk_size, chunking.anchors, chunking.overlap]
        settings += [] if kv_format == "full" else [kv_format]  # keys of older stores lack it
        tokenizer = self.tokenizer and fingerprint.tokenizer_fingerprint(self.tokenizer)
        model = fingerprint.model_fields(self.identity)
        return fingerprint.digest([snapshot.SNAPSHOT.version, document, settings, tokenizer, model])

    def keys(self) -> list[str]:
        """Returns the names of all documents, of every model."""
        with errors_as(SnapshotError, f"{self.folder} cannot be read"):
            return sorted(filter(_KEY.fullmatch, os.listdir(self.folder)))

    def remove(self, key: str) -> None:
        """Removes a document, and what a killed process left of it. A missing one is fine."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not the key of a document")
        with self._lock(key):
            for name in (key, f".{key}.partial", f".{key}.replaced"):
                discard(self.folder / name)

    def _restore(self, key: str, document: str, *, warn: bool) -> ChunkCache | None:
        expected: Any = {"tokenizer": self.tokenizer, "document": document}
        place: Any = {"placement": self.placement, "mesh": self.model.mesh}
        if not os.path.lexists(self.folder / key):
            return None
        try:
            path, model = self.folder / key, self.identity
            return snapshot.load_document(path, model, **expected, **place).cache
        except SnapshotError as error:
            # Without the lock, another process may be removing it.
            if warn:
                warnings.warn(f"encoded again: {error}", RuntimeWarning, stacklevel=3)
            return None

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        # The file stays: after its removal two processes could lock two files of this name.
        path = self.folder / f".{key}.lock"
        with errors_as(SnapshotError, f"{path} cannot be locked"):
            file = path.open("a")
            fcntl.flock(file, fcntl.LOCK_EX)
        with file:
            yield
