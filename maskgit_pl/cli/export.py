"""``maskgit export``, ``push`` and ``import-*``: write, upload and convert models.

A model is written for this or other programs, uploaded to the Hugging Face Hub, or converted from weights
that others released to a pretrained folder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from maskgit_pl import runs
from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder, Run, print_rows
from maskgit_pl.files import sha256_of
from maskgit_pl.importers import LayoutName
from maskgit_pl.runs.recipe import Stage
from maskgit_pl.text import printable, size_text

File = Annotated[Path, Word("FILE")]

_GRAPHS = "maskgit_pl.contrib.graph_export"  # has ``export_graphs``
_PAGE = "maskgit_pl.contrib.web_export"  # has ``export_page``


def export(
    folder: Run,
    *,
    format_: Literal["pretrained", "onnx", "pt2", "web"] = "pretrained",
    stage: Stage | None = None,
    step: int | None = None,
    data: Folder | None = None,
    out: Folder | None = None,
    student: Run | None = None,
    runtime: Folder | None = None,
    replace: bool = False,
) -> None:
    """Writes the EMA weights of a checkpoint as a pretrained folder, or a model for ONNX or PyTorch.

    A pretrained folder has safetensors and JSON, as training writes it at its end. Checkpoints of any number of ranks
    are read, on one CPU. With --format onnx or pt2, a pretrained model becomes files that other programs run without
    this package: decoder and encoder of the tokenizer, the logits of the transformer, and export.json. Each file is
    loaded and compared with this package before the folder appears. With --format web, it becomes a page that generates
    and edits images in the browser, from any web server for files.

    Example: maskgit export fashion-mnist-demo --format onnx --out exported

    Args:
        folder: Run folder (runs/NAME); with a --format also a pretrained folder, a model of the package or OWNER/NAME.
        format_: pretrained: safetensors and JSON; onnx: ONNX Runtime and others; pt2: torch.export.load;
            web: a page for browsers.
        stage: Export only this stage (default: every stage that has a checkpoint).
        step: Step of the checkpoint (default: the newest).
        data: Data folder, if it has moved since the training.
        out: Folder to write (default: RUN/pretrained; required with a --format).
        student: A model distilled from this one, to stand beside it on the page of --format web.
        runtime: Folder dist of the npm package onnxruntime-web, to copy it to the page of --format web (default: the
            page takes it from cdn.jsdelivr.net).
        replace: Replace an earlier export.
    """
    for part, given in (("student", student), ("runtime", runtime)):
        if given is not None and format_ != "web":
            raise ValueError(f"--{part} must be left out with --format {format_}; it is part of --format web")
    if format_ == "pretrained":
        runs.export(folder, stage=stage, step=step, data=data, out=out, replace=replace)
        return
    for name, value in (("stage", stage), ("step", step), ("data", data)):
        if value is not None:
            raise ValueError(
                f"--{name} must be left out with --format {format_}, which reads a pretrained folder; write one first, "
                f"with --{name} and another --out"
            )
    if out is None:
        raise ValueError(f"--out must name the folder to write with --format {format_}, such as --out exported")
    if format_ == "web":
        import_module(_PAGE).export_page(folder, out, student=student, runtime=runtime, replace=replace)
        print(f"{out}: a page; show it with `python -m http.server --directory {out}`")
        return
    content = import_module(_GRAPHS).export_graphs(folder, out, kind=format_, replace=replace)
    print(f"{out}: export.json and {len(content['graphs'])} graphs")


def push(
    folder: Annotated[Path, Word("FOLDER")],
    repository: Annotated[str, Word("OWNER/NAME")],
    *,
    dry_run: bool = False,
    private: bool = False,
    license_: str | None = None,
) -> None:
    """Uploads a pretrained folder with its model card to the Hugging Face Hub.

    All files are sent in one commit. The name, every file and every weight are checked first.
    MaskGIT.from_pretrained and all commands load it by its name. Log in with `hf auth login`, or set HF_TOKEN.

    Example: maskgit push runs/fashion-mnist-adaln alice/maskgit-fashion --license apache-2.0 --dry-run

    Args:
        folder: Run, pretrained folder, or model of the package, such as fashion-mnist-demo.
        repository: Repository, created if it does not exist.
        dry_run: Only check, list the files and show the card; asks no network.
        private: Create a private repository.
        license_: License of the weights as the Hub spells it, such as apache-2.0 (default: that of the card). Only
            the Hub knows all, and checks it at the upload.
    """
    from maskgit_pl.runs import pushing

    plan = pushing.plan_push(folder, repository, license=license_)
    if not dry_run:
        print(pushing.push(plan, private=private))
        return
    rows: list[dict[str, Any]] = [
        {"file": path, "bytes": file.stat().st_size, "sha256": sha256_of(file)} for path, file in plan.files.items()
    ]
    total = size_text(sum(row["bytes"] for row in rows) + len(plan.card.encode()))
    visibility = "private" if private else "public"
    print(f"{repository} ({visibility}): {len(rows) + 1} files, {total}; nothing is uploaded (--dry-run)\n")
    print_rows(rows)
    print("\nCard:\n")
    for line in plan.card.splitlines():  # may be of somebody else: no control characters
        print(printable(line, limit=None))


def import_jax(
    *,
    tokenizer: File,
    transformer: File | None = None,
    out: Folder,
    image_size: Annotated[int, Word("256|512")] = 256,
) -> None:
    """Converts released JAX checkpoints to a pretrained folder.

    They are those of google-research/maskgit. Nothing in them is executed.

    Example: maskgit import-jax --tokenizer tokenizer_imagenet256_checkpoint --transformer
    maskgit_imagenet256_checkpoint --out pretrained/imagenet256

    Args:
        tokenizer: Such as tokenizer_imagenet256_checkpoint.
        transformer: Such as maskgit_imagenet256_checkpoint.
        out: Pretrained folder to write.
        image_size: Side of the images in pixels without a transformer.
    """
    from maskgit_pl.importers import released

    print(released.import_jax(tokenizer, out, transformer=transformer, image_size=image_size))


def import_tokenizer(
    file: File,
    *,
    out: Folder,
    image_size: Annotated[int, Word("PIXELS")] = 256,
    layout: LayoutName | None = None,
) -> None:
    """Converts a released tokenizer, such as taming-transformers' or MaskBit's.

    DIR/tokenizer is written, and what was read is printed. Nothing in the checkpoint is executed.

    Example: maskgit import-tokenizer vqgan_imagenet_f16_1024.ckpt --out pretrained/taming

    Args:
        file: Checkpoint: .ckpt, .pt, .bin or .safetensors, or a folder that diffusers saved.
        out: Pretrained folder; DIR/tokenizer is written.
        image_size: Side of the images in pixels.
        layout: Project that wrote the file (default: by the names of its tensors); IBQ and
            taming-transformers have the same names.
    """
    from maskgit_pl.importers import tokenizers

    print(tokenizers.import_tokenizer(file, out, image_size=image_size, layout=layout))


def import_transformer(
    file: File,
    *,
    tokenizer: Folder,
    out: Folder,
    num_heads: int | None = None,
) -> None:
    """Converts a transformer of Halton-MaskGIT.

    A pretrained folder with it and its tokenizer is written, and what was read is printed. Nothing in the
    checkpoint is executed.

    Example: maskgit import-transformer ImageNet_384_large.pth --tokenizer pretrained/llamagen --out
    pretrained/halton-384

    Args:
        file: Checkpoint, such as ImageNet_384_large.pth.
        tokenizer: Folder of its tokenizer, as maskgit import-tokenizer writes it.
        out: Pretrained folder to write.
        num_heads: Attention heads, for a network of another size than the published ones.
    """
    from maskgit_pl.importers import transformers

    print(transformers.import_transformer(file, out, tokenizer=tokenizer, num_heads=num_heads))
