"""``maskgit import-jax``, ``import-tokenizer`` and ``import-transformer``: convert checkpoints that others released.

Each writes a pretrained folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import check_at_least
from maskgit_pl.importers.files import (
    TOKENIZER_LAYOUTS,
    check_flax_file,
    check_out,
    check_torch_file,
    find_weights,
    read_class_names,
)

__all__ = ["add_import_jax_parser", "add_import_tokenizer_parser", "add_import_transformer_parser"]


def add_import_jax_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-jax",
        help="convert released JAX checkpoints to a pretrained folder",
        description="Convert checkpoints of google-research/maskgit to a pretrained folder. Nothing in them is "
        "executed.",
        epilog="Example: maskgit import-jax --tokenizer tokenizer_imagenet256_checkpoint --transformer "
        "maskgit_imagenet256_checkpoint --out pretrained/imagenet256",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="such as tokenizer_imagenet256_checkpoint"
    )
    parser.add_argument("--transformer", type=Path, metavar="FILE", help="such as maskgit_imagenet256_checkpoint")
    _add_out_argument(parser)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="256|512",
        help="side of the images in pixels (default: from the transformer's grid; 256 without a transformer)",
    )
    _add_class_names_argument(parser)
    parser.set_defaults(run=_run_import_jax)


def _run_import_jax(args: argparse.Namespace) -> int:
    """Reads the checkpoints, checks them and writes the folder."""
    check_out(args.out)
    check_flax_file(args.tokenizer)
    if args.transformer is not None:
        check_flax_file(args.transformer)
    class_names = _read_class_names_flag(args)
    from maskgit_pl.importers.released import import_jax

    import_jax(
        args.tokenizer, args.out, transformer=args.transformer, image_size=args.image_size, class_names=class_names
    )
    return 0


def add_import_tokenizer_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-tokenizer",
        help="convert a released tokenizer, such as taming-transformers' or MaskBit's",
        description=f"Convert a tokenizer of {', '.join(TOKENIZER_LAYOUTS)} to DIR/tokenizer, and print what was read. "
        "Nothing in the checkpoint is executed.",
        epilog="Example: maskgit import-tokenizer vqgan_imagenet_f16_1024.ckpt --out pretrained/taming",
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="checkpoint: .ckpt, .pt, .bin or .safetensors, or a folder that diffusers saved",
    )
    _add_out_argument(parser, "pretrained folder; DIR/tokenizer is written")
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PIXELS", help="side of the images in pixels (default: 256)"
    )
    parser.add_argument(
        "--layout",
        choices=TOKENIZER_LAYOUTS,
        help="project that wrote the file (default: by the names of its tensors); IBQ and taming-transformers have the "
        "same names",
    )
    parser.add_argument(
        "--signed-images",
        action=argparse.BooleanOptionalAction,
        help="the network expects images in [-1, 1]; with --no-signed-images, in [0, 1] (default: as in the published "
        "networks; only those of taming-transformers, LlamaGen, diffusers and IBQ have the choice)",
    )
    parser.set_defaults(run=_run_import_tokenizer)


def _run_import_tokenizer(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints a report."""
    check_out(args.out)
    check_torch_file(find_weights(args.file))
    check_at_least(args, image_size=1)
    from maskgit_pl.importers.tokenizers import import_tokenizer

    imported = import_tokenizer(
        args.file, args.out, image_size=args.image_size, layout=args.layout, signed_images=args.signed_images
    )
    print(imported.report(args.image_size))
    return 0


def add_import_transformer_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-transformer",
        help="convert a transformer of Halton-MaskGIT or MaskGIL",
        description="Convert a transformer of Halton-MaskGIT or MaskGIL and its tokenizer to a pretrained folder, and "
        "print what was read. Nothing in the checkpoint is executed.",
        epilog="Example: maskgit import-transformer ImageNet_384_large.pth --tokenizer pretrained/llamagen "
        "--out pretrained/halton-384",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint, such as ImageNet_384_large.pth")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of its tokenizer, as maskgit import-tokenizer writes it",
    )
    _add_out_argument(parser)
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads, for a network of another size than the published ones",
    )
    _add_class_names_argument(parser)
    parser.set_defaults(run=_run_import_transformer)


def _run_import_transformer(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints a report."""
    check_out(args.out)
    check_torch_file(args.file)
    check_at_least(args, num_heads=1)
    names = _read_class_names_flag(args)
    from maskgit_pl.importers.transformers import import_transformer

    imported = import_transformer(
        args.file, args.out, tokenizer=args.tokenizer, num_heads=args.num_heads, class_names=names
    )
    print(imported.report())
    return 0


def _add_out_argument(parser: argparse.ArgumentParser, text: str = "pretrained folder to write") -> None:
    """Adds ``--out``, which ``check_out`` checks."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)


def _add_class_names_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--class-names``, which ``_read_class_names_flag`` reads."""
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="file with one class name per line (default: ImageNet's names for 1000 classes, else numbers)",
    )


def _read_class_names_flag(args: argparse.Namespace) -> list[str] | None:
    """Returns the class names of ``--class-names``, or None without it."""
    return None if args.class_names is None else read_class_names(args.class_names)
