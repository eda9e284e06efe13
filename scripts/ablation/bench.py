"""Examples and their answers: what one record is made of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ablation.flops import Sizes, answer_flops
from ablation.grid import DENSE, GIVEN, Cell
from pallas_kernels import Implementation
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    MaskPredictor,
    Tokenizer,
    denoise,
    init_denoise,
    load_config,
    load_model,
)
from pdllm_jax.deprecated import generate_batch_ids, generate_ids
from pdllm_jax.engine.request import Timer, request_keys
from pdllm_jax.method.cache_methods import cache_method
from pdllm_jax.method.chunking import bucket, split_context
from small_model import tasks
from small_model.corpus import Corpora, Text, fingerprint, from_repository, load

FIRST_SEED = 100_000  # of examples; the small model never saw any


@dataclasses.dataclass
class Bench:
    """A model, what it is asked about, and how it is run."""

    model: MaskPredictor
    tokenizer: Tokenizer
    encode: tasks.Encoder
    corpora: Corpora
    identity: dict[str, Any]
    batch_tokens: int
    encode_batch: int
    implementation: Implementation | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        corpora: Path | None,
        *,
        dtype: str | None = None,
        first_seed: int = FIRST_SEED,
        implementation: Implementation | None = None,
    ) -> Bench:
        """folder: a converted checkpoint. corpora: of small_model/corpus.py; None: built in."""
        tokenizer = Tokenizer.load(folder, load_config(folder))
        tokenizer.backend.encode_special_tokens = False  # the tasks spell the template out
        model = load_model(folder, dtype=dtype)
        texts = (
            from_repository(tokenizer.backend) if corpora is None else load(corpora, held_out=True)
        )
        return cls.of(
            model, tokenizer, texts,
            first_seed=first_seed, implementation=implementation,
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        model: MaskPredictor,
        tokenizer: Tokenizer,
        texts: Corpora,
        *,
        first_seed: int = FIRST_SEED,
        implementation: Implementation | None = None,
    ) -> Bench:
        """A bench on a model and texts at hand; how much goes at once depends on the device."""
        on_gpu = jax.default_backend() == "gpu"
        return cls(
            model=model,
            tokenizer=tokenizer,
            encode=tasks.Encoder(tokenizer.backend),
            corpora=texts,
            identity={
                "model": weights_fingerprint(model),
                "dtype": str(model.dtype),
                "corpora": fingerprint(texts),
                "first_seed": first_seed,
            },
            batch_tokens=1 << 17 if on_gpu else 1 << 11,
            encode_batch=64 if on_gpu else 8,
            implementation=implementation,
        )

    def batch_size(self, cell: Cell) -> int:
        """Examples at once: a power of two, at most 32."""
        if cell.streamed:
            return 1
        fits = max(1, min(32, self.batch_tokens // cell.length))
        return 1 << (fits.bit_length() - 1)

    def example(self, cell: Cell, index: int) -> tasks.Example:
        """Example `index` of all cells of this length, these tasks and depths."""
        texts = {
            name: text
            for name, text in self.corpora.texts.items()
            if len(text.tokens) >= cell.length
        }
        if not texts:  # longer than any of them: one behind the other
            whole = joined(self.corpora.texts.values())
            if len(whole.tokens) < cell.length:
                raise ValueError(f"all texts have {len(whole.tokens)} tokens, not {cell.length}")
            texts = {"all": whole}
        return tasks.make_example(
            cell.tasks[index % len(cell.tasks)],
            cell.length,
            self.identity["first_seed"] + index,
            corpora=dataclasses.replace(self.corpora, texts=texts),
            encode=self.encode,
            haystack="auto" if len(self.corpora.noise.tokens) >= cell.length else "text",
            depth=asked_depth(cell, index),
        )

    def records(self, cell: Cell, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Answers to these examples, in one batch."""
        size = self.batch_size(cell)
        # One shape, one compilation: the last batch is filled up with answers that are dropped.
        filled = [indices[min(i, len(indices) - 1)] for i in range(max(size, len(indices)))]
        examples = [self.example(cell, index) for index in filled]
        run = self._dense if cell.selection in DENSE else self._selecting
        answers = run(cell, filled, examples)
        pairs = list(zip(filled, examples, answers, strict=True))[: len(indices)]
        return [self._record(cell, *pair) for pair in pairs]

    def _record(
        self, cell: Cell, index: int, example: tasks.Example, answer: dict[str, Any]
    ) -> dict[str, Any]:
        start = example["needle_span"][0]
        record = {
            "example": index,
            "task": cell.tasks[index % len(cell.tasks)],
            "depth": round(start / len(example["context"]), 4),
            "asked_depth": asked_depth(cell, index),
            "right": tasks.score(self.encode, example["answer"], answer["tokens"]),
            "answer": example["answer"],
            "response": self.encode.decode(answer["tokens"]),
            **answer,
        }
        lengths: list[int] = []
        if cell.selection not in DENSE:
            bos = example["prefix"][0]
            lengths = split_context(example["context"], cell.chunking(), bos)[1].tolist()
            record["needle"] = sorted(needle_chunks(example["needle_span"], cell.chunking()))
            record["n_chunks"] = len(lengths)
        sizes = Sizes(
            prefix=len(example["prefix"]), query=len(example["query"]),
            response=tasks.RESPONSE_LENGTH, context=len(example["context"]),
            chunks=lengths, kept=answer.get("chunks", ()),
        )  # fmt: skip
        record["flops"] = answer_flops(self.model.config, cell, sizes, answer["evaluations"])
        return record

    def _selecting(
        self, cell: Cell, indices: Sequence[int], examples: Sequence[tasks.Example]
    ) -> list[dict[str, Any]]:
        oracle = None
        if cell.selection in GIVEN:
            oracle = [
                given_chunks(cell, index, example)
                for index, example in zip(indices, examples, strict=True)
            ]
        requests = [(e["prefix"], e["context"], e["query"]) for e in examples]
        seeds = [cell.seed * 1_000_003 + index for index in indices]
        settings: dict[str, Any] = {
            "chunking": cell.chunking(),
            "selection": cell.selecting(self.encode_batch),
            "decode": cell.decoding(tasks.RESPONSE_LENGTH),
            "bos_id": self.tokenizer.bos_id,
            "implementation": self.implementation,
        }
        if cell.streamed:  # the KV of a long document is not kept
            results = [
                generate_ids(
                    self.model, *request, oracle=oracle and oracle[i], seed=seed, **settings
                )
                for i, (request, seed) in enumerate(zip(requests, seeds, strict=True))
            ]
        else:
            results = generate_batch_ids(
                self.model, requests, oracle=oracle, seeds=seeds, **settings
            )
        answers = []
        for result in results:
            assert result.selection is not None
            answers.append({
                "tokens": result.tokens,
                "evaluations": result.evaluations,
                "seconds": _shared(result.timings, len(results)),
                "chunks": result.selection["chunks"],
                "scores": result.selection["scores"],
            })  # fmt: skip
        return answers

    def _dense(
        self, cell: Cell, indices: Sequence[int], examples: Sequence[tasks.Example]
    ) -> list[dict[str, Any]]:
        """A baseline, on equally long prompts together; their tokens are those of each alone."""
        config = cache_method(DENSE[cell.selection]).decode_config(
            cell.decoding(tasks.RESPONSE_LENGTH)
        )
        prompts = [e["prefix"] + e["context"] + e["query"] for e in examples]
        state, timings = dense_answers(self.model, prompts, config, indices)
        rows, evaluations = (np.asarray(x).tolist() for x in (state.tokens, state.evaluations))
        return [
            {"tokens": row, "evaluations": n, "seconds": _shared(timings, len(prompts))}
            for row, n in zip(rows, evaluations, strict=True)
        ]


