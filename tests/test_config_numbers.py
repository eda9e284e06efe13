"""Degenerate numbers in every class of settings, and shares that are exact."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from pdllm_jax.config import ChunkConfig, DecodeConfig, SelectionConfig
from pdllm_jax.method.encodings import ENCODINGS, Bridge
from pdllm_jax.method.scorers import SCORERS
from pdllm_jax.method.unmasking import UNMASKING
from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.network.rope import inverse_frequencies
from pdllm_jax.rules import ConfigError
from tests.test_config import LLADA_8B


def scaled(kind, **sizes):
    """A tiny model with this kind of scaling, and for `narrow` head size 2."""
    scaling = kind and RopeScaling(kind, 4.0, 64)
    return dataclasses.replace(ModelConfig.tiny(), rope_scaling=scaling, **sizes)


NARROW = {"d_model": 2, "n_heads": 1, "n_kv_heads": 1}
MODELS = [scaled(kind) for kind in (None, "linear", "ntk", "yarn")]
MODELS += [scaled(kind, **NARROW) for kind in (None, "linear", "yarn")]
GUIDED = DecodeConfig(recompute="response")
BASES = [*MODELS, *(RopeScaling(kind, 2.0, 64) for kind in ("linear", "ntk", "yarn"))]
BASES += [ChunkConfig(), SelectionConfig(), SelectionConfig(max_k=5), DecodeConfig(), GUIDED]
BASES += [make() for table in (SCORERS, ENCODINGS, UNMASKING) for make in table.values()]
DEGENERATE = [0, 1, -1, 0.5, 2**31 - 1, 2**31, 10**400, 1e30, 1e300, 5e-324, math.inf, math.nan]
DEGENERATE += [True, False, np.bool_(True), np.int64(1), np.uint8(2), np.float32(0.07)]
DEGENERATE += [np.float64("nan"), "1", "", None, [1], np.ones(2)]
KINDS = {"int": int, "float": (int, float), "bool": bool, "tuple[int, ...]": tuple}
FIELDS = [
    (base, field.name, KINDS[kind])
    for base in BASES
    for field in dataclasses.fields(base)
    if (kind := field.type.removesuffix(" | None")) in KINDS
]


@pytest.mark.parametrize(
    ("base", "name", "kind"), FIELDS, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_a_degenerate_number_is_refused_by_name_or_works(base, name, kind):
    """Every numeric field of every class of settings; new fields are covered by themselves."""
    messages = []
    for value in DEGENERATE:
        given = (value,) if kind is tuple else value
        try:
            config = dataclasses.replace(base, **{name: given})
        except ConfigError as error:
            messages.append(str(error))
            continue
        kept = getattr(config, name)
        assert kept is None or isinstance(kept, kind), (value, kept)
        numbers = kept if kind is tuple else (kept,)
        for number in numbers:
            assert type(number) in (int, float, bool, type(None)), (value, number)
            assert (type(number) is bool) == (kind is bool) or number is None, (value, number)
        json.dumps(numbers, allow_nan=False)
        assert hash(config) == hash(dataclasses.replace(config))
        if isinstance(config, RopeScaling):
            config = dataclasses.replace(ModelConfig.tiny(), rope_scaling=config)
        if isinstance(config, ModelConfig) and config.head_dim < 1000:
            frequencies, factor = inverse_frequencies(config)
            assert np.isfinite(frequencies.astype(np.float32)).all()
            assert np.isfinite(np.float32(factor))
    assert messages
    for message in messages:
        assert re.search(rf"\b(bridge_|bm25_)?{name}\b", message), message
        assert re.search(r" (must|is|not|needs|leaves)\b.*", message), message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": RopeScaling("ntk", 2.0), **NARROW},
            "'ntk' needs a head size of at least",
        ),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 64), "rope_theta": 1.0},
            "needs rope_theta above",
        ),
    ],
)
def test_scalings_that_divide_by_zero_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ModelConfig.tiny(), **settings)


def test_ramp_of_yarn_in_the_wrong_order():
    with pytest.raises(ConfigError, match=r"beta_fast 1\.0 is less than beta_slow 2\.0"):
        RopeScaling("yarn", 2.0, 64, beta_fast=1.0, beta_slow=2.0)


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [
        # In binary, 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996.
        *((0.07, 100, 7), (0.14, 50, 7), (0.28, 25, 7), (0.55, 100, 55), (0.56, 100, 56)),
        *((0.29, 100, 29), (0.15, 1024, 154), (0.1, 10, 1), (1, 64, 64), (1.0, 64, 64)),
        *((1e-9, 64, 1), (5e-324, 64, 1), (np.float32(0.07), 100, 7)),
    ],
)
def test_tokens_of_a_share_of_a_chunk(share, size, count):
    """ceil(share C) of the decimal number that was written."""
    assert SelectionConfig(encoding="bridge", bridge_share=share).encoding.recomputed(size) == count


def test_every_hundredth_of_a_chunk_of_100():
    shares = [Bridge(share=i / 100).recomputed(100) for i in range(1, 101)]
    assert shares == list(range(1, 101))


def test_the_ratio_of_the_mlp_is_exact():
    """In binary, 2.01 * 3200 is 6431.999999999999."""
    raw = {**LLADA_8B, "d_model": 3200, "mlp_hidden_size": None, "mlp_ratio": 2.01}
    assert ModelConfig.from_dict(raw).mlp_hidden_size == 6432
