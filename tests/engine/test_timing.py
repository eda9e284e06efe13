"""Phases of a request, timed in threads that compile at the same time."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp

from pdllm_jax.engine.request import Timer


def test_a_thread_counts_what_it_compiles_itself():
    """Two phases at once that end in the order in which they began; one of them compiles."""
    began, compiled = threading.Event(), threading.Event()
    idle, busy = Timer(), Timer()

    def wait() -> None:
        with idle.phase("wait"):
            began.set()
            assert compiled.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert began.wait(60)
    with busy.phase("work"):
        jax.block_until_ready(jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)))
        compiled.set()
        thread.join()
    assert not thread.is_alive()
    assert busy.seconds["compile"] > 0
    assert idle.seconds["compile"] == 0
    assert idle.seconds["wait"] >= busy.seconds["compile"]