def joined(texts: Iterable[Text]) -> Text:
    """The texts one behind the other."""
    texts = list(texts)
    starts = np.cumsum([0, *(len(text.tokens) for text in texts)])
    return Text(
        np.concatenate([text.tokens for text in texts]),
        np.unique(
            np.concatenate(
                [text.breaks + start for text, start in zip(texts, starts, strict=False)]
            )
        ),
    )


def dense_answers(
    model: MaskPredictor,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int],
) -> tuple[Any, dict[str, float]]:
    """Final state and seconds of a batch without selection, the whole prompts as queries."""
    timer = Timer()
    longest = bucket(max(len(prompt) for prompt in prompts), 8)
    rows = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    with timer.phase("decode"):
        state = init_denoise(
            model, None, None, jnp.asarray(rows), config, request_keys(seeds, len(prompts)),
            query_length=jnp.asarray([len(prompt) for prompt in prompts]),
        )  # fmt: skip
        state = jax.block_until_ready(denoise(model, None, state, config=config))
    return state, timer.seconds


def weights_fingerprint(model: MaskPredictor) -> str:
    """Tells weights apart by the first and the last row of every tensor, and by their shapes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(model, nnx.Param))
    ):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        for row in (leaf[:1], leaf[-1:]):
            digest.update(np.asarray(row, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _shared(timings: dict[str, float], requests: int) -> dict[str, float]:
    """Seconds of a batch by phase, a request's share; what was compiled is the batch's."""
    shares = {
        name: round(seconds / requests, 6)
        for name, seconds in timings.items()
        if name not in ("compile", "total")
    }
    return {**shares, "total": round(sum(shares.values()), 6)}


def asked_depth(cell: Cell, index: int) -> float | None:
    """The depth that the example's needle is put at; every depth gets every task."""
    if cell.depths is None:
        return None
    return (index // len(cell.tasks)) % cell.depths / max(1, cell.depths - 1)


def needle_chunks(span: tuple[int, int], chunking: ChunkConfig) -> set[int]:
    """Chunks that hold the whole needle, or where none does, those that hold a part of it."""
    size = chunking.chunk_size - int(chunking.anchors)
    start, end = span
    chunks = range(start // chunking.stride + 1)
    whole = {
        i for i in chunks if i * chunking.stride <= start and end <= i * chunking.stride + size
    }
    last = (end - 1) // chunking.stride
    return whole or set(range(start // chunking.stride, last + 1))


def given_chunks(cell: Cell, index: int, example: tasks.Example) -> list[int]:
    """Ids for the selections that are made here, at most K of them."""
    chunking = cell.chunking()
    n = len(split_context(example["context"], chunking, 0)[1])
    start, end = example["needle_span"]
    if cell.selection == "without":
        size = chunking.chunk_size - int(chunking.anchors)
        avoid = {
            i for i in range(n) if i * chunking.stride < end and start < i * chunking.stride + size
        }
        kept: list[int] = []
    else:
        avoid = needle_chunks(example["needle_span"], chunking)
        kept = sorted(avoid)[: cell.top_k]
    if cell.selection != "needle":
        rest = [i for i in range(n) if i not in avoid]
        order = np.random.default_rng([cell.seed, index]).permutation(len(rest))
        kept += [rest[i] for i in order[: cell.top_k - len(kept)]]
    return sorted(kept)
