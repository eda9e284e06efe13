"""What tests do on several devices, in new processes. Importing starts nothing in JAX."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import pdllm_jax as pdllm
from pallas_kernels import Norm, all_reduce, quantise
from pallas_kernels.all_reduce.peer_memory import CAPACITY, EMPTY, HEADER, peer_memory
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    MaskPredictor,
    SelectionConfig,
    chunk_prompt,
    denoise_step,
    encode_document,
    make_mesh,
    prefill,
    select_top_k,
    shard_model,
)
from pdllm_jax.deprecated import ask_ids, finish, generate_batch_ids, generate_ids, prefill_request
from pdllm_jax.engine.offload import encode_offloaded, offload, select_offloaded
from pdllm_jax.engine.request import start_decoding
from pdllm_jax.method import likelihood
from pdllm_jax.network.sharding import DATA, TENSOR, add_projected, project_columns
from pdllm_jax.storage import arrays as arrays_module
from pdllm_jax.storage.fingerprint import model_identity
from tests.support.method import first_state

DEVICES = 8
CHUNKS = ChunkConfig(16)
PREFIX = [253, 1, 2]
SELECT: dict[str, Any] = {"top_k": 2, "masked_copies": 2, "encode_batch": 2}
DECODE: dict[str, Any] = {"gen_length": 8, "block_length": 4}
INDEPENDENT = SelectionConfig(**SELECT, encoding="independent")
# Settings of a selection, of decoding, or both, each of which must give what one device gives.
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *[({"scorer": name}, {}) for name in ("draft", "query", "confidence", "attention")],
    ({"scorer": "heads", "heads": ((0, 3), (1, 9)), "encoding": "independent"}, {}),
    ({"scorer": "heads", "heads": ((0, 3), (1, 9)), "reselect": "block"}, {}),
    *[({"scorer": name}, {}) for name in ("bm25", "first", "last", "random", "all", "oracle")],
    ({"masked_copies": None}, {}),
    *[({"encoding": name}, {}) for name in ("independent", "query-conditioned", "bridge")],
    ({"encoding": "bridge", "bridge_tokens": "attention"}, {}),
    ({"encoding": "independent", "positions": "absolute", "keep_first": True}, {}),
    ({"encoding": "independent", "positions": "reuse", "max_k": 3, "margin": 0.3}, {}),
    ({"keep_tokens": 5, "kv_format": "fp8"}, {}),
    ({"encoding": "independent", "keep_tokens": 5, "reselect": "block"}, {}),
    ({"encoding": "bridge", "reselect": "step", "scorer": "query"}, {}),
    ({"scorer": "first"}, {"recompute": "suffix", "temperature": 0.7}),
    ({"scorer": "first"}, {"recompute": "response", "remasking": "entropy"}),
    ({"scorer": "first"}, {"remasking": "margin", "threshold": 0.02}),
    ({"scorer": "first"}, {"remasking": "random", "stop_ids": tuple(range(120))}),
    ({"scorer": "first"}, {"factor": 1.0}),
]


def setup() -> None:
    """As tests/conftest.py has it, on virtual devices."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)


def model(tied: bool = False) -> MaskPredictor:
    """Two layers, 16 query heads on 8 KV heads."""
    sizes = {"n_heads": 16, "n_kv_heads": 8, "weight_tying": tied}
    config = dataclasses.replace(pdllm.ModelConfig.tiny(), **sizes)
    return MaskPredictor(config, rngs=nnx.Rngs(0))


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, count)


DOCUMENT, QUERY = ids(70), ids(7, 1)  # 5 chunks: odd for any mesh of more than one


def ask(model: MaskPredictor, selecting: dict, decoding: dict, **settings: Any) -> Any:
    settings |= {"chunking": CHUNKS, "decode": DecodeConfig(**{**DECODE, **decoding}), "seed": 3}
    settings["selection"] = SelectionConfig.from_flat(**{**SELECT, **selecting})
    settings["oracle"] = [1, 4] if selecting.get("scorer") == "oracle" else None
    return generate_ids(model, PREFIX, DOCUMENT, QUERY, **settings)


def same(got: Any, want: Any, what: Any) -> None:
    """Tokens, evaluations and chosen chunks are equal, scores up to the order of sums."""
    assert got.tokens == want.tokens, (what, got.tokens, want.tokens)
    assert got.evaluations == want.evaluations, what
    if want.selection is None:
        return
    scores, expected = got.selection["scores"], want.selection["scores"]
    assert {**got.selection, "scores": 0} == {**want.selection, "scores": 0}, what
    if expected is not None:
        np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=2e-6, err_msg=str(what))


def settings(data: int, tensor: int) -> None:
    """Every setting of the method."""
    setup()
    one = model(tied=tensor == 2)
    many = shard_model(one, make_mesh(data, tensor))
    for setting in SETTINGS:
        same(ask(many, *setting), ask(one, *setting), setting)


