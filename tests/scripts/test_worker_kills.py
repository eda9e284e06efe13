"""kill -9 of a worker of a mesh: the others end, nothing half-written loads, a restart goes on.

Two processes share a mesh of four devices (gloo). Process 0 is the coordinator.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest

from pdllm_jax import SnapshotError, load_model, load_request
from pdllm_jax.deprecated import finish
from pdllm_jax.storage.fingerprint import model_identity
from tests.storage.test_checkpoint import DIVISIBLE, make
from tests.support import fault_workers
from tests.support.workers import PROCESSES

# Seconds after a worker's death, on a machine that is busy with all of these processes.
BOUND = 5 * fault_workers.HEARTBEAT


class Hosts:
    """Two processes of one mesh; the process `victim`, if not -1, kills itself in phase `dies`."""

    def __init__(self, folder, out, snapshot=None, *, victim=-1, dies="", at=0):
        out.mkdir()
        self.out, self.victim = out, victim
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        timeouts = {} if victim < 0 else {"heartbeat_timeout_seconds": fault_workers.HEARTBEAT}
        self.processes = []
        for rank in range(2):
            how = (dies, at) if rank == victim else ("", 0)
            process = PROCESSES.Process(
                target=fault_workers.host, args=(rank, port, folder, out, snapshot, *how, timeouts)
            )
            process.start()
            self.processes.append(process)

    def join(self, timeout: float) -> list[int | None]:
        """Returns the exit statuses; AssertionError if a process does not end."""
        ends = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, ends - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"hangs: {codes}"
        return codes

    def outcomes(self) -> list[dict]:
        """Returns what the processes wrote."""
        return [json.loads(path.read_text()) for path in sorted(self.out.iterdir())]

    def check_dead(self) -> None:
        """One process was killed; the other ended with an error soon, without an answer."""
        self.processes[self.victim].join(240)
        codes = self.join(BOUND)
        assert codes[self.victim] == -signal.SIGKILL, codes
        assert codes[1 - self.victim] != 0, codes
        for outcome in self.outcomes():
            assert "tokens" not in outcome
            assert "Gloo" in outcome["refused"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"), **DIVISIBLE)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def want(model):
    """The answer of one device."""
    (result,) = finish(model, fault_workers.prefilled(model))
    return {"tokens": result.tokens}


def write(folder: Path, snapshot: Path, point: str = ""):
    process = PROCESSES.Process(target=fault_workers.writer, args=(folder, snapshot, point))
    process.start()
    return process


def check_restarted(hosts: Hosts, want: dict) -> None:
    assert hosts.join(240) == [0, 0]
    assert hosts.outcomes() == [want, want]


def test_killed_while_prefilling(folder, tmp_path):
    Hosts(folder, tmp_path / "out", victim=1, dies="prefill", at=1).check_dead()


@pytest.mark.slow
def test_restarted_after_a_kill_while_prefilling(folder, want, tmp_path):
    dying = [
        Hosts(folder, tmp_path / str(victim), victim=victim, dies="prefill", at=3)
        for victim in range(2)
    ]
    for hosts in dying:
        hosts.check_dead()
    check_restarted(Hosts(folder, tmp_path / "restarted"), want)


@pytest.mark.slow
def test_killed_while_writing_decoding_and_reading(folder, model, want, tmp_path):
    # Among the arrays, with everything but the manifest, with everything but the name.
    points = (
        "pdllm_jax.storage.manifest._record#3",
        "pdllm_jax.storage.snapshot.write_manifest",
        "os.rename#2",
    )
    writers = {point: write(folder, tmp_path / point, point) for point in points}
    identity = model_identity(model)
    for point, process in writers.items():
        process.join(240)
        assert process.exitcode == -signal.SIGKILL, point
        partial = tmp_path / f".{point}.partial"
        assert partial.is_dir()
        with pytest.raises(SnapshotError):
            load_request(tmp_path / point, identity)
        if not (partial / "manifest.json").exists():
            with pytest.raises(SnapshotError):
                load_request(partial, identity)
    half = tmp_path / points[0]
    refused = Hosts(folder, tmp_path / "half", half)
    rewritten = write(folder, half)
    assert refused.join(240) == [0, 0]
    for outcome in refused.outcomes():
        assert "not a directory" in outcome["refused"]
    rewritten.join(240)
    assert rewritten.exitcode == 0
    dying = [
        Hosts(folder, tmp_path / f"{dies}-{victim}", half, victim=victim, dies=dies, at=at)
        for victim, dies, at in ((0, "decode", 6), (1, "decode", 6), (1, "load", 3))
    ]
    for hosts in dying:
        hosts.check_dead()
    check_restarted(Hosts(folder, tmp_path / "restarted", half), want)
