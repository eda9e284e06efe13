"""Sums over devices: what is computed, what is chosen, what is refused; the kernel as it lowers."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Norm, peer_problem, peer_table, resolve_all_reduce
from pallas_kernels.all_reduce import peer_memory
from pallas_kernels.all_reduce.peer_memory import CAPACITY
from pdllm_jax import make_mesh, shard_model
from pdllm_jax.network import sharding as sharded
from pdllm_jax.network.transformer import Links, put_on
from tests.support import mesh_workers, workers
from tests.support.kernels import MESH, OLD_JAX, integers, launches, lowered, spec

TABLE = integers(2, 4, 10)


@pytest.mark.parametrize("mesh", [(2, 4), (1, 8), (8, 1)], ids=str)
def test_sum_residual_and_norm_are_those_of_the_parts(mesh):
    workers.run(mesh_workers.sums, *mesh)


def test_the_table_of_an_exchange_says_where_the_memory_of_a_group_lies():
    workers.run(mesh_workers.exchange)


@pytest.mark.parametrize(
    ("x", "table", "path"),
    [
        (spec(1, 32, 4096), TABLE, "mosaic_gpu"),
        (spec(1, 33, 4096, dtype=jnp.float32), TABLE, "mosaic_gpu"),
        (spec(CAPACITY // 8192, 4096), TABLE, "mosaic_gpu"),
        (spec(CAPACITY // 8192 + 1, 4096), TABLE, "xla"),
        (spec(32, 4), TABLE, "xla"),
        (integers(32, 4096), TABLE, "xla"),
        (spec(32, 4096, dtype=jnp.float8_e4m3fn), TABLE, "xla"),
        (spec(32, 4096), None, "xla"),
    ],
    ids=str,
)
def test_what_the_kernel_takes(x, table, path):
    assert resolve_all_reduce(None, x, table) == path
    assert resolve_all_reduce("xla", x, table) == "xla"
    if path == "mosaic_gpu":
        assert resolve_all_reduce("mosaic_gpu", x, table) == "mosaic_gpu"
    else:
        with pytest.raises(ValueError, match="implementation 'mosaic_gpu': "):
            resolve_all_reduce("mosaic_gpu", x, table)


class OneByTwo:
    """What the code asks of a mesh."""

    axis_names, shape = ("data", "tensor"), {"data": 1, "tensor": 2}

    def __init__(self, *devices):
        self.devices = np.array([devices], object)


def test_unknown_names_and_devices_without_peers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'nccl' is not known \(mosaic_gpu, xla\)"):
        resolve_all_reduce("nccl", spec(32, 4096), TABLE)
    mesh = make_mesh()
    assert peer_problem(mesh, "tensor") is not None
    with pytest.raises(ValueError, match="no peer memory along tensor: "):
        peer_table(mesh, "tensor")
    model = workers.tiny()
    with pytest.raises(ValueError, match=r"sums 'nccl' is not known \(mosaic_gpu, xla\)"):
        shard_model(model, mesh, sums="nccl")
    assert shard_model(model, mesh, sums="mosaic_gpu").links is None  # one device: nothing to add
    model.links = Links(jnp.zeros((1, 1, 4), jnp.int32))
    assert shard_model(model, mesh, sums="xla").links is None


@pytest.mark.parametrize("problem", [None, "no way"])
def test_a_model_takes_the_kernel_for_its_sums_where_it_can_run(monkeypatch, problem):
    monkeypatch.setattr("pdllm_jax.network.transformer.peer_problem", lambda mesh, axis: problem)
    monkeypatch.setattr("pdllm_jax.network.transformer.peer_table", lambda mesh, axis: TABLE)
    model = workers.tiny()
    assert (put_on(model, OneByTwo(), None).links is None) == (problem is not None)
    assert put_on(model, OneByTwo(), "xla").links is None
    assert put_on(model, OneByTwo(), "mosaic_gpu").links is not None


@OLD_JAX
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"process_index": 1}, "several processes"),
        ({"compute_capability": "8.0"}, "capability is not 9.0: 8.0, 9.0"),
        ({"local_hardware_id": 3}, "cannot access the memory of"),
    ],
    ids=str,
)
def test_which_devices_can_hand_each_other_rows(monkeypatch, changes, problem):
    base = {"process_index": 0, "compute_capability": "9.0", "platform": "gpu"}
    one, two = ({**base, "local_hardware_id": i} for i in range(2))
    mesh = OneByTwo(SimpleNamespace(**one), SimpleNamespace(**{**two, **changes}))
    monkeypatch.setattr(peer_memory, "_can_access", lambda a, b: 3 not in (a, b))
    reason = peer_problem(mesh, "tensor")
    assert reason is None if problem is None else problem in reason
    assert peer_problem(mesh, "data") == "data has one device"


def projection(rows, size, *, links, norm, dtype=jnp.bfloat16):
    """A projection back into the stream on a mesh of 2 x 4, as a GPU is given it."""

    def layer(stream, x, weight, scale, links):
        by = Norm(scale, 1e-5) if norm else None
        return sharded.add_projected(MESH, stream, x, weight, by, links)

    shapes = (2, rows, size), (2, rows, 64), (size, 64), (size,)
    return lowered(layer, *(spec(*s, dtype=dtype) for s in shapes), TABLE if links else None)


@OLD_JAX
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_few_rows_go_through_the_kernel_and_many_through_xla(dtype):
    for rows, links, kernel in [(32, True, 1), (1, True, 1), (2048, True, 0), (32, False, 0)]:
        for norm in (True, False):
            text = projection(rows, 4096, links=links, norm=norm, dtype=dtype)
            lines = launches(text)
            assert (len(lines), text.count("stablehlo.all_reduce")) == (kernel, 1 - kernel)
            result = f"tensor<{rows}x4096x"
            assert all(line.rpartition("->")[2].count(result) == 1 + norm for line in lines)
            assert text.count("stablehlo.rsqrt") == (norm and not kernel)


@OLD_JAX
def test_rows_that_no_block_of_threads_holds_are_normed_behind_the_kernel():
    text = projection(32, 1536 // 2, links=True, norm=True)
    assert (text.count("custom_call @mosaic_gpu"), text.count("stablehlo.rsqrt")) == (1, 1)


def test_a_mesh_without_links_lowers_to_one_sum():
    text = projection(32, 4096, links=False, norm=True)
    assert (text.count("custom_call @mosaic_gpu"), text.count("stablehlo.all_reduce")) == (0, 1)
