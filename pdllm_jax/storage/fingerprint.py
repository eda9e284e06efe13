"""What tells one model, tokenizer or document from another: short, cheap, the same on every device.

The fingerprint of the weights covers every element: each is hashed together with its place
(murmur3's finalizer, a bijection of 32 bits), and the hashes are added up modulo 2^32, once as they
are and once scrambled. Integer sums do not depend on their order, so a model that is sharded over
any mesh has the fingerprint that it has on one device; nothing but a few words leaves the device.
The SHA-256 of these sums, with the paths, shapes and dtypes, is the fingerprint.

A change of one element, or in one tensor's shape, dtype or name, always changes it; another change
goes unseen with a chance of 2^-64. It is no defence against somebody who constructs weights of the
same fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, UInt32

from pdllm_jax.network.config import ModelConfig
from pdllm_jax.network.transformer import MaskPredictor
from pdllm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ModelIdentity:
    """Which model made some KV: architecture, dtype of weights and activations, and weights.

    weights: hexadecimal, of `model_identity`.
    """

    config: ModelConfig
    dtype: str
    weights: str


def model_identity(model: MaskPredictor) -> ModelIdentity:
    """Which model this is: the same for the same config, dtype and bits of every weight.

    Reads every weight once: milliseconds on a GPU, about a second per GB on two CPU cores. Where
    the weights lie, on one device or a mesh, makes no difference.
    """
    state = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    # All are under way before the first is waited for.
    sums = [(path, leaf, _sums(leaf)) for path, leaf in state]
    lines = sorted(
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {list(leaf.shape)} {np.asarray(found).tolist()}"
        for path, leaf, found in sums
    )
    return ModelIdentity(
        config=model.config,
        dtype=str(model.dtype),
        weights=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of tokenizer.json, as it was read, and of the ids of the special tokens."""
    ids = [tokenizer.bos_id, tokenizer.mask_id, *tokenizer.stop_ids]
    return _digest({"file": tokenizer.digest, "special": ids})


def document_fingerprint(prefix: Any, prefix_length: Any, chunks: Any, lengths: Any) -> str:
    """SHA-256 of a document as it is encoded: prefix and chunks, anchors included, no padding.

    The arguments are fields of `ChunkCache` or `ChunkedPrompt`, of one document or a batch.
    """
    prefix, chunks = (np.asarray(x, np.int32) for x in (prefix, chunks))
    prefix_length, lengths = (np.asarray(x, np.int32) for x in (prefix_length, lengths))
    digest = hashlib.sha256(repr((prefix.ndim, chunks.shape[-1])).encode())
    prefixes = prefix.reshape(prefix_length.size, -1)
    documents = chunks.reshape(prefix_length.size, -1, chunks.shape[-1])
    rows = lengths.reshape(prefix_length.size, -1)
    for before, here, document, each in zip(
        prefixes, prefix_length.reshape(-1), documents, rows, strict=True
    ):
        each = each[each > 0]
        digest.update(f"|{here} {each.tolist()}|".encode())
        digest.update(before[:here].astype("<i4").tobytes())
        for chunk, length in zip(document, each, strict=False):
            digest.update(chunk[:length].astype("<i4").tobytes())
    return digest.hexdigest()


def settings_fingerprint(settings: Any) -> str:
    """SHA-256 of JSON-like settings, whatever the order of their keys."""
    return _digest(settings)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _mixed(x: Array) -> Array:
    """murmur3's 32-bit finalizer (Appleby, MurmurHash3.cpp, fmix32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _sums(x: Array) -> UInt32[Array, "2"]:
    """Sums over two hashes of (place, bits) of every element."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # A number for each place along each axis, added up: no flat index that could overflow, and no
    # reshape, which would gather what is sharded.
    place = jnp.uint32(0x9E3779B9)
    for axis, size in enumerate(x.shape):
        start = jnp.uint32((axis + 1) * 0x1FD2DF05)
        along = _mixed(jnp.arange(size, dtype=jnp.uint32) + start)
        place = place + along.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first = _mixed(words ^ place)
    second = first * jnp.uint32(0x9E3779B1)
    second ^= second >> 15
    return jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])