def ways(data: int, tensor: int, folder: Path) -> None:
    """Baselines, batches, questions, blocks, single steps, host memory, likelihoods."""
    setup()
    one = model()
    many = shard_model(one, make_mesh(data, tensor))
    for method in ("plain", "prefix-cache", "dual-cache"):
        guided = {"recompute": "response", "guidance": 0.5} if method == "plain" else {}
        settings: Any = {"method": method, "decode": DecodeConfig(**DECODE, **guided)}
        got, want = (generate_ids(m, PREFIX, DOCUMENT, QUERY, **settings) for m in (many, one))
        same(got, want, method)
    both = [_ways(m) for m in (many, one)]
    for got, want in zip(*both, strict=True):
        if isinstance(want, float):
            np.testing.assert_allclose(got, want, rtol=2e-5)
        elif isinstance(want, list):
            assert got == want
        else:
            same(got, want, "")
    snapshots(one, many, folder)


def cache_methods(data: int, tensor: int) -> None:
    """Every cache method on a whole prompt."""
    from tests.method.caches.test_methods import METHODS, decoding, method_of

    setup()
    one = model()
    many = shard_model(one, make_mesh(data, tensor))
    for name in METHODS:
        settings: Any = {"method": method_of(name), "decode": decoding(name)}
        got, want = (generate_ids(m, PREFIX, DOCUMENT, QUERY, **settings) for m in (many, one))
        same(got, want, name)


def _ways(model: MaskPredictor) -> list[Any]:
    decode = DecodeConfig(**DECODE)
    results: list[Any] = []
    settings: Any = {"chunking": CHUNKS, "decode": decode}
    requests = [(PREFIX, DOCUMENT, QUERY), (PREFIX[:2], DOCUMENT[:40], QUERY[:3])] * 2
    for encoding in ("joint", "independent", "bridge"):
        selecting = SelectionConfig(**SELECT, encoding=encoding, keep_tokens=9)
        batch = [*requests, requests[0]]
        results += generate_batch_ids(model, batch, selection=selecting, **settings)
    prompt = chunk_prompt(PREFIX, DOCUMENT, QUERY, CHUNKS)
    cache = encode_document(model, prompt, encode_batch=2)
    results += ask_ids(model, cache, [QUERY, QUERY[:2]], selection=INDEPENDENT, decode=decode)
    blocks: list[int] = []
    ask(model, {"scorer": "first"}, {}, on_block=lambda request, block, ids: blocks.extend(ids))
    results.append(blocks)
    results.append(_steps(model, prompt, decode))
    for document in (encode_offloaded(model, prompt, encode_batch=2), offload(cache)):
        chosen = select_offloaded(model, document, QUERY, INDEPENDENT, seed=3)
        results += finish(model, start_decoding(model, chosen, decode))
    answer, draws = ids(5, 2), {"samples": 8, "group": 4}
    results.append(likelihood.answer_log_likelihood(model, QUERY, answer, **draws))
    context = likelihood.keep_context(model, prompt, INDEPENDENT)
    results.append(likelihood.answer_log_likelihood_kept(model, context, QUERY, answer, **draws))
    return results


def _started(model: MaskPredictor, prompt: Any, selecting: Any, decode: Any) -> Any:
    cache, scores = prefill(model, prompt, selecting)
    chosen = select_top_k(scores, 2)
    return cache, first_state(model, cache, chosen, prompt, decode, settings=selecting)


def _steps(model: MaskPredictor, prompt: Any, decode: DecodeConfig) -> list:
    cache, state = _started(model, prompt, INDEPENDENT, decode)
    while int(state.block[0]) < decode.n_blocks:
        if int(state.block[0]) == 1 and int(state.step[0]) == 0:
            state = pdllm.reselect(model, cache, state, settings=INDEPENDENT, config=decode)
        places = jax.tree.map(lambda x: x.sharding, state)
        state = denoise_step(model, cache, state, config=decode)
        # The next call gets its arguments as this one did.
        assert jax.tree.map(lambda x: x.sharding, state) == places
    return np.asarray(state.tokens)[0].tolist()


