"""Fingerprints of models, tokenizers and documents: short, cheap, the same on every device.

The fingerprint of the weights covers every element. Each element is hashed together with its place
(the finalizer of murmur3, a bijection of 32 bits); the hashes are summed modulo 2^32, once as they
are and once scrambled. Integer sums do not depend on their order, so that a sharded model has the
fingerprint that it has on one device, and only a few words leave the device. The SHA-256 of the
sums, with paths, shapes and dtypes, is the fingerprint.

A change of one element, or of a shape, dtype or name, always changes the fingerprint. Any other
change goes unnoticed with a probability of 2^-64. The fingerprint does not protect against weights
that were constructed to collide.
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
    """What identifies the model that made some KV.

    Args:
      config: the architecture.
      dtype: of weights and activations.
      weights: hexadecimal fingerprint of every weight.
    """

    config: ModelConfig
    dtype: str
    weights: str


def model_identity(model: MaskPredictor) -> ModelIdentity:
    """Computes the identity of a model: equal for equal config, dtype and bits of every weight.

    Reads every weight once: milliseconds on a GPU, about a second per GB on two CPU cores. The
    placement of the weights, on one device or a mesh, makes no difference.
    """
    state = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    # Start all sums before the first result is waited for.
    sums = [(path, leaf, _sums(leaf)) for path, leaf in state]
    lines = sorted(
        f"{jax.tree_util.keystr(path)} {leaf.dtype} {list(leaf.shape)} {np.asarray(words).tolist()}"
        for path, leaf, words in sums
    )
    weights = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return ModelIdentity(model.config, str(model.dtype), weights)


# Fields that are younger than snapshots, and what a manifest without them means.
YOUNGER_FIELDS = {"model.family": "llada", "model.weight_format": "full"}


def model_fields(identity: ModelIdentity) -> dict[str, Any]:
    """Returns what a manifest says of a model, by the names that errors use ("rope.theta").

    Younger fields are left out at the value that all older models have, so that a manifest without
    them still fits.
    """
    fields = dataclasses.asdict(identity.config) | {"dtype": identity.dtype}
    fields |= {"weights": identity.weights, "rope_head_dim": identity.config.head_dim}
    named = {
        f"rope.{name.removeprefix('rope_')}" if name.startswith("rope_") else f"model.{name}": value
        for name, value in fields.items()
    }
    older = {name for name, value in YOUNGER_FIELDS.items() if named[name] == value}
    return {name: value for name, value in named.items() if name not in older}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Returns the SHA-256 of the tokenizer's files and of the ids of the special tokens."""
    ids = [tokenizer.bos_id, tokenizer.mask_id, *tokenizer.stop_ids]
    return digest({"file": tokenizer.digest, "special": ids})


def document_fingerprint(prefix: Any, prefix_length: Any, chunks: Any, lengths: Any) -> str:
    """Returns the SHA-256 of the ids that are encoded: prefix and chunks with their anchors.

    Args:
      prefix [Z, P], prefix_length [Z], chunks [Z, N, C], lengths [Z, N]: fields of a `ChunkCache`
        or `ChunkedPrompt`; padding is not hashed.
    """
    fields = (np.asarray(x, np.int32) for x in (prefix, prefix_length, chunks, lengths))
    documents = [
        {
            "prefix": ids[:rows].tolist(),
            "chunks": [row[:n].tolist() for row, n in zip(tokens, counts, strict=True) if n > 0],
        }
        for ids, rows, tokens, counts in zip(*fields, strict=True)
    ]
    return digest({"chunk_size": chunks.shape[-1], "documents": documents})


def digest(content: Any) -> str:
    """Returns the SHA-256 of JSON content; the order of keys makes no difference."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _mixed(x: Array) -> Array:
    """murmur3's 32-bit finalizer (Appleby, MurmurHash3.cpp, fmix32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _sums(x: Array) -> UInt32[Array, "2"]:
    """Returns the sums over two hashes of (place, bits) of every element."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    # A sum of one number per axis: a flat index could overflow, a reshape would gather shards.
    place = jnp.uint32(0x9E3779B9)
    for axis, size in enumerate(x.shape):
        start = jnp.uint32((axis + 1) * 0x1FD2DF05)
        along = _mixed(jnp.arange(size, dtype=jnp.uint32) + start)
        place = place + along.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first = _mixed(words ^ place)
    second = first * jnp.uint32(0x9E3779B1)
    second ^= second >> 15
    return jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])
