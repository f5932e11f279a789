"""``MaskGITPipeline`` and its networks, which diffusers loads from a folder of ``maskgit export --format diffusers``.

``pipeline.py`` of each such folder imports the classes of this module, so their names stay. Weights are read
and written as in any pretrained folder, with the same checks, and are never unpickled. Importing this module
requires diffusers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin  # diffusers looks for ModelMixin in this module
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from maskgit_pl.checks import check_number
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.folders import check_new_folder, write_folder
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.options import Classes, OutputType, Request, Seeds
from maskgit_pl.pipeline.sharing import (
    CLASSES,
    DIFFUSERS_FILES,
    INDEX_FILE,
    NETWORK_FILES,
    HubOptions,
    find_folder,
    write_diffusers_files,
)
from maskgit_pl.pretrained.networks import NEGATIVE, load_tokenizer, load_transformer, read_decoding

StepEndCallback: TypeAlias = Callable[["MaskGITPipeline", int, int, dict[str, Tensor]], object]
_FILES = {"README.md", "config.json", *NETWORK_FILES, *DIFFUSERS_FILES}
_log = logging.getLogger(__name__)
# Options of diffusers that would be ignored here, although they change what is loaded or where.
_REFUSED = ("device_map", "quantization_config", "variant", "use_flashpack")


class _Network(ModelMixin):  # type: ignore[misc]  # diffusers: untyped
    """A network as a part of a pipeline of diffusers."""

    network: nn.Module

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None, **options: Any
    ) -> Self:
        """Reads the folder of a network, and casts its weights if a ``torch_dtype`` is given.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or an option of diffusers is not supported.
        """
        for name in (name for name in _REFUSED if options.get(name)):
            raise ValueError(
                f"{name} must be left out, got {options[name]!r}; load the pipeline, then move it with pipe.to(device)"
            )
        part = cls(Path(folder))
        part.network.to(dtype=torch_dtype)
        return part


class MaskGITTokenizer(_Network):
    """The tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.pretrained = load_tokenizer(folder)
        self.network = self.pretrained.network


