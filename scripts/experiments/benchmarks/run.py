"""Asks a model every example of a benchmark by every method, and summarises the scores."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.answering import answer
from experiments.benchmarks.example import Example, Task
from experiments.records import Key, Records
from experiments.runner import Work
from experiments.statistics import bootstrap, wilson
from experiments.tables import table
from pdllm_jax import DecodeConfig, Engine, Request
from pdllm_jax.engine.request import Timer
from pdllm_jax.evaluation.prompts import dense_prompt, fitting_block, split_request, truncate_middle
from pdllm_jax.method.caches import Method, cache_method
from pdllm_jax.method.unmasking import Unmasking
from pdllm_jax.storage.manifest import MANIFEST

Ask = Callable[[Task, Example], Sequence[Mapping[str, Any]]]  # returns an example's one record

# LongBench-E's three lengths, in words.
_LENGTHS = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, float("inf")))
_COLUMNS = {
    "benchmark": "{benchmark}",
    "task": "{task}",
    "method": "{method}",
    "examples": "{examples}",
    "score": "{score:.2f}",
    "95% interval": "[{interval[0]:.2f}, {interval[1]:.2f}]",
    "truncated": "{truncated}",
    "seconds": "{seconds_median:.2f}",
}


@dataclasses.dataclass(frozen=True)
class Asker:
    """An engine with the settings that all examples share.

    engine: with tokenizer; each example sets method and decoding.
    unmask: a rule instead of the threshold, as in `DecodeConfig`.
    max_length: tokens of a baseline's prompt, without chat template and response; None: what the
      model's max_sequence_length leaves beside these two.
    block_length: of a response, at most; the largest divisor of its length is taken.
    gen_length: response tokens, instead of the benchmark's.
    """

    engine: Engine
    threshold: float | None = 0.9
    unmask: Unmasking | None = None
    block_length: int = 32
    gen_length: int | None = None
    max_length: int | None = None
    chat: bool = True
    seed: int = 0

    def decoding(self, task: Task) -> DecodeConfig:
        """Returns greedy decoding that ends with the block in which the text ends.

        Without `unmask` it is Fast-dLLM's rule: for a model with a logit shift, that for Dream.
        """
        decode: Callable[..., DecodeConfig] = DecodeConfig
        if self.engine.model.config.logit_shift:
            decode = partial(DecodeConfig.fast_dllm_dream, dual_cache=True)
        length = self.gen_length or task.gen_length
        lengths = {"gen_length": length, "block_length": fitting_block(length, self.block_length)}
        stop_ids = self.engine.tokenizer.stop_ids
        threshold = self.threshold if self.unmask is None else None
        return decode(**lengths, threshold=threshold, unmask=self.unmask, stop_ids=stop_ids)

    def request(self, task: Task, example: Example, method: Method) -> tuple[Request, bool]:
        """Returns the request, and whether the middle was dropped.

        A baseline's prompt is all question and tokenised as one text, the method's in three parts.
        """
        tokenizer, max_length = self.engine.tokenizer, self.max_length
        cuts = cache_method(method).uses_chunks
        shape: dict[str, Any] = {"chat": self.chat and task.chat, "response": example.response}
        positions = self.engine.model.config.max_sequence_length
        room = positions - (self.gen_length or task.gen_length)
        if example.ids is not None:
            prefix, context, query = example.ids
            if cuts:
                return Request(context, query, prefix, seed=self.seed), False
            # The same tokens as the method gets; the chat template is among them.
            ids = prefix + context + query
            kept = truncate_middle(ids, max_length or room)
            return Request([], kept, [], seed=self.seed), len(kept) < len(ids)
        if cuts:
            return split_request(tokenizer, example.prompt, **shape)._replace(seed=self.seed), False
        template, _ = dense_prompt(tokenizer, "", 2, **shape)
        text, length = "".join(example.prompt), max_length or room - len(template)
        ids, truncated = dense_prompt(tokenizer, text, length, **shape)
        return Request([], ids, [], seed=self.seed), truncated

    def for_task(self, task: Task, method: Method) -> Engine:
        """Returns the engine that answers a task's examples."""
        return dataclasses.replace(self.engine, method=method, decoding=self.decoding(task))

    def check(self, task: Task, example: Example, method: Method) -> None:
        """Raises what an answer would raise, of too little memory above all; computes nothing."""
        self.for_task(task, method).check([self.request(task, example, method)[0]])

    def settings(self, folder: Path) -> dict[str, Any]:
        """Returns what a record depends on beside its example and method.

        folder: of the converted checkpoint.
        """
        engine = self.engine
        own = {name: x for name, x in vars(self).items() if name not in ("engine", "unmask")}
        return {
            **own,
            **({} if self.unmask is None else {"unmask": str(self.unmask)}),
            "implementation": engine.implementation,
            "chunking": dataclasses.asdict(engine.chunking),
            "selection": engine.selection.to_flat(),
            "checkpoint": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
            "dtype": str(engine.model.dtype),
            **({} if engine.model.mesh is None else {"mesh": dict(engine.model.mesh.shape)}),
        }

    def __call__(self, task: Task, example: Example, method: Method) -> list[dict[str, Any]]:
        """Returns the example's record, in a list of one.

        Its seconds are by phase. "host" is all that is in no phase, such as tokenizing, and "total"
        is all but compiling, from the text to the response's text.
        """
        timer = Timer()
        with timer.phase("total"):
            request, truncated = self.request(task, example, method)
            (answered,) = answer(self.for_task(task, method), [request], together=False)
            response = self.engine.tokenizer.decode(answered["tokens"])
        phases, total = answered["seconds"], timer.seconds["total"]
        host = total - phases.pop("total")
        record = {
            "score": task.metric(response, example),
            "response": response,
            "answers": example.answers,
            "evaluations": answered["evaluations"],
            "rows": answered["rows"],
            "seconds": {**phases, "host": round(host, 6), "total": round(total, 6)},
            "compile_seconds": round(timer.seconds["compile"], 6),
            "chunks": answered["chunks"],
            "prompt_tokens": sum(map(len, (request.prefix, request.context, request.question))),
            "truncated": truncated,
            "details": example.details,
            "digest": example.digest(),
        }
        return [record]


