"""Makes training batches ahead of time in other processes."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from small_model.corpus import load
from small_model.masking import Batch, training_batch
from small_model.sequences import SequenceMaker
from small_model.tasks import Encoder

_AHEAD = 6  # batches made ahead for each worker


class Source(NamedTuple):
    """Settings of the batches. Step i of seed s is the same batch for any number of workers."""

    corpora: str
    length: int
    batch_size: int
    rows: int
    seed: int


@lru_cache(maxsize=1)
def make_maker(source: Source) -> SequenceMaker:
    """Reads the texts of a source and returns its sequence maker."""
    folder = Path(source.corpora)
    encode = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return SequenceMaker(load(folder, held_out=False), encode, source.length)


def _make_batch(source: Source, step: int) -> Batch:
    seed = (source.seed, source.length, step)
    return training_batch(make_maker(source), source.batch_size, source.rows, seed)


def make_batches(source: Source, first_step: int, workers: int) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, without end; closing the generator ends the workers.

    Raises concurrent.futures.process.BrokenProcessPool if a worker ends early.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    pending: deque[Future[Batch]] = deque()
    try:
        for step in itertools.count(first_step):
            pending.append(pool.submit(_make_batch, source, step))
            if len(pending) >= _AHEAD * workers:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