class MaskGITTransformer(_Network):
    """The transformer of a folder, with the decoding settings of ``decoding.json`` beside it, if there is one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        pretrained = load_transformer(folder)
        decoding = read_decoding(folder.parent) or pretrained.decoding
        self.pretrained = dataclasses.replace(pretrained, decoding=decoding)
        self.network = pretrained.network


class MaskGITPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers: untyped
    """Generates images of classes, with the arguments and results of a pipeline of diffusers.

    Example::

        pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True)
        pipe(["Sneaker", 3], num_inference_steps=8, seed=0).images[0].save("sneaker.png")

    ``MaskGITPipeline.from_pretrained`` runs no code of a folder. It loads any pretrained folder, model of the
    package and repository of the Hub, without its negative model.

    Args:
        tokenizer: Decodes tokens to images.
        transformer: Predicts the tokens of a class.

    Raises:
        ValueError: if the transformer was trained on the tokens of another tokenizer.
    """

    def __init__(self, tokenizer: MaskGITTokenizer, transformer: MaskGITTransformer) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        _ = self.maskgit  # raises if the two do not fit

    @property
    def maskgit(self) -> MaskGIT:
        """The two networks as a ``MaskGIT``, which also edits images."""
        is_on_cpu = self.device.type == "cpu"
        return MaskGIT(self.tokenizer.pretrained, self.transformer.pretrained, pack_weights=is_on_cpu)

    def __call__(
        self,
        class_labels: Classes,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: Seeds | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        **options: Any,
    ) -> Any:
        """Generates one image for each class.

        Args:
            class_labels: Indices or names of classes, as a list or a single one. None in a list is "no class".
            num_inference_steps: Number of decoding steps; None for that of the model.
            guidance_scale: Scale of guidance as in diffusers, at least 0: up to 1 is no guidance, and above 1
                it is the scale of ``MaskGIT`` + 1. None for the guidance of the model.
            generator: Draws the seeds: one generator, or one for each image. None for the default generator of torch.
            seed: Seed of the first image, image i has seed + i; or one for each image. The images are those
                of ``MaskGIT.generate`` with these seeds. It takes the place of ``generator``.
            output_type: ``"pil"``, ``"pt"`` for a tensor (n, C, H, W) on the CPU, or ``"np"`` for an array
                (n, H, W, C), both float32 in [0, 1].
            return_dict: False returns a tuple.
            callback_on_step_end: Called with the pipeline, the step, the step again and a mapping with the ``tokens``
                (B, N) and ``still_masked`` (B, N), after each step of each batch. What it returns is not used.
            options: Other options of ``MaskGIT.generate``, such as ``choice_temperature`` and ``batch_size``.

        Returns:
            The images, as ``images`` of an ``ImagePipelineOutput`` or in a tuple.

        Raises:
            ValueError: if a class is unknown, a number is out of range, or both ``seed`` and ``generator`` are given.
        """
        maskgit = self.maskgit
        options = {"num_steps": num_inference_steps, **options}
        if guidance_scale is not None:
            options["guidance_scale"] = max(0.0, check_number("guidance_scale", guidance_scale, "[0, inf)") - 1)
        request = Request.of(maskgit.classes, maskgit.decoding, class_labels, options)
        options["seed"] = _seeds(seed, generator, len(request.labels))
        with self.progress_bar(total=request.decoding.num_steps * len(request.batches())) as bar:

            def end_step(step: DecodingStep) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"tokens": step.tokens, "still_masked": step.still_masked}
                    callback_on_step_end(self, step.step, step.step, tensors)

            images: Any = maskgit.generate(class_labels, output_type=output_type, callback=end_step, **options)
        if output_type != "pil":
            images = (images.float() if output_type == "pt" else images.astype(np.float32)) / 255
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes a folder as ``maskgit export --format diffusers`` does; a pipeline in it is replaced."""
        folder = Path(save_directory)
        self.maskgit.save_pretrained(folder)
        write_diffusers_files(folder)

    def push_to_hub(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuses to upload files that have not been checked."""
        raise ValueError("push_to_hub must not be called; `maskgit push FOLDER OWNER/NAME` uploads a saved folder")

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **options: Any) -> Path:
        """Returns the pretrained folder of a name, which is downloaded from the Hub if necessary."""
        hub = {name: options[name] for name in HubOptions.__annotations__ if name in options}
        return find_folder(str(pretrained_model_name), **hub)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Returns a ``model_index.json`` that names the classes of this module, so that no other code runs."""
        return {"_class_name": cls.__name__, **{part: [__name__, name] for part, name in CLASSES.items()}}


def export_diffusers(model: str | Path, out: str | Path, *, replace: bool = False) -> None:
    """Writes a model as a folder that ``DiffusionPipeline.from_pretrained`` loads.

    1. Find and load the model.
    2. Write the folder beside ``out``. The decoding settings of ``decoding.json`` become those of the
       transformer, because diffusers does not download that file from the Hub.
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
        ValueError: if ``out`` cannot be replaced, a file is damaged, or the images differ.
    """
    check = partial(check_new_folder, replace=replace, description=INDEX_FILE, known=_FILES)
    # The folder is locked and checked before the model is loaded.
    with write_folder(Path(out), name="--out", check=check) as fresh:
        # 1.
        folder = find_folder(model)
        if (folder / NEGATIVE).is_dir():
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


def _seeds(seed: Seeds | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Seeds:
    """Returns the seeds of the images, which the generator draws if none are given.

    Raises:
        ValueError: if both are given, or there is not one generator for each image.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator must not be set together; leave one out")
        return seed
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(generators) != count:
        raise ValueError(f"generator must be one, or one for each of the {count} images, got {len(generators)}")
    return [
        int(torch.randint(2**32, (), generator=source, device="cpu" if source is None else source.device))
        for source in generators
    ]


def _compare_images(pipe: MaskGITPipeline, model: MaskGIT) -> None:
    """Generates images of two classes with two seeds by both pipelines, and compares each pixel.

    Raises:
        ValueError: if a pixel differs.
    """
    classes, options = [0, len(model.class_names) - 1], dict[str, Any](seed=[0, 1], output_type="pt")
    if condition_dim := model.transformer.network.config.condition_dim:
        options["vectors"] = torch.randn(2, condition_dim, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(classes, **options).images
    if not torch.equal(images, model.generate(classes, **options).float() / 255):
        raise ValueError("the images of the folder must be those of MaskGIT, but pixels differ; nothing was written")
    _log.info("images of 2 classes are equal in diffusers and in MaskGIT")
