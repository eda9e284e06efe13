"""What tests do in processes of their own. Importing this begins nothing in JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pdllm_jax import MaskPredictor
from pdllm_jax.config import ChunkConfig
from pdllm_jax.engine.engine import finish
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage import store
from pdllm_jax.storage.fingerprint import ModelIdentity
from pdllm_jax.storage.snapshot import load_document, load_prefilled, save_document

# Real processes that need not import everything anew: forked from one that has.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.workers"])

CHUNKS = ChunkConfig(16)
PREFIX = [253, 1, 2]
IDENTITY = ModelIdentity(ModelConfig.tiny(), "float32", "0" * 64)


def tiny(seed: int = 0) -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(seed))


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, 70)


def document(
    config: ModelConfig = IDENTITY.config, dtype: str = "float32", chunks: int = 5
) -> ChunkCache:
    """A cache of random numbers: nothing is encoded."""
    rng = np.random.default_rng(0)

    def kv(*middle: int) -> jax.Array:
        shape = (config.n_layers, *middle, config.head_dim)
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return ChunkCache(
        pool=ChunkPool(
            kv(chunks + 1, config.n_kv_heads, 16), kv(chunks + 1, config.n_kv_heads, 16),
            jnp.asarray([16] * (chunks - 1) + [9, 0], jnp.int32),
        ),
        tokens=jnp.asarray(rng.integers(0, 250, (chunks, 16)), jnp.int32),
        lengths=jnp.asarray([16] * (chunks - 1) + [9], jnp.int32),
        prefix_ids=jnp.asarray(rng.integers(0, 250, 32), jnp.int32),
        prefix_length=jnp.asarray(3, jnp.int32),
        prefix_k=kv(32, config.n_kv_heads), prefix_v=kv(32, config.n_kv_heads),
    )  # fmt: skip


def run(worker: Any, *arguments: Any, timeout: float = 240) -> None:
    """Runs worker(*arguments) in a process of its own; AssertionError where it fails."""
    process = PROCESSES.Process(target=worker, args=arguments)
    process.start()
    process.join(timeout)
    assert process.exitcode == 0, process.exitcode


def strike(place: Any, name: str, call: int = 1) -> None:
    """The process kills itself (SIGKILL) as it begins the call-th call of place.name."""
    real, calls = getattr(place, name), 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(place, name, struck)


def encode(folder: Path, phases: Any, point: str = "", barrier: Any = None) -> None:
    """Encodes one document through a store, and says to `phases` what it is about to do."""
    _fast_compilation()
    real_encode, real_save = store.encode_document, store.save_document

    def encoding(*arguments: Any, **options: Any) -> Any:
        phases.send("encode")
        return jax.block_until_ready(real_encode(*arguments, **options))

    def saving(*arguments: Any, **options: Any) -> Any:
        phases.send("save")
        return real_save(*arguments, **options)

    store.encode_document, store.save_document = encoding, saving
    if point:
        strike(*owner(point))
    kept = store.DocumentStore(folder, tiny())
    if barrier is not None:
        barrier.wait(200)
    cache = kept.encode_ids(PREFIX, text(), chunking=CHUNKS)
    phases.send(float(np.abs(np.asarray(cache.pool.k)).sum()))


def owner(point: str) -> tuple[Any, str, int]:
    """What `strike` takes, of "module.name" or "module.name#call"."""
    module, _, name = point.rpartition(".")
    name, _, call = name.partition("#")
    return importlib.import_module(module), name, int(call or 1)


def decode(folder: Path, phases: Any) -> None:
    """Decodes from a snapshot, block by block."""
    _fast_compilation()
    model = tiny()
    phases.send("load")
    prefilled = load_prefilled(folder, model)
    phases.send("decode")
    (result,) = finish(model, prefilled, on_block=lambda *block: None)
    phases.send(result.tokens)


def on_meshes(folder: Path, out: Path) -> None:
    """Writes on two meshes, reads each on four; leaves the shapes of the shards in `out`."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 8)
    config = dataclasses.replace(IDENTITY.config, n_kv_heads=4, n_layers=3)
    identity = dataclasses.replace(IDENTITY, config=config)
    # As if it were large.
    snapshot_arrays.SMALL_ARRAY_BYTES = snapshot_arrays.SMALL_CHUNK_BYTES = 1
    want = document(config, chunks=7)
    pools = ("cache.pool.k", "cache.pool.v")

    def placement(data: int, heads: int) -> Any:
        mesh = Mesh(np.array(jax.devices()[: data * heads]).reshape(data, heads), ("d", "h"))
        pool = NamedSharding(mesh, PartitionSpec(None, "d", "h"))
        rest = NamedSharding(mesh, PartitionSpec())
        return lambda name: pool if name in pools else rest

    found = []
    for wrote in ((4, 2), (1, 1)):
        place = placement(*wrote)
        k, v = (
            jax.device_put(x, place(name))
            for x, name in zip((want.pool.k, want.pool.v), pools, strict=True)
        )
        spread = dataclasses.replace(want, pool=dataclasses.replace(want.pool, k=k, v=v))
        path = folder / str(wrote)
        save_document(path, identity, spread, chunking=CHUNKS)
        for read in ((2, 4), (8, 1), (2, 1), (1, 1)):
            cache = load_document(path, identity, placement=placement(*read)).cache
            for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
            found.append([read, cache.pool.k.addressable_shards[0].data.shape])
    out.write_text(json.dumps(found))


def offline(folder: Path, out: Path) -> None:
    """Converts a checkpoint, asks it, evaluates it; whatever would connect to anything raises."""
    import socket
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    import evaluate
    import generate
    from campaigns import guard, samples

    from convert import convert

    sys.addaudithook(guard.forbid)
    _fast_compilation()
    convert(samples.write_checkpoint(folder / "source"), folder / "model")
    (folder / "text.txt").write_text(samples.SENTENCES * 3)
    small = ["--chunk-size", "32", "--top-k", "1", "--gen-length", "4", "--encode-batch", "2"]
    model, text = str(folder / "model"), str(folder / "text.txt")
    asking = [model, "--context-file", text, "--question", "Who?", *small]
    evaluating = [
        model, "needle", text, "--out", str(folder / "out"), "--lengths", "160", "--depths", "2",
        "--needle", "The key is 7.", "--question", "Key?", "--expect", "7", "--no-chat",
        "--methods", "prefilling", *small,
    ]  # fmt: skip
    statuses = [
        generate.main(asking), generate.main([*asking, "--method", "plain"]),
        evaluate.main(evaluating),
    ]  # fmt: skip
    # What native code has opened meanwhile: the inodes of this process' sockets.
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    mine = {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [
        line.split()
        for name in ("tcp", "tcp6", "udp", "udp6")
        if (table := Path("/proc/self/net", name)).exists()
        for line in table.read_text().splitlines()[1:]
    ]
    caught = False
    try:
        socket.create_connection(("127.0.0.1", 9))
    except guard.Violation:
        caught = True
    internet = [fields[1] for fields in lines if fields[9] in mine]
    out.write_text(json.dumps({"statuses": statuses, "caught": caught, "internet": internet}))


def _fast_compilation() -> None:
    """As tests/conftest.py has it."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
