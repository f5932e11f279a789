"""``maskgit export``: writes a checkpoint as a pretrained folder, or a model for ONNX, PyTorch or diffusers."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from maskgit_pl.runs.exporting import export
from maskgit_pl.runs.recipe_files import STAGES

__all__ = ["add_parser", "run"]

_GRAPH_FORMATS = {  # module of each format, with ``export_graphs``
    "onnx": "maskgit_pl.contrib.graph_export",
    "pt2": "maskgit_pl.contrib.graph_export",
}
_OF_CHECKPOINTS = ("stage", "step", "data")  # flags of the format ``pretrained``


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
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
