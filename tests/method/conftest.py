"""The model and prompt that most tests of the method use; a file with other ones overrides them."""

from __future__ import annotations

import pytest

from pdllm_jax.method.chunking import ChunkedPrompt, chunk_prompt
from pdllm_jax.network.transformer import MaskPredictor
from tests.support.method import CHUNKS, prompt_parts, sharp_model


@pytest.fixture(scope="session")
def model() -> MaskPredictor:
    return sharp_model()


@pytest.fixture(scope="session")
def parts() -> tuple[list[int], list[int], list[int]]:
    return prompt_parts()


@pytest.fixture(scope="session")
def prompt(parts: tuple[list[int], list[int], list[int]]) -> ChunkedPrompt:
    return chunk_prompt(*parts, CHUNKS)