def missing_work(
    arms: Mapping[str, Ask], tasks: Sequence[Task], records: Records
) -> Iterator[Work]:
    """Makes work of the examples that have no record. arms: by the method's name in records.

    An example goes to all methods before the next, so that a run that is cut short compares them on
    the same examples. Raises RecordError for an example that has changed.
    """
    for task in tasks:
        for example in task.examples:
            for name, ask in arms.items():
                key = Key(task.benchmark, task.name, name, example.id)
                if records.get(key, example.digest()) is None:
                    yield Work(task.name, [key], partial(ask, task, example))


def summarise(
    tasks: Iterable[Task], methods: Iterable[str], records: Records
) -> list[dict[str, Any]]:
    """Returns a row for each task and method, LongBench-E's also by length; scores in percent."""
    rows = []
    for task in tasks:
        for method in methods:
            keys = (Key(task.benchmark, task.name, method, e.id) for e in task.examples)
            parts = {task.name: [records.done[key] for key in keys]}
            if task.benchmark == "longbench" and task.name.endswith("_e"):
                for name, low, high in _LENGTHS:
                    parts[f"{task.name}, {name}"] = [
                        record
                        for record in parts[task.name]
                        if low <= record["details"]["length"] < high
                    ]
            rows += [_row(task, method, *part) for part in parts.items() if part[1]]
    return rows


def _row(task: Task, method: str, name: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = [record["score"] for record in records]
    # Scores that are 0 or 1 are a proportion.
    mean = wilson(round(sum(scores)), len(scores)) if task.binary else bootstrap(np.mean, scores)
    score, *ends = (100 * value for value in mean)
    return {
        "benchmark": task.benchmark,
        "task": name,
        "method": method,
        "examples": len(records),
        "score": score,
        "interval": ends,
        "interval_kind": "Wilson" if task.binary else "bootstrap",
        "truncated": sum(record["truncated"] for record in records),
        "evaluations": float(np.mean([record["evaluations"] for record in records])),
        "rows": float(np.mean([record.get("rows", 0) for record in records])),
        "seconds_median": float(np.median([record["seconds"]["total"] for record in records])),
        "seconds_in_all": sum(record["seconds"]["total"] for record in records),
    }


def scores_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    return table(
        [*_COLUMNS], [[form.format_map(row) for form in _COLUMNS.values()] for row in rows]
    )
