"""The ablation's examples: retrieval tasks of the small model, and one record for each answer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.answering import answer, select_alone
from experiments.benchmarks import generated
from experiments.calibrating import calibration_folder
from experiments.flops import RowCounter, Sizes, answer_flops
from experiments.grids import GIVEN, MULTI, Cell
from experiments.records import Key, Records
from experiments.runner import Work
from pallas_kernels import Implementation
from pdllm_jax import (
    ChunkConfig,
    Engine,
    MaskPredictor,
    MemoryLimitError,
    Request,
    SelectionConfig,
    Tokenizer,
)
from pdllm_jax.engine.memory import require_memory
from pdllm_jax.engine.programs import Shapes
from pdllm_jax.method.chunking import bucket, chunks_of_span, needle_chunks, split_context
from small_model import tasks
from small_model.corpus import Corpora, Text, fingerprint

FIRST_SEED = 100_000  # of examples; the small model was not trained on any from here on


def record_key(cell: Cell, index: int) -> Key:
    """Returns the key of an example's record."""
    return Key("retrieval", cell.tasks[index % len(cell.tasks)], cell.key, str(index))


def records_of(
    cell: Cell, done: Mapping[Key, dict[str, Any]], wanted: int
) -> dict[int, dict[str, Any]]:
    """Returns the cell's records by example, of the first `wanted` examples."""
    rows = {i: done.get(record_key(cell, i)) for i in range(wanted)}
    return {index: row for index, row in rows.items() if row is not None}


def missing_work(
    bench: Any, cells: Sequence[Cell], wanted: int, records: Records
) -> Iterator[Work]:
    """Makes work of the examples that have no record, in batches. bench: a Retrieval."""
    for cell in cells:
        existing = records_of(cell, records.done, wanted)
        missing = [index for index in range(wanted) if index not in existing]
        size = bench.batch_size(cell)
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            keys = [record_key(cell, index) for index in batch]
            yield Work(cell.key, keys, partial(bench.records, cell, batch))


def share_cells(cells: Sequence[Cell], count: int) -> list[list[Cell]]:
    """Divides cells among processes; each program is compiled by one process alone."""
    programs = defaultdict(list)
    for cell in cells:
        programs[cell.programs()].append(cell)
    shares: list[list[Cell]] = [[] for _ in range(count)]
    loads = [0.0] * count
    # Compiling takes about as long as two cells of 4,096 tokens.
    costs = [(2 + sum(cell.length for cell in group) / 4096, group) for group in programs.values()]
    for cost, group in sorted(costs, key=lambda item: item[0], reverse=True):
        least = loads.index(min(loads))
        loads[least] += cost
        shares[least] += group
    return shares


def _on_device(gpu: int, cpu: int) -> Any:
    return dataclasses.field(default_factory=lambda: gpu if jax.default_backend() == "gpu" else cpu)


