"""``maskgit inspect``: writes one HTML page that shows how a run trains, and what looks wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from maskgit_pl.cli.arguments import Output
from maskgit_pl.cli.flags import Device, Folder, Run
from maskgit_pl.evaluation.options import Dtype


def inspect(
    folder: Run,
    *,
    data: Folder | None = None,
    out: Annotated[Path, Output(".html")] | None = None,
    num_images: int = 2000,
    device: Device = "cpu",
    dtype: Dtype | None = None,
) -> None:
    """Writes an HTML page about the training of a run.

    The run may still be training. The page is one file and shows what looks wrong and what to try, the logged
    metrics, the use of codes, a picture of each code, and the worst reconstructions.

    Example: maskgit inspect runs/fashion-mnist-adaln

    Args:
        folder: Run folder (runs/NAME), or a pretrained folder.
        data: Data folder (default: that of the run).
        out: Page to write (default: RUN/inspect.html).
        num_images: Measure at most N val images.
        device: cpu, cuda, cuda:1, mps ... (default: cpu)
        dtype: Arithmetic of the tokenizer; auto: bfloat16 on devices with instructions for it, else float32
            (default: auto on a GPU, else that of the weights).
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run {folder}: no such folder; name a run folder, such as runs/NAME")
    from maskgit_pl.contrib.inspect_page import inspect_run  # torch takes seconds to import

    print(inspect_run(folder, data=data, out=out, num_images=num_images, device=device, dtype=dtype))
