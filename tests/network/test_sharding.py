"""Every mesh gives the values of one device, and sizes that do not fit are refused by name."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pdllm_jax import ModelConfig, load_model, make_mesh, shard_model
from pdllm_jax.network.sharding import mesh_sizes, parse_mesh, spec_of
from pdllm_jax.rules import ConfigError
from pdllm_jax.storage.fingerprint import model_identity
from tests.storage.test_checkpoint import DIVISIBLE, make
from tests.support import mesh_workers, workers

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.slow
def test_every_setting_gives_the_tokens_of_one_device(mesh):
    workers.run(mesh_workers.settings, *mesh, timeout=1500)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.slow
def test_every_way_to_ask_gives_the_tokens_of_one_device(mesh, tmp_path):
    workers.run(mesh_workers.ways, *mesh, tmp_path, timeout=1500)


@pytest.mark.slow
def test_every_cache_method_gives_the_tokens_of_one_device():
    workers.run(mesh_workers.cache_methods, 2, 4, timeout=1500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("checkpoint"), **DIVISIBLE)


def test_a_checkpoint_goes_to_a_mesh_in_parts(tmp_path):
    workers.run(mesh_workers.loaded, make(tmp_path, family="dream", **DIVISIBLE))


def test_projections_with_weights_of_8_bits():
    workers.run(mesh_workers.products)


def test_two_processes_are_one_mesh(folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    hosts = [
        workers.PROCESSES.Process(target=mesh_workers.host, args=(rank, port, folder, tmp_path))
        for rank in range(2)
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(240)
    assert [host.exitcode for host in hosts] == [0, 0]
    one = load_model(folder)
    want = [model_identity(one).weights, mesh_workers.host_answers(one)]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == want


def test_a_mesh_of_one_device_and_sizes_that_do_not_fit():
    mesh = make_mesh()
    assert (dict(mesh.shape), mesh.size) == ({"data": 1, "tensor": 1}, 1)
    config = ModelConfig.tiny()
    for wrong, message in {
        ("tensor", 8): "tensor 8 does not divide n_heads 4, n_kv_heads 2$",
        ("tensor", 3): "3 does not divide n_heads 4, n_kv_heads 2, embedding_size 256$",
        ("data", 0): "sizes from 1 on",
        ("model", 2): "axes are tensor and data",
    }.items():
        with pytest.raises(ConfigError, match=message):
            mesh_sizes(config, dict([wrong]))
    assert mesh_sizes(config, {"data": 3, "tensor": 2}) == (3, 2)
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"2 x {count} needs {2 * count} devices, there are"):
        make_mesh(2, count)
    with pytest.raises(ValueError, match="sizes from 1 on, got 0 x 1"):
        make_mesh(0)
    other = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ConfigError, match="axes are tensor and data"):
        shard_model(mesh_workers.model(), other)
    assert parse_mesh("4x2") == (4, 2)
    for text in ("4", "0x2", "2x", "2x2x2", "-1x2", "2X2", "٢x2"):
        with pytest.raises(ValueError, match="a mesh is DATAxTENSOR"):
            parse_mesh(text)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("blocks.3.q_proj.weight", (64, 64), ("tensor",)),
        ("blocks.3.down_proj.weight", (64, 96), (None, "tensor")),
        ("blocks.3.k_proj.bias", (64,), ("tensor",)),
        ("blocks.3.attn_norm.weight", (64,), ()),
        ("lm_head.weight", (256, 64), ("tensor",)),
        ("cache.pool.k", (2, 6, 8, 16, 4), (None, None, "tensor")),
        ("cache.pool.lengths", (6,), ()),
        ("cache.prefix_v", (2, 32, 8, 4), (None, None, "tensor")),
        ("cache.prefix_v", (2, 4, 32, 8, 4), (None, None, None, "tensor")),
        ("state.live.k.1", (4, 128, 8, 4), ("data", None, "tensor")),
        ("state.live.k.1", (3, 128, 8, 4), (None, None, "tensor")),
        ("state.live.k", (2, 4, 128, 8, 4), (None, "data", None, "tensor")),
        ("state.tokens", (4, 8), ()),
    ],
)
def test_where_arrays_lie(name, shape, spec):
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    assert spec_of(mesh, name, shape) == PartitionSpec(*spec)
