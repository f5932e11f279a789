"""``maskgit import-taming``: a tokenizer of taming-transformers or LlamaGen as a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.importers.files import check_out, torch_file

if TYPE_CHECKING:
    from maskgit_pl.importers.taming import ImportedTokenizer

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-taming", help="import a tokenizer of taming-transformers or LlamaGen", allow_abbrev=False
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="its .ckpt, .pt or .safetensors file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pretrained folder: DIR/tokenizer is made"
    )
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="edge of the images (default: 256)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Imports, and says what came of it.

    Raises:
        FileNotFoundError: No such file.
        FileExistsError: ``--out`` is there.
        ValueError: The file is no such tokenizer, or the size does not fit.
    """
    check_out(args.out)
    torch_file(args.file)
    if args.size < 1:
        raise ValueError(f"--size: at least 1 is needed, got {args.size}")
    from maskgit_pl.importers.taming import import_taming

    print(_report(import_taming(args.file, args.out, image_size=args.size), size=args.size))
    return 0


def _report(made: ImportedTokenizer, *, size: int) -> str:
    config = made.config
    rows, columns = config.grid(size)
    levels = "".join(f"level {level} and " for level in config.attention_levels)
    return "\n".join(
        [
            f"{made.folder}: {made.layout} layout, {made.num_parameters:,} parameters",
            f"  images    {config.in_channels} x {size} x {size} -> {rows} x {columns} tokens",
            f"  codebook  {config.num_codes} codes of width {config.code_width}",
            f"  network   widths {' '.join(map(str, config.widths))}, {config.blocks_per_level} blocks a level, "
            f"self-attention in {levels}the middle",
            f"  ignored   {', '.join(made.ignored) or 'nothing'}",
            f"next: make train-transformer DATASET=... RECIPE=paper-256 TOKENIZER={made.folder}",
        ]
    )
