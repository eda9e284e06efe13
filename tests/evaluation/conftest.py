"""A tiny checkpoint for the adapter, and requests as lm-eval makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import evals_data, harness

if not harness.INSTALLED:
    harness.import_adapter()
TEMPLATE = "Read this.\n\n{context}\n\nQuestion: {input}\nAnswer:"
ROWS = [
    {"input": f"Where is {name}?", "context": evals_data.TEXT * n, "answers": [name, "Hall e"]}
    for n, name in ((3, "Anne"), (2, "Mary"), (4, "Lyme"))
]


def instance(prompt: str, *args: Any, doc: dict | None = None, task: str = "t") -> Any:
    Instance = harness.Instance
    if harness.INSTALLED:
        from lm_eval.api.instance import Instance

    return Instance("generate_until", doc or {}, (prompt, *args), 0, (task, 0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a converted tiny checkpoint: 512 positions, a vocabulary of bytes."""
    from convert import convert
    from tests.oracles import checkpoints

    config = checkpoints.tiny_config(
        n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, max_sequence_length=512
    )
    source = tmp_path_factory.mktemp("lm_eval") / "pytorch"
    tensors = checkpoints.random_tensors(config)
    checkpoints.write_checkpoint(source, tensors, config, tokenizer=True)
    convert(source, source.parent / "orbax")
    return source.parent / "orbax"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from pdllm_jax.evaluation.lm_eval import PrefillingLM

    return PrefillingLM(
        str(folder), chunk_size=64, top_k=2, encode_batch=4, scorer="last", mc_num=4, mc_batch=4
    )
