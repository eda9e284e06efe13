"""Batches made ahead of time in other processes, so that the accelerator never waits."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from small_model.corpus import load
from small_model.masking import Batch, training_batch
from small_model.sequences import SequenceMaker
from small_model.tasks import Encoder


class Source(NamedTuple):
    """What a batch is made of; step i of seed s is the same batch on any number of workers."""

    corpora: str
    tokenizer: str  # path of tokenizer.json
    length: int
    batch_size: int
    rows: int
    seed: int


def maker_of(source: Source) -> SequenceMaker:
    """The sequence maker of a source, its texts read."""
    encode = Encoder(Tokenizer.from_file(source.tokenizer))
    return SequenceMaker(load(Path(source.corpora), held_out=False), encode, source.length)


def _work(source: Source, first: int, stride: int, out: multiprocessing.Queue, stop) -> None:
    maker = maker_of(source)
    step = first
    while not stop.is_set():
        seed = (source.seed, source.length, step)
        batch = training_batch(maker, source.batch_size, source.rows, seed)
        while not stop.is_set():
            try:
                out.put(tuple(batch), timeout=1)
                break
            except queue.Full:
                pass
        step += stride
    out.cancel_join_thread()


class Feed:
    """Iterates over the batches of a source from `first_step` on; `close` ends its workers."""

    def __init__(self, source: Source, first_step: int, workers: int):
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._queues = [context.Queue(maxsize=6) for _ in range(workers)]
        self._workers = [
            context.Process(
                target=_work,
                args=(source, first_step + index, workers, out, self._stop),
                daemon=True,
            )
            for index, out in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for out, worker in zip(self._queues, self._workers, strict=True):
                while True:
                    try:
                        yield Batch(*out.get(timeout=30))
                        break
                    except queue.Empty:
                        if not worker.is_alive():
                            raise RuntimeError("a data worker ended early") from None

    def close(self) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.terminate()
