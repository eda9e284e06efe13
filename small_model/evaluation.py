"""Measures during training: answers of the library's own engine to held-out examples."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from pdllm_jax import ChunkConfig, DecodeConfig, Engine, MaskPredictor, Request, SelectionConfig
from small_model import tasks
from small_model.corpus import load

_TOKENS_AT_ONCE = 131_072
_CHUNKING, _SELECTION = ChunkConfig(512), SelectionConfig(top_k=4)
_DECODE = DecodeConfig(
    gen_length=tasks.RESPONSE_LENGTH, block_length=tasks.RESPONSE_LENGTH, threshold=0.9
)


class Evaluator:
    """Answers held-out examples of every task. corpora: folder of corpus.py."""

    def __init__(self, corpora: str):
        self.corpora = load(corpora, held_out=True)
        self.encode = tasks.Encoder.load(corpora)

    def __call__(self, model: MaskPredictor, length: int, count: int) -> dict[str, dict]:
        """Returns shares of `count` examples for each task.

        "exact": right answers with the full document; "prefilling": from four chunks of 512 tokens;
        "fit": examples whose needle is in one of these chunks; "fit_first": in the likeliest chunk.
        """
        engines = {
            "exact": Engine(model, method="plain", decoding=_DECODE),
            "prefilling": Engine(model, chunking=_CHUNKING, selection=_SELECTION, decoding=_DECODE),
        }
        hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        settings, size = {"corpora": self.corpora, "encode": self.encode}, _TOKENS_AT_ONCE // length
        for task in tasks.TASKS:
            examples = [tasks.make_example(task, length, seed, **settings) for seed in range(count)]
            for start in range(0, count, size):
                part = examples[start : start + size]
                requests = [Request(e["context"], e["query"], prefix=e["prefix"]) for e in part]
                for name, engine in engines.items():
                    for example, answer in zip(part, engine.answer_batch(requests), strict=True):
                        right = tasks.score(self.encode, example["answer"], answer.tokens)
                        hits[name][task].append(right)
                        if answer.selection is not None:
                            first, last = example["needle_span"][0], example["needle_span"][1] - 1
                            chunk = first // _CHUNKING.stride
                            complete = chunk == last // _CHUNKING.stride
                            chosen, scores = answer.selection["chunks"], answer.selection["scores"]
                            hits["fit"][task].append(complete and chunk in chosen)
                            hits["fit_first"][task].append(complete and chunk == np.argmax(scores))
        return {
            name: {task: round(float(np.mean(row)), 3) for task, row in by_task.items()}
            for name, by_task in hits.items()
        }
