#!/usr/bin/env python3
"""The whole method on this machine: a small model is assembled, converted and asked about a novel.

The document is the beginning of Jane Austen's Persuasion (public domain; not among the model's
training texts), 6,391 tokens, with one sentence planted at each of three depths. It is encoded once
and asked three questions. For every answer the script shows the chunks' scores and the time.

  scripts/quickstart.py [--plain]          or: make quickstart

Exit status: 0; 1 if an answer is wrong; 130 when interrupted, after which it starts again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

START = time.perf_counter()  # before the imports that take seconds

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import make_small  # noqa: E402
import numpy as np  # noqa: E402
from bench.record import replace  # noqa: E402
from flax import nnx  # noqa: E402
from jax.stages import Lowered  # noqa: E402

from convert import convert  # noqa: E402
from pallas_kernels import resolve_implementation  # noqa: E402
from pdllm_jax import (  # noqa: E402
    Answer,
    ChunkConfig,
    DecodeConfig,
    Engine,
    MaskPredictor,
    ModelConfig,
    SelectionConfig,
    Tokenizer,
    denoise,
    encode_document,
    init_denoise,
    load_config,
    load_model,
    score_chunks,
    select_top_k,
)
from pdllm_jax.compilation import (  # noqa: E402
    cache_folder,
    compile_quickly_on_cpu,
    enable_compilation_cache,
)
from pdllm_jax.engine.request import document_prompt, question_prompt, request_keys  # noqa: E402
from pdllm_jax.method.scorers import Question  # noqa: E402
from pdllm_jax.method.scorers.calibration import HEADS_FILE  # noqa: E402
from pdllm_jax.method.scoring import draft_response  # noqa: E402
from pdllm_jax.storage.manifest import MANIFEST  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "examples" / "persuasion.txt"
CHARACTERS = 28_623  # of it, 6,391 tokens with what is planted
ADAPTER = ROOT / "small_model" / "adapter.safetensors"
HEADS = ROOT / "small_model" / HEADS_FILE

log = partial(print, file=sys.stderr, flush=True)
# (depth, key, value): neither words nor numbers are in the training data.
PLANTED = (
    (0.12, "elegant-balloon", "4815162"),
    (0.50, "glorious-badger", "9072235"),
    (0.87, "gentle-apricot", "3391748"),
)
CHUNKING = ChunkConfig(chunk_size=512)
SELECTION = SelectionConfig(top_k=4, encode_batch=2)
DECODE = DecodeConfig(gen_length=32, block_length=32, threshold=0.9)
# Lengths that programs are compiled for before there is a tokenizer: of the document, the prefix
# and a question. With a wrong one the answers are the same and the programs are compiled twice.
LENGTHS = (6391, 20, 20)


def checkpoint() -> Path:
    """Returns the converted small model with its retrieval heads.

    Assembles and converts it on first use.
    """
    adapter = ADAPTER.stat()
    name = f"small-{adapter.st_size:x}-{int(adapter.st_mtime):x}"
    pytorch, folder = cache_folder() / "pytorch" / name, cache_folder() / "converted" / name
    if not (folder / MANIFEST).is_file():
        if not pytorch.is_dir():
            log("assembling the small model: SmolLM2-135M and the adapter of this repository")
            downloads = cache_folder() / "downloads"
            make_small.build(pytorch, gguf=None, adapter=ADAPTER, dtype="bfloat16", cache=downloads)
        log(f"converting {pytorch} to Orbax ({clock()})")
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert(pytorch, folder)
    if not (folder / HEADS_FILE).exists():
        replace(folder / HEADS_FILE, HEADS.read_text(encoding="utf-8"))
    return folder


def on_device(shapes: Any) -> Any:
    """Returns the shapes of arrays that are bound to the device, as a loaded model's are.

    What a program computes from such arrays is bound too. XLA takes a program for bound arguments
    for another one, which it would compile again.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def programs() -> list[Callable[[], Lowered]]:
    """Returns functions that lower the programs of the engine below from shapes alone."""
    from small_model.base import BOS_ID, CONFIG

    config = ModelConfig.from_dict(CONFIG)
    shapes = nnx.eval_shape(lambda: MaskPredictor(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    model = on_device(shapes)
    tokens, prefix, query = (np.zeros(length, np.int32) for length in LENGTHS)
    prompt = document_prompt(prefix, tokens, CHUNKING, BOS_ID)
    group, scoring = {"encode_batch": SELECTION.encode_batch}, SELECTION.scoring()
    sizes = {"head_size": config.head_dim, "chunk_size": CHUNKING.chunk_size}
    path = resolve_implementation(None, dtype=jnp.dtype("float32"), **sizes)
    document = on_device(jax.eval_shape(lambda *x: encode_document(*x, **group), model, prompt))
    asked = jax.eval_shape(lambda x: question_prompt(x, [query], 1), document)
    instruction, length = on_device((asked.prefix, asked.prefix_length))
    question = Question(instruction, length, asked.query, asked.query_length)
    keys = jax.eval_shape(lambda: request_keys([0], 1))
    draft = on_device(jax.eval_shape(lambda *x: draft_response(*x, scoring), model, question))
    scored = {"query_length": question.query_length, "draft": draft, "key": keys, "oracle": None}
    scores = jax.ShapeDtypeStruct((1, prompt.chunks.shape[1]), jnp.float32)
    selection = on_device(jax.eval_shape(lambda x: select_top_k(x, SELECTION.top_k), scores))
    started = model, document, selection, question.query, DECODE, keys
    settings = {"query_length": question.query_length, "settings": SELECTION}

    def decode() -> Lowered:
        state = on_device(init_denoise.eval_shape(*started, **settings, implementation=None))
        options = {"config": DECODE, "implementation": path, "settings": None}
        return denoise.lower(model, None, state, **options)

    asking = model, document, question.query, scoring
    return [
        lambda: encode_document.lower(model, prompt, **group),
        lambda: draft_response.lower(model, question, scoring),
        lambda: score_chunks.lower(*asking, **scored, implementation=None),
        lambda: init_denoise.lower(*started, **settings, implementation=None),
        decode,
    ]


def clock() -> str:
    """Returns the seconds since the script started, and the seconds of all processors."""
    return f"{time.perf_counter() - START:.0f} s, {time.process_time():.0f} s of processors"


def plant(text: str) -> str:
    """Returns the document with its three sentences, each after a sentence next to its depth."""
    for depth, key, value in reversed(PLANTED):
        place = text.index(". ", int(depth * len(text))) + 1
        text = f"{text[:place]} The magic number for {key} is {value}.{text[place:]}"
    return text


def bars(answer: Answer, width: int = 30) -> str:
    """Returns the chunk scores as a bar chart; the lowest has no bar."""
    assert answer.selection is not None
    scores, kept = answer.selection["scores"], answer.selection["chunks"]
    low, high = min(scores), max(scores)
    lengths = [round(width * (score - low) / (high - low or 1)) for score in scores]
    return "\n".join(
        f"  chunk {i:2}  {score:8.4f}  {'█' * length:{width}}{'  kept' if i in kept else ''}"
        for i, (score, length) in enumerate(zip(scores, lengths, strict=True))
    )


def main(argv: list[str] | None = None) -> int:
    """Asks the three questions; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    timed = "also time an evaluation of plain LLaDA on the prompt"
    parser.add_argument("--plain", action="store_true", help=timed)
    try:
        return run(parser.parse_args(argv).plain)
    except KeyboardInterrupt:
        return 130


def run(plain: bool) -> int:
    """Encodes the document once, asks three questions; returns the exit status."""
    enable_compilation_cache()
    compile_quickly_on_cpu()
    threads = ThreadPoolExecutor(2)
    try:
        compiled = [threads.submit(lambda f: f().compile(), lower) for lower in programs()]
        folder = checkpoint()
        tokenizer = Tokenizer.load(folder, load_config(folder))
        model = load_model(folder, dtype="float32")
        engine = Engine(model, tokenizer, chunking=CHUNKING, selection=SELECTION, decoding=DECODE)
        text = plant(DOCUMENT.read_text(encoding="utf-8")[:CHARACTERS])
        print(f"the model is ready after {clock()}", flush=True)
        compiled[0].result()
        document = jax.block_until_ready(engine.encode(text))
        tokens = len(tokenizer.encode(text))
        encoded = f"the beginning of Persuasion, {tokens} tokens, encoded once"
        print(f"document: {encoded}: {clock()}\n", flush=True)
        for program in compiled:
            program.result()
    finally:
        threads.shutdown(cancel_futures=True)

    wrong = 0
    for depth, key, value in PLANTED:
        question = f"What is the magic number for {key}?"
        answer = engine.ask(document, [question])[0]
        right = value in (answer.text or "")
        wrong += not right
        print(f"Q  {question}   (answer planted at {depth:.0%})")
        print(f"A  {answer.text}   {'right' if right else f'WRONG, expected {value}'}")
        print(bars(answer))
        phases = ", ".join(f"{name} {answer.timings[name]:.1f} s" for name in answer.timings)
        print(f"  {answer.evaluations} evaluations; {phases}; answered at {clock()}\n", flush=True)

    if plain:
        once = DecodeConfig(gen_length=32, block_length=32, steps=1)
        baseline = Engine(model, tokenizer, decoding=once, method="plain").answer(text, question)
        print(
            f"plain LLaDA, one evaluation of the same prompt: {baseline.timings['decode']:.2f} s; "
            f"its published generation makes 32"
        )
    print(f"{clock()} in all, {len(PLANTED) - wrong} of {len(PLANTED)} right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
