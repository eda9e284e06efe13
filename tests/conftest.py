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
from typing import TYPE_CHECKING, Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# In the environment rather than in jax.config, so that the command lines under test see it too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# The oracles' products are tiny: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The Pallas interpreter runs a GPU kernel's barriers as callbacks that block, and XLA may run these
# in a pool of as many threads as there are processors. Once all threads wait, whatever would wake
# them waits for a thread: a deadlock. Our kernels block five at most (two warpgroups, the copying
# warp, and the callbacks that wait for the warps and for the block of threads).
os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count() or 1)))
# Most of the tests' time is XLA's, compiling for the CPU, quickest in one piece. Its older emitters
# take a third of the newer ones' time; XLA of jax 0.11 no longer has them, and ends the process at
# a flag it lacks.
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
# On some processors XLA hands products to YNNPACK, which chooses a kernel, and with it the order of
# additions, by the shape of the whole: a row's last bits would depend on its padding.
flags.append("--xla_cpu_experimental_ynn_fusion_type=")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
# Nothing in a test may reach a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

if TYPE_CHECKING:
    import torch

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")
    # Tests compile much and run little. Command lines under test keep the optimizations.
    jax.config.update("jax_disable_most_optimizations", True)


hypothesis.settings.register_profile("fuzz", max_examples=1000)  # make fuzz


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with a reason, tests marked gpu that were asked for where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(
                pytest.mark.skip(reason="no GPU (JAX_PLATFORMS=cuda,cpu makes JAX use it)")
            )


def pytest_collection_finish() -> None:
    """Takes what was imported out of Python's garbage collection, which tracing sets off often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


_programs = 0  # made since memory mappings were last counted


def _count_program(event: str, duration: float, **_: object) -> None:
    global _programs
    _programs += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_program)


@pytest.fixture(autouse=True)
def _few_memory_mappings() -> Iterator[None]:
    """Lets compiled programs go before there are too many.

    Each holds some hundred memory mappings, of which Linux gives a process 65,530; what fails then
    is a segmentation fault somewhere in the compiler.
    """
    yield
    global _programs
    maps = Path("/proc/self/maps")
    if _programs < 50 or not maps.exists():
        return
    _programs = 0
    if maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class TinyCheckpoint:
    """A random LLaDA checkpoint: `folder` on disk, `config` (config.json), `tensors` (PyTorch)."""

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]):
        self.folder = folder
        self.config = config
        self.tensors = tensors

    def numpy(self) -> dict[str, np.ndarray]:
        """The tensors in float32."""
        return {name: tensor.float().numpy() for name, tensor in self.tensors.items()}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., TinyCheckpoint]:
    """Writes random checkpoints: call it with what `make` below takes.

    Further keywords go to tests.oracles.checkpoints.tiny_config, e.g. n_kv_heads=2.
    """
    torch = pytest.importorskip("torch")
    from tests.oracles import checkpoints

    made = 0

    def make(
        *,
        seed: int = 0,
        dtype: str = "float32",
        gain: float = 1.5,
        shards: int = 1,
        format: str = "safetensors",
        tokenizer: bool = False,
        **changes: Any,
    ) -> TinyCheckpoint:
        nonlocal made
        config = checkpoints.tiny_config(**changes)
        tensors = checkpoints.random_tensors(config, seed, getattr(torch, dtype), gain)
        folder = checkpoints.write_checkpoint(
            tmp_path / f"checkpoint{made}",
            tensors,
            config,
            shards=shards,
            format=format,
            tokenizer=tokenizer,
        )
        made += 1
        return TinyCheckpoint(folder, config, tensors)

    return make
