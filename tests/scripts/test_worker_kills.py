"""kill -9 of a worker of a mesh: the others end, nothing half-written loads, a restart goes on.

Two processes share a mesh of four devices (gloo). Process 0 is the coordinator.
"""

from __future__ import annotations

import functools
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
from tests.support.fault_workers import Death
from tests.support.workers import PROCESSES

# Seconds after a worker's death, on a machine that is busy with all of these processes.
BOUND = 5 * fault_workers.HEARTBEAT
NOBODY = Death()


def start(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


class Hosts:
    """Two processes of one mesh."""

    def __init__(self, folder, out, snapshot=None, death=NOBODY):
        out.mkdir()
        self.out, self.victim = out, death.victim
        with socket.socket() as free:
            free.bind(("localhost", 0))
            common = free.getsockname()[1], folder, out, snapshot, death
        self.processes = [start(fault_workers.host, rank, *common) for rank in range(2)]

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
    return {"tokens": finish(model, fault_workers.prefilled(model))[0].tokens}


def check_restarted(hosts: Hosts, want: dict) -> None:
    assert hosts.join(240) == [0, 0]
    assert hosts.outcomes() == [want, want]


def test_killed_while_prefilling(folder, tmp_path):
    Hosts(folder, tmp_path / "out", death=Death(1, "prefill", 1)).check_dead()


@pytest.mark.slow
def test_restarted_after_a_kill_while_prefilling(folder, want, tmp_path):
    deaths = [Death(victim, "prefill", 3) for victim in range(2)]
    dying = [Hosts(folder, tmp_path / str(death.victim), death=death) for death in deaths]
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
    write = functools.partial(start, fault_workers.writer, folder)
    writers = {point: write(tmp_path / point, point) for point in points}
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
    rewritten = write(half, "")
    assert refused.join(240) == [0, 0]
    for outcome in refused.outcomes():
        assert "not a directory" in outcome["refused"]
    rewritten.join(240)
    assert rewritten.exitcode == 0
    deaths = Death(0, "decode", 6), Death(1, "decode", 6), Death(1, "load", 3)
    dying = [Hosts(folder, tmp_path / f"{d.phase}-{d.victim}", half, d) for d in deaths]
    for hosts in dying:
        hosts.check_dead()
    check_restarted(Hosts(folder, tmp_path / "restarted", half), want)