def snapshots(one: MaskPredictor, many: MaskPredictor, folder: Path) -> None:
    """A request and a document, written on one mesh and gone on with on others."""
    arrays_module.HEAD_BYTES = 1  # as if large
    want, decode = ask(one, {}, {}), DecodeConfig(**DECODE)
    settings: Any = {"chunking": CHUNKS, "selection": SelectionConfig(**SELECT), "decode": decode}
    prompt = chunk_prompt(PREFIX, DOCUMENT, QUERY, CHUNKS)

    def asked(model: MaskPredictor, cache: Any) -> Any:
        return ask_ids(model, cache, [QUERY], selection=narrow, decode=decode)[0]

    kv: Any = {"kv_format": "fp8"}
    narrow = dataclasses.replace(INDEPENDENT, **kv)
    answered = asked(one, encode_document(one, prompt, encode_batch=2, **kv))
    other = shard_model(one, make_mesh(1, DEVICES))
    for name, wrote in (("one", one), ("many", many)):
        prefilled = prefill_request(wrote, PREFIX, DOCUMENT, QUERY, **settings, seed=3)
        request, document = folder / name, folder / f"{name}-document"
        pdllm.save_request(request, wrote, prefilled, chunking=CHUNKS)
        cache = encode_document(wrote, prompt, encode_batch=2, **kv)
        pdllm.save_document(document, wrote, cache, chunking=CHUNKS)
        for read in [model for model in (one, many, other) if model is not wrote]:
            (got,) = finish(read, pdllm.load_request(request, read))
            same(got, want, name)
            cache = pdllm.load_document(document, read).cache
            devices = jax.devices()[:1] if read.mesh is None else read.mesh.devices.flat
            assert cache.pool.k.scale.sharding.device_set == set(devices)
            same(asked(read, cache), answered, name)


def loaded(folder: Path) -> None:
    """A checkpoint of Dream goes to a mesh in parts; its answer takes two sums a layer."""
    setup()
    one, mesh = pdllm.load_model(folder), make_mesh(2, 4)
    many = pdllm.load_model(folder, mesh=mesh)
    assert many.mesh == mesh
    assert model_identity(many) == model_identity(one)
    complete, parts = (nnx.to_pure_dict(nnx.state(m)) for m in (one, many))
    block, part = complete["blocks"][0], parts["blocks"][0]

    def divided(x: jax.Array, y: jax.Array) -> list[int]:
        (shape,) = {shard.data.shape for shard in y.addressable_shards}
        assert shape == y.sharding.shard_shape(y.shape)
        return [a // b for a, b in zip(x.shape, shape, strict=True)]

    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert divided(block[name]["weight"], part[name]["weight"]) == [4, 1]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert divided(block[name]["bias"], part[name]["bias"]) == [4]
    for name in ("attn_out", "down_proj"):
        assert divided(block[name]["weight"], part[name]["weight"]) == [1, 4]
    for name in ("embedding", "lm_head"):
        assert divided(complete[name]["weight"], parts[name]["weight"]) == [4, 1]
    eight, eights = (pdllm.load_model(folder, mesh=m, weights="fp8") for m in (None, mesh))
    assert model_identity(eights) == model_identity(eight)
    for name, count in {"q_proj": 4, "up_proj": 4, "attn_out": 1, "down_proj": 1}.items():
        matrices = [getattr(m.blocks[0], name) for m in (eight, eights)]
        assert divided(*(matrix.scale[...] for matrix in matrices)) == [count]
    ids, forward = np.arange(24).reshape(2, 12), jax.jit(lambda m, ids: m(ids))
    np.testing.assert_allclose(*(forward(m, ids) for m in (eight, eights)), 1e-4, 1e-4)
    setting = {"scorer": "query", "encoding": "independent", "keep_tokens": 9}, {"temperature": 0.5}
    got = ask(many, *setting)
    same(got, ask(one, *setting), "loaded")
    assert (got.paths["mesh"], got.paths["sums"]) == ("2x4", "xla")
    _communication(many)


def _communication(model: MaskPredictor) -> None:
    """A step sums rows behind the embedding and twice a layer, and gathers logits; no KV moves."""
    prompt = chunk_prompt(PREFIX, DOCUMENT, QUERY, CHUNKS)
    selecting = SelectionConfig.from_flat(**SELECT, scorer="first", encoding="independent")
    decode = DecodeConfig(gen_length=4, block_length=4, recompute="response")
    cache, state = _started(model, prompt, selecting, decode)
    compiled = denoise_step.lower(model, cache, state, config=decode).compile()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    counts = Counter(re.findall(rf"= \S+ ({kinds})(?:-start)?\(", compiled.as_text()))
    assert counts == {"all-reduce": 2 * model.config.n_layers + 1, "all-gather": 1}


def sums(data: int, tensor: int) -> None:
    """all_reduce of parts that differ on every device, in float64 by NumPy."""
    setup()
    mesh = make_mesh(data, tensor)
    rng, rows = np.random.default_rng(0), (3, 5, 24)
    shapes = (data, tensor, *rows), (data, *rows), rows[-1:]
    parts, residual, weight = (rng.standard_normal(shape, np.float32) for shape in shapes)

    def run(x: jax.Array, r: jax.Array, w: jax.Array) -> Any:
        plain = all_reduce(x[0, 0], TENSOR)
        both = all_reduce(x[0, 0], TENSOR, residual=r[0], norm=Norm(w, 0.5))
        return jax.tree.map(lambda y: y[None, None], (plain, both))

    each = PartitionSpec(DATA, TENSOR)
    specs = each, PartitionSpec(DATA), PartitionSpec()
    (plain,), (total, normed) = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
    )(parts, residual, weight)
    want = parts.astype(np.float64).sum(axis=1, keepdims=True).repeat(tensor, axis=1)
    added = want + residual[:, None]
    scaled = added / np.sqrt((added**2).mean(axis=-1, keepdims=True) + 0.5) * weight
    for got, right in ((plain, want), (total, added), (normed, scaled)):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)


