"""``MaskGIT``: the pipeline that users load, from a run, a folder or the Hub, and save or share.

It holds the networks, reads what a call wants into a ``Request``, and hands both to the functions of
``pipeline.tasks``.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack, get_args, overload

import torch
from torch import Tensor

from maskgit_pl.checks import CHANNELS, check_choice, pixels_text
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.predictors import check_condition_vectors
from maskgit_pl.devices import check_device
from maskgit_pl.networks.kernels import set_packing
from maskgit_pl.pipeline import tasks as tasks
from maskgit_pl.pipeline.card import fingerprints, write_card
from maskgit_pl.pipeline.options import (
    Classes,
    ClassIndex,
    DecodingKeywords,
    GenerateKeywords,
    Images,
    OutputType,
    Request,
    replace_settings,
)
from maskgit_pl.pipeline.regions import Box, ImageLike, Margins, MaskLike, check_canvas
from maskgit_pl.pipeline.sharing import HubOptions, find_folder, find_transformer
from maskgit_pl.pretrained.networks import (
    NEGATIVE,
    NegativeModelLike,
    PretrainedTokenizer,
    PretrainedTransformer,
    check_stage_folder,
    fingerprint,
    load_tokenizer,
    load_transformer,
    read_config,
    read_decoding,
    save_decoding,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.registry import nearest
from maskgit_pl.schedules import mask_schedules

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from maskgit_pl.pipeline.display import Recording


class MaskGIT:
    """Generates and edits images of classes with a tokenizer and a transformer.

    Example::

        pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
        images = pipe.generate(["Sneaker", "Bag", 0], num_steps=8, seed=0)
        images[0].save("sneaker.png")

    Args:
        tokenizer: Encodes images to tokens and decodes tokens to images. None for a transformer of tokens of another
            tokenizer, which generates no images, only tokens.
        transformer: Predicts the tokens of a class.
        decoding: Decoding settings; by default those that were exported with the transformer.
        negative_model: Default of the option ``negative_model``; see ``options.GenerateKeywords``.
        pack_weights: True keeps a second copy of the transformer's weights, packed for faster matrix products
            on a CPU; see ``networks.kernels``.

    Raises:
        ValueError: if the transformer was trained on the tokens of another tokenizer, or the negative model
            predicts other tokens.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer | None,
        transformer: PretrainedTransformer,
        *,
        decoding: DecodingConfig | None = None,
        negative_model: NegativeModelLike | None = None,
        pack_weights: bool = True,
    ) -> None:
        transformer.check_tokenizer(None if tokenizer is None else tokenizer.fingerprint)
        grid = transformer.network.config.grid
        if tokenizer is not None and tokenizer.grid != grid:
            axes = " x ".join(map(str, grid))
            raise ValueError(
                f"image_size of the tokenizer must give the transformer's grid of {axes} tokens, got "
                f"{pixels_text(tokenizer.image_size)} pixels with a grid of {tokenizer.grid[0]} x {tokenizer.grid[1]}"
            )
        self._tokenizer, self.transformer = tokenizer, transformer
        self._decoding, self._pack_weights = decoding, pack_weights
        set_packing(transformer.network, enabled=pack_weights)
        transformer.follow_weights()  # from here on, changes of the weights are found
        self.negative_model = None if negative_model is None else self._open_negative(negative_model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: Path | str,
        *,
        decoding: DecodingConfig | None = None,
        negative_model: NegativeModelLike | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        pack_weights: bool = True,
        **hub: Unpack[HubOptions],
    ) -> MaskGIT:
        """Loads the model of a run, a pretrained folder, or a repository of the Hugging Face Hub.

        Args:
            path_or_hub_id: Run folder (``runs/RUN``), folder with ``tokenizer/`` and ``transformer/``, the
                model of the package ``fashion-mnist-demo``, or ``owner/name`` on the Hub. Downloaded files
                are read as data and never executed.
            decoding: Default decoding settings. Without it, those of ``decoding.json`` in the folder (``maskgit tune``
                writes it), else those exported with the transformer.
            negative_model: Default of the option ``negative_model``. Without it and ``decoding``, that of the folder.
            device: Device such as ``cpu`` or ``cuda``.
            dtype: Type of the weights, such as ``torch.bfloat16``; None keeps that of the file.
            pack_weights: True keeps a second copy of the transformer's weights on a CPU, packed for faster
                matrix products; False saves the memory.
            hub: Options of a download: ``revision``, ``cache_dir``, ``local_files_only`` and ``token``; see
                ``sharing.HubOptions``.

        Raises:
            FileNotFoundError: if a folder, repository or file is missing.
            TypeError: if there is no such option; the message names the nearest one.
            ValueError: if a file is damaged, the transformer was trained with another tokenizer, or the
                negative model predicts other tokens.
        """
        for name in hub.keys() - HubOptions.__annotations__.keys():
            options = (*(cls.from_pretrained.__kwdefaults__ or ()), *HubOptions.__annotations__)
            raise TypeError(f"option {name!r}: {nearest(name, options)}")
        folder = find_folder(path_or_hub_id, **hub)
        if decoding is None:
            decoding = read_decoding(folder)
            if negative_model is None and (folder / NEGATIVE).is_dir():
                negative_model = folder / NEGATIVE
        transformer = load_transformer(folder / "transformer")
        pipe = cls(
            None if transformer.tokenizer_fingerprint is None else load_tokenizer(folder / "tokenizer"),
            transformer,
            decoding=decoding,
            negative_model=negative_model,
            pack_weights=pack_weights,
        )
        return pipe.to(device, dtype=dtype)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the files that ``from_pretrained`` reads, ``config.json`` and a model card.

        Args:
            folder: Folder to write. A pipeline in it is replaced.

        Raises:
            FileExistsError: if the folder of a network has other files.
            ValueError: if weights are not finite.
        """
        # The folder may be the one that was loaded: its facts are read before it is overwritten.
        folder, known, source = Path(folder), {}, self.transformer.folder
        if source is not None and (source.parent / "config.json").is_file():
            known = read_config(source.parent, "pipeline")
        tokenizer = None
        if self._tokenizer is not None:
            network, size = self._tokenizer.network, self._tokenizer.image_size
            save_tokenizer(folder / "tokenizer", network.config, network.state_dict(), image_size=size)
            tokenizer = fingerprint(folder / "tokenizer")
        for transformer, name_of_folder in zip(self._transformers(), ("transformer", NEGATIVE), strict=False):
            schedule = transformer.mask_schedule
            save_transformer(
                folder / name_of_folder,
                transformer.network.config,
                transformer.network.state_dict(),
                mask_schedule=None if schedule is None else mask_schedules.spec(schedule),
                decoding=transformer.decoding,
                class_names=transformer.class_names,
                tokenizer_fingerprint=tokenizer,
                corruption=transformer.corruption,
            )
        if self.negative_model is None and (folder / NEGATIVE).is_dir():
            check_stage_folder(folder / NEGATIVE)
            shutil.rmtree(folder / NEGATIVE)
        if self._decoding is None:
            (folder / "decoding.json").unlink(missing_ok=True)
        else:
            save_decoding(folder, self._decoding)
        write_card(folder, known=known if known.get("fingerprints") == fingerprints(folder) else None)

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """The tokenizer; raises a ``ValueError`` if the model has none."""
        if self._tokenizer is None:
            raise ValueError(
                "the model must have a tokenizer for images, got one of tokens of another tokenizer; write its tokens "
                "with `maskgit sample RUN --out tokens.npy`, and decode them with that tokenizer"
            )
        return self._tokenizer

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their indices."""
        return self.transformer.class_names

    @property
    def classes(self) -> ClassIndex:
        """The classes of the model, by which calls name them."""
        return ClassIndex(self.class_names, self.transformer.network.config.null_label)

    @property
    def decoding(self) -> DecodingConfig:
        """The default decoding settings of ``generate`` and the editing methods."""
        return self._decoding or self.transformer.decoding

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.transformer.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Moves the networks to a device such as ``cuda:1``, and casts them if a ``dtype`` is given; returns itself.

        Raises:
            ValueError: if the device is not available.
        """
        device = check_device(device)
        if self._tokenizer is not None:
            self._tokenizer.network.to(device=device, dtype=dtype)
        for transformer in self._transformers():
            transformer.to(device, dtype=dtype)
        return self

    def compile(self) -> Self:
        """Compiles the blocks of the transformer with ``torch.compile`` at their next calls, which takes a minute.

        A GPU then runs a few large kernels for each block in place of tens of small ones, which pays off for thousands
        of images. Results are the same to rounding. On a CPU, compiled blocks do not use packed weights.
        """
        for transformer in self._transformers():
            set_packing(transformer.network, enabled=False)
            for block in transformer.network.blocks:
                block.compile()
        return self

    def decoding_with(self, **settings: Unpack[DecodingKeywords]) -> DecodingConfig:
        """Returns the default decoding settings with some of them replaced. See ``options.replace_settings``."""
        return replace_settings(self.decoding, settings)

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Checks that the model can use decoding settings.

        Guidance of a model without a null class passes, because it works with negative classes.

        Raises:
            TypeError: if a plug-in does not take an argument.
            ValueError: if a name is unknown, a number is out of range, there are more steps than tokens, or a
                setting of parallel decoding is given to an autoregressive model.
        """
        num_tokens, schedule = self.transformer.network.config.num_tokens, self.transformer.mask_schedule
        decoding.check(num_tokens, is_autoregressive=schedule is None)
        if schedule is not None:
            decoding.build_decoder(schedule).plan([num_tokens], num_tokens)  # the counts of a plug-in may be wrong

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["pt"], **options: Unpack[GenerateKeywords]
    ) -> Tensor: ...

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["np"], **options: Unpack[GenerateKeywords]
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["pil"] = ..., **options: Unpack[GenerateKeywords]
    ) -> list[Image.Image]: ...

    def generate(
        self, classes: Classes, *, output_type: OutputType = "pil", **options: Unpack[GenerateKeywords]
    ) -> Images:
        """Generates one image for each class.

        An image depends on its class, its seed and the settings only, not on the batch that it is decoded in.
        An autoregressive model draws one token per step. It takes guidance, ``sampling_temperature``
        and ``top_k``, and refuses settings of parallel decoding.

        Args:
            classes: Indices in [0, number of classes) or names, as a list or a single one. None in a list is
                "no class", if the model was trained with it.
            output_type: ``"pil"`` for PIL images (L or RGB), ``"pt"`` for (n, C, H, W) uint8 on the CPU,
                ``"np"`` for (n, H, W, C) uint8.
            options: ``seed``, ``batch_size`` and others of ``options.GenerateKeywords``; ``decoding``, a
                ``DecodingConfig``; and single settings that override it: its fields such as ``num_steps``,
                ``guidance_scale`` and ``choice_temperature``.

        Returns:
            n images in the form of ``output_type``.

        Raises:
            FileNotFoundError: if ``negative_model`` names no model.
            ValueError: if a class is unknown, a number is out of range, or ``negative_model`` predicts other tokens.
            TypeError: if a class is neither an index nor a name, an option is unknown, or a plug-in does not
                take an argument.
        """
        request = self._request(classes, options, output_type=output_type)
        return tasks.as_output(tasks.generate(self, request), output_type)

    def generate_tokens(
        self, classes: Classes, *, known: npt.ArrayLike | None = None, **options: Unpack[GenerateKeywords]
    ) -> Tensor:
        """Generates the tokens of one sample for each class; the model needs no tokenizer.

        Args:
            classes: See ``generate``.
            known: (n, N) or ``(n, *grid)`` integers in [-1, K): tokens that stay, and -1 where they are generated, at
                one place of each sample or more. None generates all.
            options: See ``generate``. With ``known``, the first floor(T / 6) of T steps are skipped.

        Returns:
            ``(n, *grid)`` int64 in [0, K), on the CPU.

        Raises:
            ValueError: if ``known`` has another shape, type or range. See also ``generate``.
        """
        tokens = tasks.generate_tokens(self.transformer, self._request(classes, options), known)
        return tokens.reshape(-1, *self.transformer.network.config.grid)

    def record(self, classes: Classes, **options: Unpack[GenerateKeywords]) -> Recording:
        """Decodes one batch of images and keeps every step. See ``generate`` for the arguments."""
        from maskgit_pl.grids import class_captions  # which imports Pillow
        from maskgit_pl.pipeline.display import Recording

        request = self._request(classes, options)
        return Recording(
            list(tasks.decode(self.transformer, request)),
            self.tokenizer,
            request.decoding,
            class_captions(self.class_names, request.labels),
            request.seeds,
        )

    def inpaint(
        self,
        image: ImageLike | list[ImageLike],
        mask: MaskLike | Box | list[MaskLike | Box],
        *,
        classes: Classes | None = None,
        fit: bool = False,
        blend: float | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateKeywords],
    ) -> Images:
        """Regenerates the masked part of images, one result for each class.

        Example::

            pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
            variants = pipe.inpaint("sneaker.png", "mask.png", classes=["Sneaker"] * 4)
            pullovers = pipe.inpaint("shirt.png", (0, 12, 28, 28), classes=["Pullover"] * 4)

        1. Encodes the images, and masks the tokens under the mask and their neighbours.
        2. Decodes the masked tokens. All other tokens stay.
        3. Pastes the decoded image into the original along a blurred seam.

        A result depends on its image, mask, class, seed and the settings only, not on the batch.

        Args:
            image: One image for all results, or a list with one for each: a file, a PIL image, or uint8
                pixels as a tensor (C, H, W) or an array (H, W) or (H, W, C).
            mask: One mask for all results, or a list with one for each: a file or a PIL image, white where
                pixels are generated, (H, W) bool, or a box: a tuple (left, top, right, bottom) in pixels of the image.
            classes: Index or name of the class of each result; another class than that of the image turns the region
                into it. None gives one result of "no class" (see ``generate``).
            fit: True crops images and masks of another size to their central part with the model's shape, and
                resizes it.
            blend: Standard deviation of the blur of the seam in pixels, in [0, 65536]. 0 keeps every pixel outside the
                region bit by bit. None is the blur of the released code, ``pipeline.regions.seam_radius``.
            output_type: See ``generate``.
            options: Options of ``generate``. The first floor(T / 6) of T steps are skipped, except for a full mask.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if an image or a mask cannot be read, has another size or is empty, or the length of a
                list differs from that of ``classes``. See also ``generate``.

        Source: paper, section on class-conditional image editing; released code, its editing functions.
        """
        request = self._request(classes, options, output_type=output_type)
        images = tasks.inpaint(self, request, image, mask, fit=fit, blend=blend)
        return tasks.as_output(images, output_type)

    def edit(
        self,
        image: ImageLike | list[ImageLike],
        *,
        strength: float,
        classes: Classes | None = None,
        fit: bool = False,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateKeywords],
    ) -> Images:
        """Regenerates a random share of the tokens of whole images (image-to-image), one result for each class.

        Example::

            pipe = MaskGIT.from_pretrained("runs/fashion-mnist-adaln")
            boots = pipe.edit("sneaker.png", strength=0.6, classes=["Ankle boot"] * 4)
            boots[0].save("boot.png")

        1. Encodes the images.
        2. Masks ceil(strength N) of the N tokens, at positions that the seed of each result gives.
        3. Decodes the masked tokens, and all tokens to pixels.

        Args:
            image: One image for all results, or a list with one for each. See ``inpaint``.
            strength: Share of the tokens that are generated again, in (0, 1]. With 1 nothing of the image
                stays: the results are those of ``generate``.
            classes: See ``inpaint``.
            fit: See ``inpaint``.
            output_type: See ``generate``.
            options: Options of ``generate``. The first floor(T / 6) of T steps are skipped, except with strength 1.

        Raises:
            ValueError: if ``strength`` is out of range. See also ``inpaint``.
        """
        request = self._request(classes, options, output_type=output_type)
        images = tasks.redraw(self, request, image, strength, fit=fit)
        return tasks.as_output(images, output_type)

    def outpaint(
        self,
        image: ImageLike,
        *,
        left: int = 0,
        right: int = 0,
        up: int = 0,
        down: int = 0,
        classes: Classes | None = None,
        blend: float | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateKeywords],
    ) -> Images:
        """Extends an image beyond its borders, one result for each class.

        Example::

            wide = MaskGIT.from_pretrained("pretrained/places512").outpaint("landscape.png", right=256)

        1. Places the tokens of the image on a larger canvas.
        2. Fills the canvas window by window; half of a window is known before it is decoded, or less at the start.
        3. Decodes the whole canvas to pixels, and pastes the original image into it.

        Args:
            image: A file, a PIL image or uint8 pixels (see ``inpaint``) of any size.
            left: Pixels to add on the left. All four numbers and the size of the image are multiples of the
                pixels of a token, and the result is at least as large as the images of the model.
            right: Pixels to add on the right.
            up: Pixels to add above.
            down: Pixels to add below.
            classes: See ``inpaint``.
            blend: See ``inpaint``. With 0 all pixels of the image stay.
            output_type: See ``generate``.
            options: See ``generate``.

        Raises:
            ValueError: if all sides are 0, or a size is not a multiple of the pixels of a token. See also ``inpaint``.

        Source: paper, Figure 1 and Table 2.
        """
        request = self._request(classes, options, output_type=output_type)
        images = tasks.outpaint(self, request, image, Margins(left, right, up, down), blend=blend)
        return tasks.as_output(images, output_type)

    def panorama(
        self,
        classes: Classes,
        width: int,
        *,
        height: int | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateKeywords],
    ) -> Images:
        """Generates images of any width window by window, one for each class.

        Example::

            pipe = MaskGIT.from_pretrained("pretrained/places512")
            pipe.panorama(["coast"], width=2048)[0].save("coast.png")

        Args:
            classes: See ``generate``.
            width: Width in pixels, a multiple of the pixels of a token, at least the width of the model's images.
            height: Height in pixels, with the same rule; by default that of the model's images, in whole tokens.
            output_type: See ``generate``.
            options: See ``generate``.

        Raises:
            ValueError: if a size is too small or not a multiple of the pixels of a token. See also ``generate``.

        Source: paper, Figure 1.
        """
        request, tokenizer = self._request(classes, options, output_type=output_type), self.tokenizer
        height = tokenizer.grid[0] * tokenizer.token_size if height is None else height
        check_canvas(height, width, factor=tokenizer.token_size, least=tokenizer.image_size)
        images = tasks.panorama(self, request, (height, width))
        return tasks.as_output(images, output_type)

    def __repr__(self) -> str:
        """Returns classes, image size, tokens, steps, parameters, device and type of the weights in one line."""
        images, transformer = "", self.transformer.network.config
        networks: list[torch.nn.Module] = [self.transformer.network]
        if self._tokenizer is not None:
            colours, size = CHANNELS[self._tokenizer.channels], pixels_text(self._tokenizer.image_size)
            images = f"{colours} images of {size} pixels, "
            networks.insert(0, self._tokenizer.network)
        counts = " + ".join(f"{sum(weight.numel() for weight in network.parameters()):,}" for network in networks)
        dtype = str(next(networks[-1].parameters()).dtype).removeprefix("torch.")
        return (
            f"MaskGIT({len(self.class_names)} classes, {images}{' x '.join(map(str, transformer.grid))} tokens of "
            f"{transformer.codebook_size} codes, {self.decoding.num_steps} steps, {counts} parameters, {dtype} on "
            f"{self.device})"
        )

    def _request(
        self,
        classes: Classes | None,
        options: GenerateKeywords,
        *,
        output_type: OutputType = "pil",
    ) -> Request:
        """Returns what a call wants, checked. No classes are one "no class"."""
        check_choice("output_type", output_type, get_args(OutputType))
        request = Request.of(self.classes, self.decoding, [None] if classes is None else classes, options)
        model = options.get("negative_model")
        negative = self.negative_model if model is None else self._open_negative(model)
        if negative is not None:
            negative.follow_weights()
        self.transformer.follow_weights()
        config = self.transformer.network.config
        vectors = check_condition_vectors(
            options.get("vectors"), request.labels, condition_dim=config.condition_dim, null_label=config.null_label
        )
        return replace(request, negative_model=negative, vectors=vectors)

    def _open_negative(self, model: NegativeModelLike) -> PretrainedTransformer:
        """Returns the transformer from which guidance moves away, checked; one of a folder moves to this device."""
        if isinstance(model, str | Path):
            negative = load_transformer(find_transformer(model))
            negative.to(self.device, dtype=next(self.transformer.network.parameters()).dtype)
            set_packing(negative.network, enabled=self._pack_weights)
        else:
            negative = model if isinstance(model, PretrainedTransformer) else model.transformer
        self.transformer.check_negative(negative)
        return negative

    def _transformers(self) -> list[PretrainedTransformer]:
        return [self.transformer] if self.negative_model is None else [self.transformer, self.negative_model]
