"""Processes of one mesh of which one is killed. Importing begins nothing in JAX."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax

from pdllm_jax import (
    DecodeConfig,
    SelectionConfig,
    SnapshotError,
    load_model,
    load_request,
    make_mesh,
    save_request,
)
from pdllm_jax.deprecated import finish, prefill_request
from pdllm_jax.network import sharding as sharded
from pdllm_jax.storage import snapshot_arrays
from pdllm_jax.storage.fingerprint import model_identity
from tests.support.mesh_workers import CHUNKS, DECODE, DOCUMENT, PREFIX, QUERY, SELECT, join, setup
from tests.support.workers import owner, strike

HEARTBEAT = 6  # seconds without a sign of life after which a process counts as dead


def prefilled(model: Any) -> Any:
    selecting = SelectionConfig(**SELECT, scorer="query", encoding="independent")
    return prefill_request(
        model, PREFIX, DOCUMENT, QUERY,
        chunking=CHUNKS, selection=selecting, decode=DecodeConfig(**DECODE), seed=3,
    )  # fmt: skip


def host(
    rank: int,
    port: int,
    folder: Path,
    out: Path,
    snapshot: Path | None,
    dies: str,
    at: int,
    timeouts: dict[str, int],
) -> None:
    """One of two processes with two devices each, which answer together; leaves what came out.

    The heads lie on both, so that neither gets through a layer without the other.

    snapshot: to go on from, instead of a prefill of its own.
    dies: phase in which this process kills itself ("" for none): at the at-th attention that runs
      inside a compiled program ("prefill", "decode"), or the at-th array read ("load").
    timeouts: of `jax.distributed.initialize`.
    """
    join(rank, port, **timeouts)
    phase, runs, real = "", itertools.count(1), sharded.local

    def ran() -> None:
        if phase == dies and next(runs) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def local(mesh: Any, f: Any, inputs: Any, outputs: Any) -> Any:
        def noticed(*arguments: Any) -> Any:
            jax.debug.callback(ran, partitioned=True)
            return f(*arguments)

        return real(mesh, noticed, inputs, outputs)

    sharded.local = local  # in every process: they run the same programs
    model = load_model(folder, mesh=make_mesh(1, 4))
    try:
        if snapshot is None:
            phase = "prefill"
            begun = jax.block_until_ready(prefilled(model))
        else:
            if dies == "load":
                strike(snapshot_arrays, "verify", at)
            begun = load_request(snapshot, model)
        phase = "decode"
        (result,) = finish(model, begun)
        left: dict[str, Any] = {"tokens": result.tokens}
    except SnapshotError as error:
        left = {"refused": str(error)}
    (out / f"{rank}.json").write_text(json.dumps(left))
    # As a program's end does it: the coordinator stays until the other has ended as well.
    jax.distributed.shutdown()


def writer(folder: Path, snapshot: Path, point: str) -> None:
    """Prefills on a mesh of four devices in one process, and writes; killed at `point`, if any."""
    setup()
    snapshot_arrays.SMALL_ARRAY_BYTES = snapshot_arrays.SMALL_CHUNK_BYTES = 1  # as if large
    model = load_model(folder, mesh=make_mesh(2, 2))
    begun, identity = prefilled(model), model_identity(model)
    if point:
        strike(*owner(point))
    save_request(snapshot, identity, begun, chunking=CHUNKS)