@dataclasses.dataclass
class Retrieval:
    """A model, the texts that it is asked about, and how it runs.

    first_seed: of the examples. batch_tokens: tokens of a batch. folder: of the run, where its
    calibrations are. load: loads the model with weights of another format.
    """

    model: MaskPredictor
    tokenizer: Tokenizer
    corpora: Corpora
    first_seed: int = FIRST_SEED
    implementation: Implementation | None = None
    batch_tokens: int = _on_device(1 << 17, 1 << 11)
    encode_batch: int = _on_device(64, 8)
    folder: Path | None = None
    load: Callable[[str], MaskPredictor] | None = None

    @cached_property
    def encode(self) -> tasks.Encoder:
        """Encodes with the checkpoint's tokenizer."""
        return tasks.Encoder(self.tokenizer.backend)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What all records of a run have in common."""
        texts, model = fingerprint(self.corpora), weights_fingerprint(self.model)
        dtype = str(self.model.dtype)
        return {"model": model, "dtype": dtype, "corpora": texts, "first_seed": self.first_seed}

    def batch_size(self, cell: Cell) -> int:
        """Returns the examples of a batch: a power of two, at most 32, that fits the device."""
        if cell.streamed:
            return 1
        fits = max(1, min(32, self.batch_tokens // cell.length))
        size = 1 << (fits.bit_length() - 1)
        while size > 1 and not cell.method.uses_chunks and not self._fits(cell, size):
            size //= 2
        return size

    def _fits(self, cell: Cell, batch: int) -> bool:
        """Tells whether the caches of a batch of whole prompts fit the device, by the plan."""
        decode = cell.method.decode_config(cell.decode_config(cell.response_length))
        shapes = Shapes(batch, 0, bucket(cell.length - cell.response_length, 8), 0, 1)
        try:
            require_memory(self.model, shapes, decode=decode)
        except MemoryLimitError:
            return False
        return True

    def example(self, cell: Cell, index: int) -> tasks.Example:
        """Returns example `index` of all cells with this length, these tasks and depths."""
        texts = {k: t for k, t in self.corpora.texts.items() if len(t.tokens) >= cell.length}
        if not texts:  # longer than any one of them
            texts = {"all": joined(self.corpora.texts.values())}
            if (tokens := len(texts["all"].tokens)) < cell.length:
                raise ValueError(f"all texts have {tokens} tokens, not {cell.length}")
        if MULTI in cell.tasks:
            corpora, place = dataclasses.replace(self.corpora, texts=texts), self.first_seed + index
            return generated.multi_needle(cell.length, place, corpora, self.encode)
        return tasks.make_example(
            cell.tasks[index % len(cell.tasks)],
            cell.length,
            self.first_seed + index,
            corpora=dataclasses.replace(self.corpora, texts=texts),
            encode=self.encode,
            haystack="auto" if len(self.corpora.noise.tokens) >= cell.length else "text",
            depth=cell.depth(index),
        )

    @cached_property
    def _models(self) -> dict[str, MaskPredictor]:
        return {"full": self.model}

    def model_of(self, cell: Cell) -> MaskPredictor:
        """Returns the model with the cell's format of weights."""
        if cell.weight_format not in self._models:
            assert self.load is not None
            self._models[cell.weight_format] = self.load(cell.weight_format)
        return self._models[cell.weight_format]

    def selection(self, cell: Cell) -> SelectionConfig:
        """Returns the cell's selection; its scorer is calibrated if it can be."""
        config = cell.selection_config(self.encode_batch)
        if self.folder is None:
            return config
        return config.calibrated(calibration_folder(self.folder, cell))

    def engine(self, cell: Cell) -> Engine:
        """Returns the library's engine with the cell's settings."""
        return Engine(
            self.model_of(cell),
            chunking=cell.chunk_config(),
            selection=self.selection(cell),
            decoding=cell.decode_config(cell.response_length),
            method=cell.method,
            bos_id=self.tokenizer.bos_id,
            implementation=self.implementation,
        )

    def records(self, cell: Cell, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Answers these examples in one batch and returns their records."""
        # One shape, one compilation: the last batch is filled up with answers that are dropped.
        size = max(self.batch_size(cell), len(indices))
        examples = {index: self.example(cell, index) for index in indices}
        requests = [request(cell, *item) for item in examples.items()]
        requests += requests[-1:] * (size - len(indices))
        engine, together = self.engine(cell), not cell.streamed
        run = select_alone if cell.selects_only else partial(answer, together=together)
        rows = zip(examples.items(), run(engine, requests), strict=False)
        chosen = engine.selection
        return [self.record(cell, *item, answered, chosen) for item, answered in rows]

    def record(
        self,
        cell: Cell,
        index: int,
        example: tasks.Example,
        answered: Mapping[str, Any],
        selection: SelectionConfig,
    ) -> dict[str, Any]:
        """Returns the record of an answer. selection: that it was made with."""
        chunking, context = cell.chunk_config(), example["context"]
        response, answers = self.encode.decode(answered["tokens"]), answers_of(example)
        right = [tasks.is_right(answers[0], response)]
        if len(answers) > 1:
            right = [answer in response for answer in answers]
        record = {
            "score": float(np.mean(right)),
            "response": response,
            "answers": answers,
            **answered,
            "example": index,
            "depth": round(example["needle_span"][0] / len(context), 4),
            "asked_depth": cell.depth(index),
        }
        lengths: list[int] = []
        if cell.method.uses_chunks:
            lengths = split_context(context, chunking, example["prefix"][0])[1].tolist()
            held = chunks_with(example, chunking, needle_chunks)
            record |= {"needle": sorted(held), "n_chunks": len(lengths)}
        if cell.selects_only:
            record["score"] = float(holds_needle(record))
        parts = (example["prefix"], example["query"], answered["tokens"], context)
        sizes = Sizes(*map(len, parts), chunks=lengths, kept=answered["chunks"] or ())
        counted = self.model.config, cell, sizes, answered["evaluations"], selection
        flops = answer_flops(*counted, rows=answered["rows"])
        rows = answer_flops(*counted, rows=answered["rows"], counter=RowCounter)
        return {**record, "rows": rows and sum(rows.values()), "flops": flops}


def request(cell: Cell, index: int, example: tasks.Example) -> Request:
    """Returns the request that asks an example's question under the cell's settings."""
    given = given_chunks(cell, index, example) if cell.selection in GIVEN else None
    seed = cell.seed * 1_000_003 + index if cell.method.uses_chunks else index
    return Request(example["context"], example["query"], example["prefix"], given, seed)


def answers_of(example: tasks.Example) -> list[str]:
    """Returns the numbers that an example asks for."""
    return [example["answer"], *(answer for answer, _ in example.get("others", ()))]


def chunks_with(
    example: tasks.Example,
    chunking: ChunkConfig,
    of_span: Callable[[tuple[int, int], ChunkConfig], Iterable[int]],
) -> set[int]:
    """Returns the chunks of all facts that an example asks for, by their spans."""
    spans = [example["needle_span"], *(span for _, span in example.get("others", ()))]
    return {chunk for span in spans for chunk in of_span(span, chunking)}


def holds_needle(record: Mapping[str, Any]) -> bool:
    """Tells whether all chunks that hold the needle are kept."""
    return set(record["needle"]) <= set(record["chunks"])


def joined(texts: Iterable[Text]) -> Text:
    """Joins texts into one."""
    texts = list(texts)
    starts = np.cumsum([0, *(len(text.tokens) for text in texts[:-1])])
    breaks = [text.breaks + start for text, start in zip(texts, starts, strict=True)]
    return Text(np.concatenate([text.tokens for text in texts]), np.unique(np.concatenate(breaks)))


def weights_fingerprint(model: MaskPredictor) -> str:
    """Tells weights apart by the first and the last row of every tensor, and by their shapes."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for path, leaf in leaves:
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        for row in (leaf[:1], leaf[-1:]):
            digest.update(np.asarray(row, np.float32).tobytes())
    return digest.hexdigest()[:16]


def given_chunks(cell: Cell, index: int, example: tasks.Example) -> list[int]:
    """Returns the chunks that the selections of GIVEN keep, at most K of them."""
    chunking, without = cell.chunk_config(), cell.selection == "without"
    avoid = chunks_with(example, chunking, chunks_of_span if without else needle_chunks)
    kept = [] if without else sorted(avoid)[: cell.top_k]
    if cell.selection != "needle":
        n = len(split_context(example["context"], chunking, 0)[1])
        rest = [i for i in range(n) if i not in avoid]
        order = np.random.default_rng([cell.seed, index]).permutation(len(rest))
        kept += [rest[i] for i in order[: cell.top_k - len(kept)]]
    return sorted(kept)
