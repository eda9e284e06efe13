"""Cache methods and unmasking rules as text."""

from __future__ import annotations

import dataclasses

import pytest

from pdllm_jax.method.caches import CACHE_METHODS, cache_method
from pdllm_jax.method.unmasking import UNMASKING
from pdllm_jax.naming import read_named, settings_text, text_of
from pdllm_jax.rules import ConfigError

NAMED = {**CACHE_METHODS, **UNMASKING}


@pytest.mark.parametrize("name", NAMED)
def test_a_text_names_what_it_was_made_of(name):
    """With the defaults, spelt out or not; and with every number changed."""
    kind = NAMED[name]
    if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind)):
        assert text_of(kind()) == name
        assert read_named("method", name, NAMED) == kind()
        assert read_named("method", settings_text(kind), NAMED) == kind()


@pytest.mark.parametrize(
    "text",
    [
        "sparse-dllm:keep_ratio=0.25:kernel=none",
        "dllm-cache:prompt_interval=4:first_layer=false",
        "mask-kv:budget=[[3, 4], [5, 6]]",
    ],
)
def test_settings_come_back_from_the_text(text):
    method = cache_method(text)
    assert str(method) == text
    assert hash(method) == hash(cache_method(str(method)))
    assert method != type(method)()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse", r"method 'sparse' is not known \(prefilling, plain, .*sparse-dllm\)"),
        ("plain:steps=3", r"method 'plain' has no setting 'steps' \(it has none\)"),
        ("dllm-cache:rho=0.2", "'dllm-cache' has no setting 'rho' .prompt_interval, "),
        ("dllm-cache:ratio", "needs SETTING=VALUE behind a colon, got 'ratio'"),
        ("dllm-cache:ratio=2", "ratio must lie in .*, got 2"),
        ("dllm-cache:ratio=0.5:ratio=0.5", "is given ratio twice"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        cache_method(text)