def products() -> None:
    """Projections with weights of 8 bits, into a layer and out of it, against one device."""
    setup()
    mesh = make_mesh(2, 4)
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = (2, 3, 16), (2, 3, 16), (2, 3, 32), (32,), (16,)
    x, stream, wide, bias, norm = map(jax.random.normal, keys, shapes)
    for bits in ("fp8", "int8"):
        into, out = (
            quantise(jax.random.normal(k, shape), bits)
            for k, shape in zip(keys[5:], ((32, 16), (16, 32)), strict=True)
        )
        runs = [
            (
                project_columns(where, x, into, into, biases=(bias, bias)),
                project_columns(where, x, into, into, activation="swiglu"),
                add_projected(where, stream, wide, out, Norm(norm, 1e-5)),
            )
            for where in (mesh, None)
        ]
        for got, want in zip(*map(jax.tree.leaves, runs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=bits)


def exchange() -> None:
    """The rows of a table: rank, and the addresses of the group's memory in the order of ranks."""
    setup()
    mesh = make_mesh(2, 4)
    places = np.arange(8).reshape(2, 4)
    for axis, ranks in ((TENSOR, places % 4), (DATA, places // 4)):
        words, table = peer_memory(mesh, axis)
        rows = np.asarray(table).view(np.uint64)
        np.testing.assert_array_equal(rows[..., 0], ranks)
        where = {s.device: s.data.unsafe_buffer_pointer() for s in words.addressable_shards}
        assert len(set(where.values())) == 8
        for (i, j), _ in np.ndenumerate(ranks):
            group = mesh.devices[i] if axis == TENSOR else mesh.devices[:, j]
            assert rows[i, j, 1:].tolist() == [where[device] for device in group]
        memory = np.asarray(words).view(np.uint32)
        assert (memory[..., : HEADER // 4] == 0).all()
        assert (memory[..., HEADER // 4 :] == EMPTY).all()
        assert memory.shape[-1] * 4 == HEADER + 2 * mesh.shape[axis] * CAPACITY
        assert peer_memory(mesh, axis)[0] is words


def join(rank: int, port: int, **timeouts: int) -> None:
    """This process becomes one of two with two devices each; timeouts as JAX takes them."""
    setup()
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # With jax 0.12 gloo now and then gets data of another size than it waits for, as if XLA ran
    # collectives in another order in each process. Not so where XLA does not look for concurrency.
    os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    jax.distributed.initialize(f"localhost:{port}", 2, rank, **timeouts)


def host(rank: int, port: int, folder: Path, out: Path) -> None:
    """One of two processes with two devices each: loads its part, answers, says what came out."""
    join(rank, port)
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    with pytest.raises(ValueError, match="leaves out some of the 4 devices"):
        make_mesh(1, 2)
    many = pdllm.load_model(folder, mesh=make_mesh(2, 2))
    cache = encode_document(many, chunk_prompt(PREFIX, DOCUMENT, QUERY, CHUNKS))
    with pytest.raises(pdllm.SnapshotError, match="is written by one process"):
        pdllm.save_document(out / "s", many, cache, chunking=CHUNKS)
    with pytest.raises(pdllm.SnapshotError, match="is written by one process"):
        pdllm.DocumentStore(out, many).encode_ids(PREFIX, DOCUMENT, chunking=CHUNKS)
    assert not list(out.glob(".*.lock"))
    answered = host_answers(many)
    (out / f"{rank}.json").write_text(json.dumps([model_identity(many).weights, answered]))
    # As a program's end does it: the coordinator stays until the other has ended as well.
    jax.distributed.shutdown()


def host_answers(model: MaskPredictor) -> list[Any]:
    settings: Any = {"chunking": CHUNKS, "decode": DecodeConfig(**DECODE)}
    settings["selection"] = SelectionConfig(**SELECT, scorer="query")
    requests = [(PREFIX, DOCUMENT, QUERY), (PREFIX[:2], DOCUMENT[:40], QUERY[:3])]
    results = generate_batch_ids(model, requests, **settings)
    return [[result.tokens, result.selection["chunks"]] for result in results]  # type: ignore[index]
