"""``export_diffusers``: writes a model as a folder of diffusers, and compares its images with those of ``MaskGIT``."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.data.folders import check_new_folder, write_folder
from maskgit_pl.pipeline.diffusers_pipeline import MaskGITPipeline
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.pretrained import read_decoding, read_negative_model
from maskgit_pl.pipeline.sharing import CLASS_NAME, CLASSES, DIFFUSERS_FILES, INDEX, find_folder

__all__ = ["export_diffusers"]

_FILES = {
    "README.md", "config.json", *DIFFUSERS_FILES,
    *(f"{part}/{name}" for part in CLASSES for name in ("config.json", "model.safetensors")),
}  # fmt: skip
"""The files of a folder."""
_log = logging.getLogger(__name__)


def export_diffusers(model: str | Path, out: str | Path, *, replace: bool = False) -> None:
    """Writes a model as a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads.

    1. Find and load the model.
    2. Write the folder beside ``out``. The decoding settings of ``decoding.json`` become those of the transformer,
       because diffusers does not download that file from the Hub.
    3. Load the folder with diffusers, and compare two images with those of ``MaskGIT``.
    4. Give the folder its name.

    After an error there is no new folder, and an older one is unchanged.

    Args:
        model: Run, pretrained folder, name of a model in the package, or ``owner/name`` on the Hub.
        out: Folder to write.
        replace: True replaces an earlier export in ``out``.

    Raises:
        FileNotFoundError: if there is no such model.
        FileExistsError: if ``out`` has files, and ``replace`` is False or not all are of an earlier export.
        ValueError: if ``out`` cannot be replaced, diffusers is missing, a file is damaged, or the images differ.
    """
    try:
        from maskgit_pl.pipeline.diffusers_pipeline import MaskGITPipeline
    except ImportError as error:
        raise ValueError(
            f"--format diffusers must have the package diffusers, which cannot be imported ({error}); install it with "
            "`pip install 'maskgit_pl[diffusers]'`"
        ) from error
    check = partial(
        check_new_folder, replace=replace, description=INDEX, entry=("_class_name", CLASS_NAME), known=lambda _: _FILES
    )
    # The folder is locked and checked before the model is loaded.
    with write_folder(Path(out), name="--out", check=check) as fresh:
        # 1.
        folder = find_folder(model)
        if read_negative_model(folder / "decoding.json") is not None:
            _log.warning(
                "%s: the negative model of guidance is not exported; guide with the null class instead", folder
            )
        pipe = MaskGITPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
        # 2.
        pipe.save_pretrained(fresh)
        # 3.
        expected = MaskGIT.from_pretrained(folder, decoding=read_decoding(folder), pack_weights=False)
        _compare_images(MaskGITPipeline.from_pretrained(fresh, low_cpu_mem_usage=False), expected)
        # 4. On leaving the block.


def _compare_images(pipe: MaskGITPipeline, model: MaskGIT) -> None:
    """Generates images of two classes with two seeds by both pipelines, and compares each pixel.

    Raises:
        ValueError: if a pixel differs.
    """
    classes, options = [0, len(model.class_names) - 1], dict[str, Any](seed=[0, 1], output_type="pt")
    if condition_dim := model.transformer.network.config.condition_dim:
        options["vectors"] = torch.randn(2, condition_dim, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    found = pipe(classes, **options).images
    if not torch.equal(found, model.generate(classes, **options).float() / 255):
        raise ValueError("the images of the folder must be those of MaskGIT, but pixels differ; nothing was written")
    _log.info("images of 2 classes are equal in diffusers and in MaskGIT")
