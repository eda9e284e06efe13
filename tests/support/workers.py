"""Functions that tests run in separate processes. Importing this module starts nothing in JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pdllm_jax import MaskPredictor
from pdllm_jax.config import ChunkConfig
from pdllm_jax.deprecated import finish
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.network.config import ModelConfig
from pdllm_jax.storage import arrays as arrays_module
from pdllm_jax.storage import store
from pdllm_jax.storage.fingerprint import ModelIdentity
from pdllm_jax.storage.snapshot import load_document, load_request, save_document

# Processes that need not import everything again: forked from one that has.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.workers"])

CHUNKS = ChunkConfig(16)
PREFIX = [253, 1, 2]
IDENTITY = ModelIdentity(ModelConfig.tiny(), "float32", "0" * 64)


def tiny(seed: int = 0) -> MaskPredictor:
    return MaskPredictor(ModelConfig.tiny(), rngs=nnx.Rngs(seed))


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, 70)


def document(
    config: ModelConfig = IDENTITY.config, dtype: str = "float32", chunks: int = 5, seed: int = 0
) -> ChunkCache:
    """Returns a cache of random numbers."""
    rng = np.random.default_rng(seed)

    def kv(*middle: int) -> jax.Array:
        shape = (config.n_layers, *middle, config.head_dim)
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def ints(values: Any) -> jax.Array:
        return jnp.asarray(values, jnp.int32)

    heads, lengths = config.n_kv_heads, [16] * (chunks - 1) + [9]
    pool = ChunkPool(kv(chunks + 1, heads, 16), kv(chunks + 1, heads, 16), ints([*lengths, 0]))
    tokens, prefix = ints(rng.integers(0, 250, (1, chunks, 16))), rng.integers(0, 250, (1, 32))
    ids = (tokens, ints([lengths]), ints(prefix), ints([3]))
    return ChunkCache(pool, *ids, kv(1, 32, heads), kv(1, 32, heads))


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure, dtypes and values."""
    data = [jax.tree.map(_key_data, tree) for tree in (a, b)]
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, data), strict=True)
    )


def _key_data(x: jax.Array) -> jax.Array:
    keys = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if keys else x


def run(worker: Any, *arguments: Any, timeout: float = 240) -> None:
    """Runs worker(*arguments) in a separate process; AssertionError if it fails."""
    process = PROCESSES.Process(target=worker, args=arguments)
    process.start()
    process.join(timeout)
    assert process.exitcode == 0, process.exitcode


def strike(point: str) -> None:
    """Makes this process kill itself (SIGKILL) at "module.name#n", the n-th call of a function."""
    module, _, name = point.rpartition(".")
    name, _, number = name.partition("#")
    place, calls = importlib.import_module(module), itertools.count(1)
    real = getattr(place, name)

    def struck(*arguments: Any, **options: Any) -> Any:
        if next(calls) == int(number or 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(place, name, struck)


def encode(folder: Path, out: Any, point: str = "", barrier: Any = None) -> None:
    """Encodes one document through a store; sends how often it encoded, and a checksum."""
    _fast_compilation()
    store.encode_document = counted = mock.Mock(wraps=store.encode_document)
    if point:
        strike(point)
    documents = store.DocumentStore(folder, tiny())
    if barrier is not None:
        barrier.wait(200)
    cache = documents.encode_ids(PREFIX, text(), chunking=CHUNKS)
    out.send((counted.call_count, float(np.abs(np.asarray(cache.pool.k)).sum())))


def decode(folder: Path, out: Any) -> None:
    """Decodes from a snapshot block by block; sends "decode" before it and the tokens after."""
    _fast_compilation()
    model = tiny()
    request = load_request(folder, model)
    out.send("decode")
    (result,) = finish(model, request, on_block=lambda *block: None)
    out.send(result.tokens)


def on_meshes(folder: Path, out: Path) -> None:
    """Writes on two meshes, reads each on four; writes the shapes of the shards to `out`."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 8)
    config = dataclasses.replace(IDENTITY.config, n_kv_heads=4, n_layers=3)
    identity = dataclasses.replace(IDENTITY, config=config)
    arrays_module.HEAD_BYTES = 1  # as if the arrays were large
    want = document(config, chunks=7)
    pools = ("cache.pool.k", "cache.pool.v")

    def placement(data: int, heads: int) -> Any:
        mesh = Mesh(np.array(jax.devices()[: data * heads]).reshape(data, heads), ("d", "h"))
        pool, rest = PartitionSpec(None, "d", "h"), PartitionSpec()
        return lambda name: NamedSharding(mesh, pool if name in pools else rest)

    shapes = []
    for wrote in ((4, 2), (1, 1)):
        place = placement(*wrote)
        k, v = (jax.device_put(x, place(pools[0])) for x in (want.pool.k, want.pool.v))
        spread = dataclasses.replace(want, pool=dataclasses.replace(want.pool, k=k, v=v))
        path = folder / str(wrote)
        save_document(path, identity, spread, chunking=CHUNKS)
        for read in ((2, 4), (8, 1), (2, 1), (1, 1)):
            cache = load_document(path, identity, placement=placement(*read)).cache
            assert same(jax.device_get(cache), jax.device_get(want))
            shapes.append([read, cache.pool.k.addressable_shards[0].data.shape])
    out.write_text(json.dumps(shapes))


def offline(source: Path, folder: Path, out: Path) -> None:
    """Converts a checkpoint, asks it, evaluates it; an attempt to connect raises."""
    import socket
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    import evaluate
    import generate

    from convert import convert

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        connects = event.startswith("socket.") and event not in ("socket.__new__", "socket.close")
        # The wake-up pair of an event loop is AF_UNIX, which stays within the process.
        opens = event == "socket.__new__" and arguments[1] != socket.AF_UNIX
        if connects or opens or event in ("subprocess.Popen", "os.posix_spawn", "urllib.Request"):
            raise RuntimeError(f"{event} {arguments!r:.200}")

    sys.addaudithook(forbid)
    _fast_compilation()
    convert(source, folder / "model")
    (folder / "text.txt").write_text("Anne lives at Kellynch Hall. The sea at Lyme is blue. " * 4)
    small = ["--chunk-size", "32", "--top-k", "1", "--gen-length", "4", "--encode-batch", "2"]
    model, text = str(folder / "model"), str(folder / "text.txt")
    asking = [model, "--context-file", text, "--question", "Who?", *small]
    needle = "--no-chat --methods prefilling --lengths 160 --depths 2 --question Key? --expect 7"
    evaluating = [model, "needle", text, "--out", str(folder / "out"), *needle.split(), *small]
    statuses = [generate.main(asking), generate.main([*asking, "--method", "plain"])]
    statuses.append(evaluate.main([*evaluating, "--needle", "The key is 7."]))
    # Sockets that native code opened: the inodes of this process's descriptors.
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    tables = (Path("/proc/self/net", name) for name in ("tcp", "tcp6", "udp", "udp6"))
    texts = [table.read_text() for table in tables if table.exists()]
    lines = [line.split() for text in texts for line in text.splitlines()[1:]]
    with pytest.raises(RuntimeError, match="socket"):  # the audit sees a connection
        socket.create_connection(("127.0.0.1", 9))
    internet = [fields[1] for fields in lines if fields[9] in inodes]
    out.write_text(json.dumps({"statuses": statuses, "internet": internet}))


def _fast_compilation() -> None:
    """Sets what tests/conftest.py sets."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)
