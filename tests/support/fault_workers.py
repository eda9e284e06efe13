"""Processes of one mesh, one of which is killed. Importing this module starts nothing in JAX."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

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
from pdllm_jax.storage import arrays as arrays_module
from pdllm_jax.storage.fingerprint import model_identity
from tests.support.mesh_workers import CHUNKS, DECODE, DOCUMENT, PREFIX, QUERY, SELECT, join, setup
from tests.support.workers import strike

HEARTBEAT = 6  # seconds without a sign of life after which a process counts as dead


class Death(NamedTuple):
    """Where the process `victim` (-1: none) kills itself.

    phase: at the at-th attention that runs inside a compiled program ("prefill", "decode"), or at
    the checksum of the at-th file ("load").
    """

    victim: int = -1
    phase: str = ""
    at: int = 0


def prefilled(model: Any) -> Any:
    settings: Any = {"chunking": CHUNKS, "decode": DecodeConfig(**DECODE), "seed": 3}
    settings["selection"] = SelectionConfig(**SELECT, scorer="query", encoding="independent")
    return prefill_request(model, PREFIX, DOCUMENT, QUERY, **settings)


def host(
    rank: int, port: int, folder: Path, out: Path, snapshot: Path | None, death: Death
) -> None:
    """Answers together with another process, with two devices each; writes the result to `out`.

    Both have some of the heads, so that neither can finish a layer without the other. snapshot:
    request to decode; None prefills one.
    """
    join(rank, port, **({} if death.victim < 0 else {"heartbeat_timeout_seconds": HEARTBEAT}))
    dies = death.phase if death.victim == rank else ""
    phase, runs, real = "", itertools.count(1), sharded.local

    def ran() -> None:
        if phase == dies and next(runs) == death.at:
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
                strike(f"pdllm_jax.storage.manifest._record#{death.at}")
            begun = load_request(snapshot, model)
        phase = "decode"
        (result,) = finish(model, begun)
        outcome: dict[str, Any] = {"tokens": result.tokens}
    except SnapshotError as error:
        outcome = {"refused": str(error)}
    (out / f"{rank}.json").write_text(json.dumps(outcome))
    # The coordinator stays until the other process has ended as well.
    jax.distributed.shutdown()


def writer(folder: Path, snapshot: Path, point: str) -> None:
    """Prefills on a mesh of four devices in one process and writes; `point` is as in `strike`."""
    setup()
    arrays_module.HEAD_BYTES = 1  # as if the arrays were large
    model = load_model(folder, mesh=make_mesh(2, 2))
    begun, identity = prefilled(model), model_identity(model)
    if point:
        strike(point)
    save_request(snapshot, identity, begun, chunking=CHUNKS)
