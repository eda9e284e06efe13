#!/usr/bin/env python3
"""The whole method on this machine: assemble and convert the small model, then ask about a novel.

The document is the beginning of Jane Austen's Persuasion (public domain; not among the model's
training texts), with one sentence planted at each of three depths. For every question it shows the
answer, the chunks' scores and where the time went, beside what plain LLaDA takes for a single
evaluation of the same prompt.

  scripts/quickstart.py                    or: make quickstart

Exit status: 0; 1 if an answer is wrong; 130 when interrupted, after which it begins anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import make_small
from tqdm import tqdm

from convert import convert
from pdllm_jax import (
    ChunkConfig,
    DecodeConfig,
    SelectionConfig,
    Tokenizer,
    load_config,
    load_model,
)
from pdllm_jax.compilation import cache_folder, enable_compilation_cache
from pdllm_jax.deprecated import generate
from pdllm_jax.engine.answer import Answer
from pdllm_jax.storage.checkpoint import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "examples" / "persuasion.txt"
CHARACTERS = 28_623  # of it, about 6,300 tokens
ADAPTER = ROOT / "small_model" / "adapter.safetensors"

# (depth, key, value): neither words nor numbers are in the training data.
PLANTED = (
    (0.12, "elegant-balloon", "4815162"),
    (0.50, "glorious-badger", "9072235"),
    (0.87, "gentle-apricot", "3391748"),
)
CHUNKING = ChunkConfig(chunk_size=512)
SELECTION = SelectionConfig(top_k=4, encode_batch=2)
DECODE = DecodeConfig(gen_length=32, block_length=32, threshold=0.9)


def checkpoint() -> Path:
    """The small model, assembled and converted on first use."""
    adapter = ADAPTER.stat()
    name = f"small-{adapter.st_size:x}-{int(adapter.st_mtime):x}"
    pytorch, folder = cache_folder() / "pytorch" / name, cache_folder() / "converted" / name
    if not (folder / MANIFEST).is_file():
        if not pytorch.is_dir():
            say("assembling the small model: SmolLM2-135M and the adapter of this repository")
            make_small.build(
                pytorch, gguf=None, adapter=ADAPTER, dtype="bfloat16",
                cache=cache_folder() / "downloads",
            )  # fmt: skip
        say(f"converting {pytorch} to Orbax")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            convert(pytorch, folder, progress=lambda _, done, total: advance(bar, done, total))
    return folder


def advance(bar: tqdm, done: int, total: int) -> None:
    """Moves a progress bar by `done` bytes."""
    bar.total = total
    bar.update(done)


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def plant(text: str) -> str:
    """The document with its three sentences, each behind the sentence end next to its depth."""
    for depth, key, value in reversed(PLANTED):
        place = text.index(". ", int(depth * len(text))) + 1
        text = f"{text[:place]} The magic number for {key} is {value}.{text[place:]}"
    return text


def bars(result: Answer, width: int = 30) -> str:
    """Chunk scores as a bar chart; the lowest has no bar."""
    assert result.selection is not None
    scores, kept = result.selection["scores"], result.selection["chunks"]
    low, high = min(scores), max(scores)
    lines = []
    for i, score in enumerate(scores):
        length = round(width * (score - low) / (high - low or 1))
        mark = "  kept" if i in kept else ""
        lines.append(f"  chunk {i:2}  {score:8.4f}  {'█' * length:{width}}{mark}")
    return "\n".join(lines)


def split(result: Answer) -> str:
    """Seconds by phase."""
    phases = ("draft", "score", "encode", "decode")
    used = sum(result.timings[phase] for phase in phases)
    parts = ", ".join(f"{phase} {result.timings[phase]:.2f}" for phase in phases)
    return f"{used:.2f} s ({parts}; compiling apart: {result.timings['compile']:.2f})"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    try:
        return ask()
    except KeyboardInterrupt:
        return 130


def ask() -> int:
    """Asks the three questions; the exit status."""
    started = time.perf_counter()
    enable_compilation_cache()
    folder = checkpoint()
    tokenizer = Tokenizer.load(folder, load_config(folder))
    model = load_model(folder, dtype="float32")
    document = plant(DOCUMENT.read_text(encoding="utf-8")[:CHARACTERS])
    tokens = len(tokenizer.encode(document))
    print(f"document: the beginning of Persuasion, {tokens} tokens, three sentences planted in it")
    print(f"ready after {time.perf_counter() - started:.0f} s\n")

    wrong = 0
    evaluations = 0
    for depth, key, value in PLANTED:
        question = f"What is the magic number for {key}?"
        result = generate(
            model, tokenizer, context=document, question=question,
            chunking=CHUNKING, selection=SELECTION, decode=DECODE,
        )  # fmt: skip
        right = value in (result.text or "")
        wrong += not right
        evaluations = result.evaluations
        print(f"Q  {question}   (answer planted at {depth:.0%})")
        print(f"A  {result.text}   {'right' if right else f'WRONG, expected {value}'}")
        print(bars(result))
        print(f"  {result.evaluations} evaluations, {split(result)}\n", flush=True)

    once = DecodeConfig(gen_length=32, block_length=32, steps=1)
    plain = generate(
        model, tokenizer, context=document, question=question, method="plain", decode=once
    )
    print(
        f"plain LLaDA, one evaluation of the same prompt: {plain.timings['decode']:.2f} s; its "
        f"published generation makes 32; the last answer above took {evaluations} on the cache"
    )
    print(f"{time.perf_counter() - started:.0f} s in all, {len(PLANTED) - wrong} of 3 right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
