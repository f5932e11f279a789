"""``maskgit export`` and ``push``: write a model for this or other programs, and upload it to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import print_rows
from maskgit_pl.errors import printable
from maskgit_pl.files import size_text
from maskgit_pl.runs.fitting import export
from maskgit_pl.runs.recipe import STAGES

if TYPE_CHECKING:
    from maskgit_pl.runs.pushing import Push

__all__ = ["add_export_parser", "add_push_parser"]

_GRAPH_FORMATS = {  # module of each format, with ``export_graphs``
    "onnx": "maskgit_pl.contrib.graph_export",
    "pt2": "maskgit_pl.contrib.graph_export",
}
_OF_CHECKPOINTS = ("stage", "step", "data")  # flags of the format ``pretrained``


def add_export_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "export",
        help="write the EMA weights of a checkpoint as a pretrained folder, or a model for ONNX, PyTorch or diffusers",
        description="Write the EMA weights of a checkpoint as a pretrained folder (safetensors and JSON), as training "
        "does at its end. Reads checkpoints of any number of ranks, on one CPU. With --format onnx or pt2, write a "
        "pretrained model as files that other programs run without this package: decoder and encoder of the "
        "tokenizer, the logits of the transformer, and export.json. Each file is loaded and compared with this "
        "package before the folder appears. With --format diffusers, write a folder that DiffusionPipeline loads and "
        "that uses this package; its images are compared in the same way.",
        epilog="Example: maskgit export fashion-mnist-demo --format onnx --out exported",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="run folder (runs/NAME); with a --format also a pretrained folder, a model of the package or OWNER/NAME",
    )
    parser.add_argument(
        "--format",
        choices=("pretrained", *_GRAPH_FORMATS, "diffusers"),
        default="pretrained",
        help="pretrained: safetensors and JSON; onnx: ONNX Runtime and others; pt2: torch.export.load; diffusers: "
        "DiffusionPipeline of Hugging Face (default: pretrained)",
    )
    parser.add_argument(
        "--stage", choices=STAGES, help="export only this stage (default: every stage that has a checkpoint)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder, if it has moved since the training")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: RUN/pretrained; required with a --format)"
    )
    parser.add_argument("--replace", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    """Exports the checkpoint or the model.

    Raises:
        ValueError: if a flag does not belong to the format, or ``--out`` is missing.
    """
    if args.format == "pretrained":
        export(args.folder, stage=args.stage, step=args.step, data=args.data, out=args.out, replace=args.replace)
        return 0
    for name in _OF_CHECKPOINTS:
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name} must be left out with --format {args.format}, which reads a pretrained folder; write one "
                f"first, with --{name} and another --out"
            )
    if args.out is None:
        raise ValueError(f"--out must name the folder to write with --format {args.format}, such as --out exported")
    if args.format == "diffusers":
        from maskgit_pl.pipeline.diffusers_export import export_diffusers  # torch takes seconds to import

        export_diffusers(args.folder, args.out, replace=args.replace)
        load = f"DiffusionPipeline.from_pretrained({str(args.out)!r}, trust_remote_code=True)"
        print(f"{args.out}: load it with {load}")
        return 0
    graph_export = import_module(_GRAPH_FORMATS[args.format])
    content = graph_export.export_graphs(args.folder, args.out, kind=args.format, replace=args.replace)
    print(f"{args.out}: export.json and {len(content['graphs'])} graphs")
    return 0


def add_push_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "push",
        help="upload a pretrained folder with its model card to the Hugging Face Hub",
        description="Upload a pretrained folder with its model card to the Hugging Face Hub, in one commit. The name, "
        "every file and every weight are checked first. MaskGIT.from_pretrained and all commands load it by its name. "
        "Log in with `hf auth login`, or set HF_TOKEN.",
        epilog="Example: maskgit push runs/fashion-mnist-adaln alice/maskgit-fashion --license apache-2.0 --dry-run",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="run, pretrained folder, or model of the package, such as fashion-mnist-demo",
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository, created if it does not exist")
    parser.add_argument(
        "--dry-run", action="store_true", help="only check, list the files and show the card; asks no network"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--license", metavar="NAME", help="license of the weights, such as apache-2.0 (default: that of the card)"
    )
    parser.set_defaults(run=_run_push)


def _run_push(args: argparse.Namespace) -> int:
    """Checks the folder, and uploads it or shows what would be uploaded."""
    from maskgit_pl.runs.pushing import plan_push, push  # torch takes seconds to import

    plan = plan_push(args.folder, args.repository, license=args.license)
    if args.dry_run:
        _show(plan, private=args.private)
    else:
        print(push(plan, private=args.private))
    return 0


def _show(plan: Push, *, private: bool) -> None:
    """Prints the files with size and digest, then the card."""
    visibility = "private" if private else "public"
    total = size_text(sum(each.num_bytes for each in plan.files))
    print(f"{plan.hub_id} ({visibility}): {len(plan.files)} files, {total}; nothing is uploaded (--dry-run)\n")
    rows = [{"file": each.path, "bytes": each.num_bytes, "sha256": each.sha256} for each in plan.files]
    print_rows(rows, as_json=False)
    print()
    for line in plan.card.splitlines():  # may be of somebody else: no control characters
        print(printable(line, limit=None))
