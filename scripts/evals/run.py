"""Asking a model every example by every method, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ablation.statistics import mean, wilson
from tqdm import tqdm

from evals.example import Example, Task
from evals.records import Key, Records
from pallas_kernels import Implementation
from pdllm_jax import ChunkConfig, DecodeConfig, MaskPredictor, SelectionConfig, Tokenizer
from pdllm_jax.deprecated import generate_ids
from pdllm_jax.evaluation.prompts import dense_prompt, fitting_block, split_request, truncate_middle
from pdllm_jax.method.cache_methods import Method
from pdllm_jax.method.chunking import TokenIds

METHODS: tuple[Method, ...] = ("plain", "prefix-cache", "dual-cache", "prefilling")


@dataclasses.dataclass(frozen=True)
class Asker:
    """A model with everything that is the same for all examples.

    max_length: tokens of a prompt that a baseline gets, chat template and response apart; None:
      what the model's max_sequence_length leaves beside these two.
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

    def decode(self, task: Task) -> DecodeConfig:
        """Greedy; a response ends with the block in which its text does."""
        length = self.gen_length or task.gen_length
        return DecodeConfig(
            gen_length=length,
            block_length=fitting_block(length, self.block_length),
            threshold=self.threshold,
            stop_ids=self.tokenizer.stop_ids,
        )

    def prompt(
        self, task: Task, example: Example, method: Method
    ) -> tuple[tuple[TokenIds, TokenIds, TokenIds], bool]:
        """Ids of prefix, context and query, and whether a middle was dropped.

        A baseline's prompt is all query. It is tokenised whole, the method's in its three parts.
        """
        chat = self.chat and task.chat
        if method == "prefilling":
            if example.ids is not None:
                return example.ids, False
            assert example.prompt is not None
            request = split_request(
                self.tokenizer, example.prompt, chat=chat, response=example.response
            )
            return (request.prefix, request.context, request.question), False
        room = self.model.config.max_sequence_length - (self.gen_length or task.gen_length)
        if example.ids is not None:
            # Token by token what the method gets, and the template is among them.
            ids = [*example.ids[0], *example.ids[1], *example.ids[2]]
            kept = truncate_middle(ids, self.max_length or room)
            return ([], [], kept), len(kept) < len(ids)
        assert example.prompt is not None
        template, _ = dense_prompt(self.tokenizer, "", 2, chat=chat, response=example.response)
        ids, truncated = dense_prompt(
            self.tokenizer,
            "".join(example.prompt),
            self.max_length or room - len(template),
            chat=chat,
            response=example.response,
        )
        return ([], [], ids), truncated

    def __call__(self, task: Task, example: Example, method: Method) -> dict[str, Any]:
        """The example's record."""
        prompt, truncated = self.prompt(task, example, method)
        result = generate_ids(
            self.model, *prompt,
            method=method, chunking=self.chunking, selection=self.selection,
            decode=self.decode(task), bos_id=self.tokenizer.bos_id, seed=self.seed,
            implementation=self.implementation,
        )  # fmt: skip
        prediction = self.tokenizer.decode(result.tokens)
        return {
            "score": task.metric(prediction, example),
            "prediction": prediction,
            "answers": example.answers,
            "prompt_tokens": sum(len(part) for part in prompt),
            "truncated": truncated,
            "evaluations": result.evaluations,
            "chunks": None if result.selection is None else result.selection["chunks"],
            "seconds": round(result.timings["total"] - result.timings["compile"], 4),
            "details": example.details,
            "digest": example.digest(),
        }


def run(
    ask: Asker, tasks: Sequence[Task], methods: Sequence[Method], records: Records, *, show: bool
) -> None:
    """Asks whatever has no record yet. show: a progress bar on stderr.

    Every example goes to all methods before the next, so that a run that is cut short compares
    them on the same examples.
    """
    total = sum(len(task.examples) for task in tasks) * len(methods)
    with tqdm(total=total, disable=not show) as bar:
        for task in tasks:
            bar.set_description(f"{task.benchmark} {task.name}")
            for example in task.examples:
                for method in methods:
                    key = Key(task.benchmark, task.name, method, example.id)
                    if records.get(key, example.digest()) is None:
                        records.add(key, ask(task, example, method))
                    bar.update()


def summarise(
    tasks: Iterable[Task], methods: Sequence[Method], records: Records
) -> list[dict[str, Any]]:
    """A row for each task and method, LongBench-E's also by length; scores are percentages."""
    rows = []
    for task in tasks:
        for method in methods:
            found = [
                records.done[Key(task.benchmark, task.name, method, example.id)]
                for example in task.examples
            ]
            if found:
                rows.append(_row(task, method, found))
            if task.benchmark == "longbench" and task.name.endswith("_e"):
                rows += [_row(task, method, part, name) for name, part in _by_length(found)]
    return rows


def _row(
    task: Task, method: str, found: Sequence[dict[str, Any]], part: str | None = None
) -> dict[str, Any]:
    scores = [record["score"] for record in found]
    # Scores that are 0 or 1 are a proportion.
    interval = wilson(round(sum(scores)), len(scores)) if task.binary else mean(scores)
    return {
        "benchmark": task.benchmark,
        "task": task.name if part is None else f"{task.name}, {part}",
        "method": method,
        "examples": len(found),
        "score": 100 * interval.value,
        "interval": [100 * interval.low, 100 * interval.high],
        "interval_kind": "Wilson" if task.binary else "bootstrap",
        "truncated": sum(record["truncated"] for record in found),
        "evaluations": float(np.mean([record["evaluations"] for record in found])),
        "seconds_median": float(np.median([record["seconds"] for record in found])),
    }


def _by_length(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """LongBench-E's three lengths, in words."""
    bounds = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, float("inf")))
    parts = [
        (name, [r for r in found if low <= (r["details"].get("length") or 0) < high])
        for name, low, high in bounds
    ]
    return [(name, part) for name, part in parts if part]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
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
