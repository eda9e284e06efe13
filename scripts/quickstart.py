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
from pathlib import Path

import make_small

from convert import convert
from pdllm_jax import (
    Answer,
    ChunkConfig,
    DecodeConfig,
    Engine,
    SelectionConfig,
    Tokenizer,
    load_config,
    load_model,
)
from pdllm_jax.compilation import cache_folder, enable_compilation_cache
from pdllm_jax.storage.manifest import MANIFEST

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "examples" / "persuasion.txt"
CHARACTERS = 28_623  # of it, 6,391 tokens with what is planted
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
    """Returns the converted small model; assembles and converts it on first use."""
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
        convert(pytorch, folder)
    return folder


def say(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


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
    lines = []
    for i, score in enumerate(scores):
        length = round(width * (score - low) / (high - low or 1))
        mark = "  kept" if i in kept else ""
        lines.append(f"  chunk {i:2}  {score:8.4f}  {'█' * length:{width}}{mark}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Asks the three questions; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plain", action="store_true", help="also time an evaluation of plain LLaDA on the prompt"
    )
    try:
        return run(parser.parse_args(argv).plain)
    except KeyboardInterrupt:
        return 130


def run(plain: bool) -> int:
    """Encodes the document once, asks three questions; returns the exit status."""
    start = time.perf_counter()

    def clock() -> str:
        return f"{time.perf_counter() - start:.0f} s"

    enable_compilation_cache()
    folder = checkpoint()
    tokenizer = Tokenizer.load(folder, load_config(folder))
    model = load_model(folder, dtype="float32")
    engine = Engine(model, tokenizer, chunking=CHUNKING, selection=SELECTION, decoding=DECODE)
    text = plant(DOCUMENT.read_text(encoding="utf-8")[:CHARACTERS])
    print(f"the model is ready after {clock()}", flush=True)
    document = engine.encode(text)
    document.lengths.block_until_ready()
    tokens = len(tokenizer.encode(text))
    print(f"document: the beginning of Persuasion, {tokens} tokens, encoded once: {clock()}\n")

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
