"""``maskgit models``: lists the models that commands can load, and those that can be imported."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from maskgit_pl.cli.tables import add_json_argument, print_rows
from maskgit_pl.image_format import CHANNELS, pixels_text
from maskgit_pl.importers.files import TOKENIZER_LAYOUTS
from maskgit_pl.pipeline.bundled import bundled_models
from maskgit_pl.runs.units import count_text

__all__ = ["add_parser", "run"]

_IMPORTED = Path("pretrained")  # folder of the examples of the importers
_TOKENIZER = "maskgit import-tokenizer FILE --out pretrained/NAME"
_TRANSFORMER = "maskgit import-transformer FILE --tokenizer DIR/tokenizer --out pretrained/NAME"
_RELEASED = (  # project, content, command
    (
        "google-research/maskgit",
        "ImageNet 256 and 512, JAX",
        "maskgit import-jax --tokenizer FILE --transformer FILE --out pretrained/NAME",
    ),
    *((layout, "tokenizer", _TOKENIZER) for layout in TOKENIZER_LAYOUTS),
    ("Halton-MaskGIT", "transformer, ImageNet 256 and 384", _TRANSFORMER),
    ("MaskGIL", "transformer, ImageNet 256", _TRANSFORMER),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "models",
        help="list the models that commands can load, and how to get others",
        description="List the models of the package, of runs/ and of pretrained/, and the released models that can be "
        "imported, each with a command.",
        epilog="Example: maskgit models --json",
    )
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    runs = sorted(args.runs_folder.glob("*/pretrained"))
    places = [
        *((name, folder, "package") for name, folder in bundled_models().items()),
        *((str(folder.parent), folder, "run") for folder in runs),
        *((str(folder), folder, "folder") for folder in sorted(_IMPORTED.glob("*"))),
    ]
    rows = [_row(name, folder, origin) for name, folder, origin in places if (folder / "tokenizer").is_dir()]
    rows += [_row_of(name, "released elsewhere", content, command) for name, content, command in _RELEASED]
    print_rows(rows, as_json=args.json)
    return 0


def _row(name: str, folder: Path, origin: str) -> dict[str, str]:
    """Describes a pretrained folder with a tokenizer, and mostly a transformer."""
    from maskgit_pl.pipeline.outline import Outline  # takes a moment

    outline = Outline.read(folder)
    if outline is not None:
        colours = CHANNELS[outline.channels]
        sizes = f"{pixels_text(outline.image_size)} {colours}, {outline.num_tokens} tokens"
        content = f"{sizes}, {count_text(len(outline.class_names), 'class')}"
        return _row_of(name, origin, content, shlex.join(["maskgit", "sample", name]))
    if (folder / "transformer").is_dir():
        return _row_of(name, origin, "cannot be read", shlex.join(["maskgit", "sample", name]))
    train = ["maskgit", "train", "transformer", "--tokenizer", str(folder / "tokenizer")]
    return _row_of(name, origin, "tokenizer", shlex.join(train))


def _row_of(name: str, origin: str, content: str, command: str) -> dict[str, str]:
    return {"model": name, "from": origin, "content": content, "command": command}
