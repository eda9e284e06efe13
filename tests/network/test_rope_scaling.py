"""`rope_scaling` of config.json: what is read, and what is refused."""

from __future__ import annotations

import math

import pytest

from pdllm_jax.network.config import ModelConfig, RopeScaling
from pdllm_jax.rules import ConfigError
from tests.oracles.config_json import LLADA_8B_CONFIG


def read(scaling) -> RopeScaling | None:
    return ModelConfig.from_dict({**LLADA_8B_CONFIG, "rope_scaling": scaling}).rope_scaling


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_kinds(key):
    assert read(None) is None
    assert read({key: "default"}) is None
    linear = read({key: "linear", "factor": 4})
    assert (linear.kind, linear.factor) == ("linear", 4)
    assert read({key: "ntk", "factor": 8.0}).kind == "ntk"
    yarn = {key: "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
    yarn |= {"attention_factor": 1.1, "beta_fast": 24, "beta_slow": 2}
    assert read(yarn) == RopeScaling("yarn", 16.0, 2048, 1.1, 24, 2)
    assert read({key: "linear", "factor": 4, "rope_theta": 5e5}) == linear
    assert read({key: "yarn", "factor": 2.0}) == RopeScaling("yarn", 2.0, 4096)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        *(({"rope_type": kind, "factor": 2.0}, kind) for kind in ("dynamic", "longrope", "llama3")),
        *(({"rope_type": "linear", "factor": x}, "factor") for x in (0.5, "2", math.inf, 10**400)),
        *(({**YARN, key: 1.0}, key) for key in ("mscale", "truncate")),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 2, "two\nlines": 1}, r"'two\nlines'"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({**YARN, "beta_fast": 0}, "beta_fast"),
        ({**YARN, "beta_slow": "1"}, "beta_slow"),
        ({**YARN, "attention_factor": -1}, "attention_factor"),
        ({**YARN, "original_max_position_embeddings": -4}, "original"),
        ({"rope_type": ["linear"], "factor": 2.0}, "linear"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}, "rope_theta 1000000.0"),
        ("linear", "rope_scaling"),
        ([2.0], "rope_scaling"),
    ],
)
def test_rope_scaling_that_is_refused(scaling, message):
    with pytest.raises(ConfigError) as error:
        read(scaling)
    assert message in str(error.value)
