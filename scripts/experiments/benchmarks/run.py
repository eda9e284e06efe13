"""Asks a model every example of a benchmark by every method, and summarises the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.answering import Prompt, answer
from experiments.benchmarks.example import Example, Task
from experiments.records import Key, Records
from experiments.runner import Work
from experiments.statistics import mean, wilson
from pallas_kernels import Implementation
from pdllm_jax import ChunkConfig, DecodeConfig, MaskPredictor, SelectionConfig, Tokenizer
from pdllm_jax.evaluation.prompts import dense_prompt, fitting_block, split_request, truncate_middle
from pdllm_jax.method.cache_methods import Method


@dataclasses.dataclass(frozen=True)
class Asker:
    """A model with the settings that all examples share.

    max_length: tokens of a baseline's prompt, without chat template and response; None: what the
      model's max_sequence_length leaves beside these two.
    block_length: of a response, at most; the largest divisor of its length is taken.
    gen_length: response tokens, instead of the benchmark's.
    """

    model: MaskPredictor
    tokenizer: Tokenizer
    chunking: ChunkConfig
    selection: SelectionConfig
    threshold: float | None = 0.9
    block_length: int = 32
    gen_length: int | None = None
    max_length: int | None = None
    chat: bool = True
    seed: int = 0
    implementation: Implementation | None = None

    def decoding(self, task: Task) -> DecodeConfig:
        """Returns greedy decoding that ends with the block in which the text ends."""
        length = self.gen_length or task.gen_length
        return DecodeConfig(
            gen_length=length,
            block_length=fitting_block(length, self.block_length),
            threshold=self.threshold,
            stop_ids=self.tokenizer.stop_ids,
        )

    def prompt(self, task: Task, example: Example, method: Method) -> tuple[Prompt, bool]:
        """Returns ids of prefix, context and query, and whether the middle was dropped.

        A baseline's prompt is all query and tokenised as one text, the method's in three parts.
        """
        shape: dict[str, Any] = {"chat": self.chat and task.chat, "response": example.response}
        room = self.model.config.max_sequence_length - (self.gen_length or task.gen_length)
        if example.ids is not None:
            if method == "prefilling":
                return example.ids, False
            # The same tokens as the method gets; the chat template is among them.
            ids = [token for part in example.ids for token in part]
            kept = truncate_middle(ids, self.max_length or room)
            return ([], [], kept), len(kept) < len(ids)
        assert example.prompt is not None
        if method == "prefilling":
            request = split_request(self.tokenizer, example.prompt, **shape)
            return (request.prefix, request.context, request.question), False
        template, _ = dense_prompt(self.tokenizer, "", 2, **shape)
        ids, truncated = dense_prompt(
            self.tokenizer,
            "".join(example.prompt),
            self.max_length or room - len(template),
            **shape,
        )
        return ([], [], ids), truncated

    def __call__(self, task: Task, example: Example, method: Method) -> list[dict[str, Any]]:
        """Returns the example's record, in a list of one."""
        prompt, truncated = self.prompt(task, example, method)
        (answered,) = answer(
            self.model, [prompt], method=method, chunking=self.chunking, selection=self.selection,
            decoding=self.decoding(task), bos_id=self.tokenizer.bos_id, seeds=[self.seed],
            implementation=self.implementation, together=False,
        )  # fmt: skip
        response = self.tokenizer.decode(answered["tokens"])
        record = {
            "score": task.metric(response, example),
            "response": response,
            "answers": example.answers,
            **{name: answered[name] for name in ("evaluations", "seconds", "chunks")},
            "prompt_tokens": sum(map(len, prompt)),
            "truncated": truncated,
            "details": example.details,
            "digest": example.digest(),
        }
        return [record]


def missing_work(
    ask: Asker, tasks: Sequence[Task], methods: Sequence[Method], records: Records
) -> Iterator[Work]:
    """Makes work of the examples that have no record.

    An example goes to all methods before the next, so that a run that is cut short compares them on
    the same examples. Raises RecordError for an example that has changed.
    """
    for task in tasks:
        for example in task.examples:
            for method in methods:
                key = Key(task.benchmark, task.name, method, example.id)
                if records.get(key, example.digest()) is None:
                    yield Work(task.name, [key], partial(ask, task, example, method))


def summarise(
    tasks: Iterable[Task], methods: Sequence[Method], records: Records
) -> list[dict[str, Any]]:
    """Returns a row for each task and method, LongBench-E's also by length; scores in percent."""
    rows = []
    for task in tasks:
        for method in methods:
            keys = (Key(task.benchmark, task.name, method, e.id) for e in task.examples)
            answered = [records.done[key] for key in keys]
            if answered:
                rows.append(_row(task, method, answered))
            if task.benchmark == "longbench" and task.name.endswith("_e"):
                rows += [_row(task, method, part, name) for name, part in _by_length(answered)]
    return rows


def _row(
    task: Task, method: str, records: Sequence[dict[str, Any]], part: str | None = None
) -> dict[str, Any]:
    scores = [record["score"] for record in records]
    # Scores that are 0 or 1 are a proportion.
    interval = wilson(round(sum(scores)), len(scores)) if task.binary else mean(scores)
    return {
        "benchmark": task.benchmark,
        "task": task.name if part is None else f"{task.name}, {part}",
        "method": method,
        "examples": len(records),
        "score": 100 * interval.value,
        "interval": [100 * interval.low, 100 * interval.high],
        "interval_kind": "Wilson" if task.binary else "bootstrap",
        "truncated": sum(record["truncated"] for record in records),
        "evaluations": float(np.mean([record["evaluations"] for record in records])),
        "seconds_median": float(np.median([record["seconds"]["total"] for record in records])),
    }


def _by_length(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Splits records by LongBench-E's three lengths, in words; empty parts are left out."""
    bounds = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, float("inf")))
    parts = [
        (name, [r for r in records if low <= (r["details"].get("length") or 0) < high])
        for name, low, high in bounds
    ]
    return [(name, part) for name, part in parts if part]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| benchmark | task | method | examples | score | 95% interval | truncated | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['benchmark']} | {row['task']} | {row['method']} | {row['examples']} | "
            f"{row['score']:.2f} | [{low:.2f}, {high:.2f}] | {row['truncated']} | "
            f"{row['seconds_median']:.2f} |"
        )
    return "\n".join(lines)
