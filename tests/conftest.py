"""Settings and fixtures for all tests.

JAX runs on the CPU unless JAX_PLATFORMS says otherwise, and keeps what it compiled in .cache/jax,
so that a second run is quicker. PyTorch is imported by fixtures alone: where it is missing, the
tests that compare with it are skipped and all others run.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In the environment rather than in jax.config, so that the command lines under test see it too.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "OMP_NUM_THREADS": "1",  # the oracles' products are tiny: threads would wait for each other
    # The Pallas interpreter runs a GPU kernel's barriers as callbacks that block, in a pool of as
    # many threads as there are processors: with few of them, all wait for each other. Our kernels
    # block six at most (two warpgroups, the converter, the copying warp, and the callbacks that
    # wait for the warps and for the CTA).
    "PJRT_NPROC": str(max(16, os.cpu_count() or 1)),
    "HF_HUB_OFFLINE": "1",  # nothing in a test may reach a model hub
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)
# Most of the tests' time is XLA's, compiling for the CPU, quickest in one piece. On some processors
# XLA hands products to YNNPACK, whose order of additions depends on the shape: a row's last bits
# would depend on its padding. XLA's older emitters take a third of the time of the newer ones; XLA
# of jax 0.11 no longer has them, and ends the process at a flag it lacks.
flags = ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_experimental_ynn_fusion_type="]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")
    # Tests compile much and run little. Command lines under test keep the optimizations.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_include_full_tracebacks_in_locations", False)  # a tenth of tracing

hypothesis.settings.register_profile("fuzz", max_examples=1000)  # make fuzz


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with a reason, tests marked gpu that were asked for where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        reason = "no GPU (JAX_PLATFORMS=cuda,cpu makes JAX use it)"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Takes what was imported out of Python's garbage collection, which tracing sets off often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


_programs = 0  # compiled since memory mappings were last counted


def _count_program(event: str, duration: float, **_: object) -> None:
    global _programs
    _programs += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_program)


@pytest.fixture(autouse=True)
def _few_memory_mappings() -> Iterator[None]:
    """Frees compiled programs before they hold too many memory mappings.

    Each holds some hundred of the 65,530 that Linux gives a process. Without a free one the
    compiler ends in a segmentation fault.
    """
    yield
    global _programs
    maps = Path("/proc/self/maps")
    if _programs >= 50 and maps.exists():
        _programs = 0
        if maps.read_bytes().count(b"\n") > 40_000:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def call_main(capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls main(arguments) of a command line: exit status, stdout, stderr."""

    def call(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        try:
            status = main([str(x) for x in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


class TinyCheckpoint(NamedTuple):
    """A random LLaDA checkpoint: `folder` on disk, `config` (config.json), `tensors` (PyTorch)."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Any]

    def numpy(self) -> dict[str, np.ndarray]:
        """The tensors in float32."""
        return {name: tensor.float().numpy() for name, tensor in self.tensors.items()}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., TinyCheckpoint]:
    """Writes random checkpoints.

    Keywords of a call: seed, dtype and gain of the weights; shards, format and tokenizer of
    `write_checkpoint`; family, "llada" or "dream"; all others go to `tiny_config` or
    `tiny_dream_config`, e.g. n_kv_heads=2.
    """
    torch = pytest.importorskip("torch")
    from tests.oracles import checkpoints

    written: list[Path] = []

    def make(seed: int = 0, dtype: str = "float32", gain: float = 1.5, **changes) -> TinyCheckpoint:
        names = [name for name in ("shards", "format", "tokenizer") if name in changes]
        files = {name: changes.pop(name) for name in names}
        family = changes.pop("family", "llada")
        tiny = {"llada": checkpoints.tiny_config, "dream": checkpoints.tiny_dream_config}[family]
        config = tiny(**changes)
        tensors = checkpoints.random_tensors(config, seed, getattr(torch, dtype), gain)
        written.append(tmp_path / f"checkpoint{len(written)}")
        checkpoints.write_checkpoint(written[-1], tensors, config, **files)
        return TinyCheckpoint(written[-1], config, tensors)

    return make
