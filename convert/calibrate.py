"""Finds a checkpoint's retrieval heads, for the scorer "heads", and saves them in its folder.

    pdllm-calibrate CHECKPOINT [--lengths N ...] [--chunk-sizes N ...] [--examples N] [--seed N]
                    [--text FILE ...] [--heads N] [--layers M] [--overwrite] [--picture FILE] ...
    scripts/calibrate.py ...    the same, from a clone

CHECKPOINT is a converted folder, or a PyTorch folder, which is converted into a cache folder on
first use. Needles with random keys are planted in public-domain prose (Northanger Abbey, or
--text) and asked for with the checkpoint's chat template. retrieval_heads.json gets the heads that
find them best, with the figures that chose them. docs/performance-guide.md says how.

Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from convert.__main__ import converted
from pdllm_jax.cli import flags
from pdllm_jax.cli.commands import load
from pdllm_jax.cli.errors import Parser, leave, seed, status
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.engine.engine import Engine
from pdllm_jax.evaluation.calibration import (
    Calibration,
    Shares,
    check_choice,
    check_destination,
    choose_heads,
    measure,
    plan_needles,
)
from pdllm_jax.evaluation.needles import Prose
from pdllm_jax.method.scorers.calibration import SAME
from pdllm_jax.rules import size
from pdllm_jax.storage.checkpoint import load_config
from pdllm_jax.storage.fingerprint import model_identity
from pdllm_jax.tokenizer import Tokenizer


def parser() -> argparse.ArgumentParser:
    """CHECKPOINT, then flags."""
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(prog="pdllm-calibrate", description=__doc__, formatter_class=raw)
    add: Any = p.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path)
    default = "(default: %(default)s)"
    numbers = {"nargs": "+", "type": int, "metavar": "N"}
    text = f"tokens of the documents {default}"
    add("--lengths", default=[4096, 8192, 16384], help=text, **numbers)
    text = f"tokens of a chunk; pairs with a length of 4 chunks or more are used {default}"
    add("--chunk-sizes", default=[256, 512, 1024], help=text, **numbers)
    add("--examples", type=int, default=96, metavar="N", help=f"of all pairs together {default}")
    add("--seed", type=seed, default=0, metavar="N", help=f"of all randomness {default}")
    text = "UTF-8 prose for the documents, instead of Northanger Abbey"
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    add("--heads", type=int, default=4, metavar="N", help=f"most heads chosen {default}")
    text = (
        "most layers that a score may take; fewer are chosen where they do as well (default: all)"
    )
    add("--layers", type=int, metavar="M", help=text)
    add("--overwrite", action="store_true", help="replace an earlier calibration")
    text = "draw the recall of every head (PNG, SVG or PDF; needs matplotlib)"
    add("--picture", type=Path, metavar="FILE", help=text)
    flags.add_fields(p, flags.SelectionConfig, ("encode_batch",))
    flags.add_placement(p)
    return p


def calibrate(args: argparse.Namespace) -> None:
    """Measures, chooses, saves, and prints what was chosen."""
    check_choice(args.examples, args.heads)
    numbers = {"lengths": args.lengths, "chunk-sizes": args.chunk_sizes}
    for name, values in {**numbers, "layers": [1 if args.layers is None else args.layers]}.items():
        for value in values:
            size(f"--{name}", value)
    if args.picture is not None:
        _check_picture(args.picture)
    folder = converted(args.checkpoint)
    config = load_config(folder)
    if args.layers is not None and args.layers > config.n_layers:
        raise ValueError(f"--layers {args.layers}: the model has {config.n_layers}")
    check_destination(folder, overwrite=args.overwrite)
    selection = flags.from_args(flags.SelectionConfig, args)
    tokenizer = Tokenizer.load(folder, config)
    prose = Prose.read(tokenizer, args.text)
    sets = plan_needles(prose, args.lengths, args.chunk_sizes, args.examples, args.seed)
    model = load(args, folder)
    path = args.implementation
    engine = Engine(model, tokenizer, selection=selection, implementation=path)
    parts = []
    with tqdm(total=args.examples, unit="example", disable=None) as bar:
        for chunking, examples in sets:
            cut = dataclasses.replace(engine, chunking=chunking)
            parts.append(measure(cut, examples, done=bar.update))
    shares = Shares.joined(parts)
    found = choose_heads(shares, args.heads, layers=args.layers, seed=args.seed)
    settings = {name: getattr(args, name) for name in ("lengths", "chunk_sizes", "layers", "seed")}
    identity = model_identity(model)
    about = {
        "settings": {**settings, "dtype": identity.dtype},
        "text": {"name": prose.name, "sha256": prose.digest},
        "model": {name: getattr(model.config, name) for name in SAME}
        | {"weights": identity.weights},
    }
    path = found.save(folder, about, overwrite=args.overwrite)
    heads = ", ".join(f"{layer}.{head}" for layer, head in found.heads)
    run = f"the first {found.layers} of {len(found.head_recall)} layers run"
    print(f"{path}: heads (layer.head) {heads}; {run}")
    by = f"by heads that other examples chose; {found.recall_of_all:.1%} by all heads"
    print(f"needle's chunk first: {found.recall:.1%} of {found.examples} examples, {by}")
    if args.picture is not None:
        draw(found, args.picture)


def _check_picture(path: Path) -> None:
    """Raises ValueError where `draw` could not write the picture, before any work."""
    _figure()
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--picture must end with .png, .svg or .pdf, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--picture {path}: its folder does not exist")


def _figure() -> Any:
    """Returns matplotlib's class of figures; ValueError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib") from None
    return Figure


def draw(found: Calibration, path: Path) -> None:
    """Draws the recall of each head by layer, and of the best heads within the first m layers.

    Raises:
      ValueError: matplotlib is not installed, or cannot write such a file.
    """
    layers, heads = found.head_recall.shape
    width = 1.8 + 0.22 * heads
    picture = _figure()(figsize=(width + 2.6, 1.6 + 0.16 * layers), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True, width_ratios=(width, 2.2))
    image = left.imshow(found.head_recall, vmin=0, vmax=1, aspect="auto", origin="lower")
    marks = [head for _, head in found.heads], [layer for layer, _ in found.heads]
    left.scatter(*marks, s=60, facecolors="none", edgecolors="tab:red", linewidths=1.8)
    left.set(xlabel="head", ylabel="layer", title="recall of each head")
    right.plot(found.clarity_by_layers, range(len(found.clarity_by_layers)), marker=".")
    right.axhline(found.layers - 0.5, color="tab:red", linewidth=1)
    right.set(xlim=(0, 1.03), xlabel="clarity", title="best heads up to layer")
    right.grid(alpha=0.3)
    for axis in (left, right):
        axis.title.set_fontsize(9)
    picture.colorbar(image, ax=left)
    picture.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parser().parse_args(argv)
    enable_compilation_cache()
    return status(lambda: calibrate(args), args)


def run() -> NoReturn:
    """Runs `pdllm-calibrate` and ends the process."""
    leave(main())
