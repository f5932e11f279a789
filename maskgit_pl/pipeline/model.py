"""``MaskGIT``: generates and edits images of classes with a tokenizer and a transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from maskgit_pl import editing
from maskgit_pl.decoding import (
    ConditionalModel,
    ConditionalNetwork,
    DecodingConfig,
    DecodingStep,
    FirstStepLogits,
    decode_classes,
    decode_in_order,
)
from maskgit_pl.devices import check_device
from maskgit_pl.editing import Box, ImageLike, MaskLike
from maskgit_pl.imaging import to_unit_range
from maskgit_pl.networks import int8
from maskgit_pl.networks.causal import CausalTransformer
from maskgit_pl.pipeline.canvas import Canvas
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pipeline.description import Origin, check_run, fingerprints
from maskgit_pl.pipeline.options import (
    Classes,
    DecodingSettings,
    EditOptions,
    GenerateOptions,
    Images,
    OutputType,
    Seeds,
    StepCallback,
    as_output,
    check_options,
)
from maskgit_pl.pipeline.outline import Outline
from maskgit_pl.pipeline.requests import Edit, Request, rows_by_first_step, slices
from maskgit_pl.pipeline.sharing import check_hub_id, find_folder, upload
from maskgit_pl.pretrained import (
    PretrainedTokenizer,
    PretrainedTransformer,
    fingerprint,
    images_at_once,
    load_decoding,
    load_tokenizer,
    load_transformer,
    read_config,
    read_decoding,
    save_decoding,
    save_tokenizer,
    save_transformer,
)
from maskgit_pl.randomness import random_bits

__all__ = ["MaskGIT"]


class MaskGIT:
    """Generates images of classes with a tokenizer and a transformer.

    Example::

        pipe = MaskGIT.from_pretrained("runs/demo")
        images = pipe.generate(["Sneaker", "Bag", 0], num_steps=8, seed=0)
        images[0].save("sneaker.png")

    Args:
        tokenizer: Turns tokens into images.
        transformer: Finds the tokens of a class.
        mask_schedule: Name or mapping of the transformer's mask schedule, as a recipe has it, None for a sequential
            one; ``save_pretrained`` writes it.
        decoding: In place of the transformer's own.

    Raises:
        ValueError: The transformer was trained on another tokenizer's tokens.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        transformer: PretrainedTransformer,
        *,
        mask_schedule: str | Mapping[str, Any] | None,
        decoding: DecodingConfig | None = None,
    ) -> None:
        if transformer.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                "transformer: it knows the tokens of the tokenizer with fingerprint "
                f"{transformer.tokenizer_fingerprint[:12]}, got one with {tokenizer.fingerprint[:12]}; "
                "use the tokenizer it was trained with, or train it again on this one"
            )
        self.tokenizer = tokenizer
        self.transformer = transformer
        self._mask_schedule_spec = mask_schedule
        self._decoding = decoding
        self._origin = Origin()
        config = transformer.network.config
        self._first_step = FirstStepLogits(
            cast("ConditionalNetwork", transformer.network),  # a sequential model does not use it
            num_tokens=config.num_tokens,
            mask_token_id=config.mask_token_id,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: Path | str,
        *,
        revision: str | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        decoding: DecodingConfig | Path | str | None = None,
    ) -> MaskGIT:
        """Reads the model of a run, a folder with ``tokenizer`` and ``transformer``, or a repository of the Hub.

        Args:
            path_or_hub_id: A run folder (``runs/RUN``), a pretrained folder, or ``owner/name``; nothing of what is
                fetched is executed.
            revision: As of ``sharing.find_folder``, like the next three; for repositories alone.
            cache_dir: Likewise.
            local_files_only: Likewise.
            token: Likewise.
            decoding: How to decode unless ``generate`` is told otherwise, or a file that says so; by default the
                folder's ``decoding.json``, where it was tuned, else as the transformer was exported.

        Raises:
            FileNotFoundError: A folder, repository or file is missing.
            ValueError: A folder is not what it should be, or the two do not belong together.
        """
        folder = find_folder(
            path_or_hub_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        own = decoding is None
        if decoding is None:
            decoding = read_decoding(folder)
        elif not isinstance(decoding, DecodingConfig):
            decoding = load_decoding(decoding)
        origin = Origin.of(folder, tuned=own)
        tokenizer, transformer = load_tokenizer(folder / "tokenizer"), load_transformer(folder / "transformer")
        spec = read_config(folder / "transformer", "transformer")["mask_schedule"]
        pipe = cls(tokenizer, transformer, mask_schedule=spec, decoding=decoding)
        pipe._origin = origin
        return pipe

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        run: Path | str | None = None,
        license: str | None = None,  # noqa: A002  # the Hub's word
        name: str | None = None,
    ) -> None:
        """Writes what ``from_pretrained`` reads, ``config.json`` and a model card.

        Args:
            folder: Where to; what is there of an older pipeline is replaced.
            run: The run that made the weights, for the card; by default the one that they were read from, where they
                are still the same.
            license: Of the weights, as the Hub spells it; left open in the card where nobody knows it.
            name: What the card says to load it by, such as ``owner/name``.

        Raises:
            FileNotFoundError: No such run.
        """
        self._refuse_int8("saved")
        if run is not None:
            check_run(Path(run))
        folder, before = Path(folder), self._origin.weights()
        self._save_networks(folder)
        if self._decoding is not None:
            save_decoding(folder, self._decoding, tuned=self._origin.tuned)
        else:
            (folder / "decoding.json").unlink(missing_ok=True)
        after = fingerprints(folder)
        write_card(
            folder,
            run=run if run is not None else self._origin.run() if before == after else None,
            known=self._origin.facts(after),
            license=license,
            name=name,
        )

    def _save_networks(self, folder: Path) -> None:
        network = self.tokenizer.network
        save_tokenizer(folder / "tokenizer", network.config, network.state_dict(), image_size=self.tokenizer.image_size)
        spec = self._mask_schedule_spec
        save_transformer(
            folder / "transformer",
            self.transformer.network.config,
            self.transformer.network.state_dict(),
            mask_schedule=dict(spec) if isinstance(spec, Mapping) else spec,
            decoding=self.transformer.decoding,
            class_names=self.class_names,
            tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
        )

    def push_to_hub(
        self,
        hub_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        run: Path | str | None = None,
        license: str | None = None,  # noqa: A002  # the Hub's word
    ) -> str:
        """Puts what ``save_pretrained`` writes into a repository of the Hub.

        Args:
            hub_id: ``owner/name``; it is made where there is none.
            private: Whether a new one is; None is the owner's default.
            token: Of the owner; the one that was logged in with by default.
            run: As of ``save_pretrained``.
            license: Likewise.

        Returns:
            Its address.

        Raises:
            ValueError: Not ``owner/name``.
            ConnectionError: The Hub cannot be reached or refuses.
        """
        check_hub_id(hub_id)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, run=run, license=license, name=hub_id)
            return upload(Path(folder), hub_id, private=private, token=token)

    def quantized(self) -> MaskGIT:
        """The same on a processor with a transformer of 8-bit linear layers: approximate, and quicker.

        It shares the tokenizer with this one, and can be neither moved nor saved.

        Raises:
            ValueError: The networks are not on the processor, or torch has no 8-bit products.
        """
        transformer = replace(self.transformer, network=int8.quantized(self.transformer.network))
        made = MaskGIT(self.tokenizer, transformer, mask_schedule=self._mask_schedule_spec, decoding=self._decoding)
        made._origin = self._origin
        return made

    def _refuse_int8(self, what: str) -> None:
        if any(isinstance(module, int8.Int8Linear) for module in self.transformer.network.modules()):
            raise ValueError(f"pipeline in int8: it cannot be {what}; take the one that quantized() was called on")

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> MaskGIT:
        """Moves both networks, and casts them where a ``dtype`` is given.

        Args:
            device: Such as ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: Such as ``torch.bfloat16``; None keeps the type.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: if there is no such device here, or the transformer is in int8.
        """
        if str(device) != "cpu" or dtype is not None:
            self._refuse_int8("moved or cast")
        device = check_device(device)
        for network in (self.tokenizer.network, self.transformer.network):
            network.to(device=device, dtype=dtype)
        self._first_step.clear()
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.transformer.network.parameters()).device

    def __repr__(self) -> str:
        """Returns what the model is, in one line."""
        tokenizer, transformer = self.tokenizer.network.config, self.transformer.network.config
        size, (rows, columns) = self.tokenizer.image_size, transformer.grid
        colours = "grey" if tokenizer.in_channels == 1 else "RGB"
        return (
            f"MaskGIT({len(self.class_names)} classes, {colours} images of {size} x {size} pixels, {rows} x {columns} "
            f"tokens of {tokenizer.num_codes} codes, {self.decoding.num_steps} steps, on {self.device})"
        )

    @property
    def outline(self) -> Outline:
        """Classes, sizes and decoding of the model: what a request is checked by."""
        config, tokenizer = self.transformer.network.config, self.tokenizer
        return Outline(
            self.class_names,
            config.null_label,
            config.num_tokens,
            isinstance(self.transformer.network, CausalTransformer),
            self.decoding,
            tokenizer.image_size,
            tokenizer.network.config.downsampling_factor,
            tokenizer.network.config.in_channels,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; class i is ``class_names[i]``."""
        return self.transformer.class_names

    @property
    def decoding(self) -> DecodingConfig:
        """How images are decoded unless ``generate`` is told otherwise."""
        return self._decoding or self.transformer.decoding

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["pt"], **options: Unpack[GenerateOptions]
    ) -> Tensor: ...

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["np"], **options: Unpack[GenerateOptions]
    ) -> npt.NDArray[np.uint8]: ...

    @overload
    def generate(
        self, classes: Classes, *, output_type: Literal["pil"] = ..., **options: Unpack[GenerateOptions]
    ) -> list[Image.Image]: ...

    def generate(
        self, classes: Classes, *, output_type: OutputType = "pil", **options: Unpack[GenerateOptions]
    ) -> Images:
        """One image for each class asked for.

        An image depends on its class, its seed and the settings alone, not on the batch that it is decoded in. A
        sequential model draws one token a step; it takes guidance and how codes are sampled, and refuses what says in
        which order or how many at a time.

        Args:
            classes: Ids in [0, number of classes) or names, in a list or a single one; None in a list is "no class",
                where the model was trained with it.
            output_type: ``"pil"``: grey or RGB pictures; ``"pt"``: (n, C, H, W) uint8 on the CPU; ``"np"``:
                (n, H, W, C) uint8.
            options: ``num_steps``, ``guidance_scale``, ``seed``, ``callback`` ...; see ``GenerateOptions``.

        Raises:
            ValueError: An unknown class or a number out of range.
            TypeError: A class is neither a number nor a name, an unknown option, or the model's schedules do not take a
                setting.
        """
        check_options(options, GenerateOptions, output_type)
        run = self._request(classes, options)
        parts = [self._images(self._decode(run, rows), run.callback) for rows in run.parts()]
        return as_output(output_type, torch.cat(parts))

    def inpaint(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        classes: Classes | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Generates the masked part of images anew, one result for each class asked for.

        Example::

            pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
            variants = pipe.inpaint("sneaker.png", "mask.png", classes=["Sneaker"] * 4)
            variants[0].save("inpainted.png")

        The tokens under the mask, and their neighbours, are decoded again while all others stay; what they show is
        pasted into the image. A result depends on its image, mask, class, seed and the settings alone.

        Args:
            image: One image for all results, or a list of one for each: files, PIL pictures, or uint8 pixels, a tensor
                (C, H, W) or an array (H, W) or (H, W, C).
            mask: Likewise: files or pictures, white where pixels are to be generated, or (H, W) bool.
            classes: Class of each result, an id or a name; None is one result of "no class", for models trained with
                it.
            output_type: As of ``generate``.
            options: As of ``generate``, and ``dilation``, ``blend``, ``fit``; see ``EditOptions``. Of T steps the first
                floor(T / 6) are left out, except for a full mask.

        Raises:
            FileNotFoundError: No such file.
            ValueError: An image or a mask that is none, of another size, or empty; an unknown class; a number out of
                range; or a list of another length than ``classes``.
            TypeError: As of ``generate``.

        Source: paper, section on class-conditional image editing; released code, its functions for editing.
        """
        self.transformer.schedule_for("inpaint")
        check_options(options, EditOptions, output_type)
        run = self._request([None] if classes is None else classes, options)
        edits = Edit.all_of(image, mask, count=len(run.labels), tokenizer=self.tokenizer, options=options)
        tokens = self._encode(torch.stack([edit.original for edit in edits]), run.batch_size)
        if len(edits) < len(run.labels):  # one image and one mask for all
            edits, tokens = edits * len(run.labels), tokens.expand(len(run.labels), -1)
        tokens = tokens.masked_fill(
            torch.stack([edit.unknown.flatten() for edit in edits]), self.transformer.network.config.mask_token_id
        )
        results = torch.empty(len(run.labels), *edits[0].original.shape, dtype=torch.uint8)
        first_steps = [editing.first_step(edit.unknown, num_steps=run.decoding.num_steps) for edit in edits]
        for first_step, rows in rows_by_first_step(first_steps, run.batch_size):
            steps = self._decode(run, rows, tokens=tokens[rows], first_step=first_step)
            for row, edited in zip(rows, self._images(steps, run.callback), strict=True):
                results[row] = editing.composite(edits[row].original, edited, edits[row].weight)
        return as_output(output_type, results)

    def edit_class(
        self,
        image: ImageLike,
        region: Box | MaskLike,
        class_: int | str,
        *,
        variants: int = 1,
        output_type: OutputType = "pil",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Turns what is in a box or under a mask into something of another class; everything else stays.

        Example::

            pipe = MaskGIT.from_pretrained("runs/demo/pretrained")
            boots = pipe.edit_class("sneaker.png", (0, 4, 28, 16), "Ankle boot", variants=4)
            boots[0].save("boot.png")

        Args:
            image: A file, a PIL picture or pixels, as of ``inpaint``.
            region: (left, top, right, bottom) in pixels of the image, or a mask as of ``inpaint``.
            class_: Id or name.
            variants: Results; variant i has seed + i.
            output_type: As of ``generate``.
            options: As of ``inpaint``.

        Raises:
            ValueError: The box is empty or not within the image, or as of ``inpaint``.
            FileNotFoundError: No such file.
            TypeError: As of ``inpaint``.

        Source: paper, section on class-conditional image editing.
        """
        self.transformer.schedule_for("edit_class")
        if variants < 1:
            raise ValueError(f"variants: at least 1 is needed, got {variants}")
        mask: MaskLike = cast("MaskLike", region)
        if isinstance(region, list | tuple):
            image = editing.image_pixels(image, channels=self.tokenizer.network.config.in_channels)
            mask = editing.box_mask(region, height=image.shape[-2], width=image.shape[-1])
        return self.inpaint(image, mask, classes=[class_] * variants, output_type=output_type, **options)

    def outpaint(
        self,
        image: ImageLike,
        *,
        left: int = 0,
        right: int = 0,
        up: int = 0,
        down: int = 0,
        classes: Classes | None = None,
        overlap: float = 0.5,
        output_type: OutputType = "pil",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Goes on with an image beyond its borders, one result for each class asked for.

        Example::

            pipe = MaskGIT.from_pretrained("pretrained/places512")
            wide = pipe.outpaint("landscape.png", right=256)

        The image's tokens lie on a larger canvas. A window of the model's size is moved to where it sees enough that is
        known and most that is not, decodes that, and so on until the canvas is full; then all of it is decoded to
        pixels at once, and the image pasted back.

        Args:
            image: A file, a PIL picture or pixels, as of ``inpaint``; of any size, smaller or larger than the model's.
            left: Pixels to add on this side. All four, and the image's own size, are multiples of a token's edge, and
                the result is at least as large as the model's images.
            right: Likewise.
            up: Likewise.
            down: Likewise.
            classes: As of ``inpaint``.
            overlap: Share of a window that is known before it is decoded, in (0, 1), where so much is to be had.
            output_type: As of ``generate``.
            options: As of ``inpaint`` without ``fit``; ``dilation``, 0 by default, says how many of the image's tokens
                along the border are decoded anew. With ``blend=0`` all pixels of the image stay.

        Raises:
            FileNotFoundError: No such file.
            ValueError: Not an image, nothing to add, sizes that are no whole tokens, an unknown class, or a number out
                of range.
            TypeError: As of ``generate``.

        Source: paper, Figure 1 and Table 2.
        """
        self.transformer.schedule_for("outpaint")
        check_options(options, EditOptions, output_type)
        run = self._request([None] if classes is None else classes, options)
        config = self.tokenizer.network.config
        pixels = editing.image_pixels(image, channels=config.in_channels)
        added = editing.Margins(left, right, up, down)
        added.check(pixels.shape[-2:], factor=config.downsampling_factor, least=self.tokenizer.image_size)
        tokens = self._encode_within(pixels, added)
        mask = added.outside(*pixels.shape[-2:])
        unknown = editing.token_mask(mask, factor=config.downsampling_factor, dilation=options.get("dilation", 0))
        whole = added.padded(tokens, size=config.downsampling_factor)
        filled = self._fill(run, whole, unknown, overlap)
        radius = options.get("blend")
        weight = editing.seam(mask, radius=editing.seam_radius(self.tokenizer.image_size) if radius is None else radius)
        original = added.padded(pixels, size=1)
        results = torch.stack([editing.composite(original, edited, weight) for edited in filled])
        return as_output(output_type, results)

    def panorama(
        self,
        classes: Classes,
        width: int,
        *,
        height: int | None = None,
        overlap: float = 0.5,
        output_type: OutputType = "pil",
        **options: Unpack[GenerateOptions],
    ) -> Images:
        """Generates images of any width with a window that slides over them, one for each class asked for.

        Example::

            pipe = MaskGIT.from_pretrained("pretrained/places512")
            pipe.panorama(["coast"], width=2048)[0].save("coast.png")

        Args:
            classes: As of ``generate``.
            width: In pixels; a multiple of a token's edge, at least the model's image size.
            height: Likewise; the model's image size by default.
            overlap: As of ``outpaint``: how much of what is there a window sees when it is decoded.
            output_type: As of ``generate``.
            options: As of ``generate``.

        Raises:
            ValueError: Sizes that are no whole tokens or too small, an unknown class, or a number out of range.
            TypeError: As of ``generate``.

        Source: paper, Figure 1.
        """
        self.transformer.schedule_for("panorama")
        check_options(options, GenerateOptions, output_type)
        run = self._request(classes, options)
        size, factor = self.tokenizer.image_size, self.tokenizer.network.config.downsampling_factor
        height = size if height is None else height
        editing.check_canvas(height, width, factor=factor, least=size)
        unknown = torch.ones(height // factor, width // factor, dtype=torch.bool)
        return as_output(output_type, self._fill(run, torch.zeros(unknown.shape, dtype=torch.int64), unknown, overlap))

    def steps(
        self, classes: Classes, *, seed: Seeds = 0, **settings: Unpack[DecodingSettings]
    ) -> Iterator[DecodingStep]:
        """The decoding steps of one batch, for pictures of them; arguments as of ``generate``.

        ``training.image_callbacks.pipe.tokenizer.decode(step.tokens)`` is the image at a step.
        """
        check_options(settings, GenerateOptions, "pil")
        run = self._request(classes, {"seed": seed, **settings})
        return self._decode(run, range(len(run.labels)))

    def class_ids(self, classes: Classes) -> list[int]:
        """Labels of classes given by id or by name; None is "no class"; errors as of ``generate``."""
        return self.outline.class_ids(classes)

    def decoding_with(self, **settings: Unpack[DecodingSettings]) -> DecodingConfig:
        """The model's own way of decoding, with some settings replaced.

        Raises:
            TypeError: There is no such setting.
        """
        return self.outline.decoding_with(**settings)

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Refuses, before time is spent, a way of decoding that the model cannot follow.

        Guidance without a null class is not looked at: where negative classes are named, there is no need of it.

        Raises:
            TypeError: A part does not take its arguments.
            ValueError: An unknown name, a number out of range, more steps than tokens, or what a sequential model
                cannot follow.
        """
        self.outline.check_decoding(decoding)
        num_tokens, schedule = self.transformer.network.config.num_tokens, self.transformer.mask_schedule
        if schedule is not None:
            decoding.decoder(schedule).plan([num_tokens], num_tokens)  # a plug-in may refuse its counts

    def _request(self, classes: Classes, options: Mapping[str, Any]) -> Request:
        return Request.of(classes, options, class_ids=self.class_ids, decoding=self.decoding)

    def _decode(
        self, run: Request, rows: Sequence[int], *, tokens: Tensor | None = None, first_step: int = 0
    ) -> Iterator[DecodingStep]:
        """Decodes some of what was asked for; ``tokens`` (len(rows), N) int64 to begin from."""
        network = self.transformer.network
        labels, seeds = [run.labels[row] for row in rows], [run.seeds[row] for row in rows]
        negative = None if run.negative_labels is None else [run.negative_labels[row] for row in rows]
        if isinstance(network, CausalTransformer):
            assert tokens is None
            return decode_in_order(
                ConditionalModel.of(network, self.device),
                labels,
                seeds,
                decoder=run.decoding.sequential_decoder(network.config.num_tokens),
                scales=run.decoding.scales(),
                negative_labels=negative,
            )
        return decode_classes(
            ConditionalModel.of(
                network, self.device, first_step_logits=self._first_step, context_cache=run.decoding.context_cache
            ),
            labels,
            seeds,
            decoder=run.decoding.decoder(self.transformer.mask_schedule),
            scales=run.decoding.scales(),
            negative_labels=negative,
            tokens=tokens,
            first_step=first_step,
        )

    def _fill(self, run: Request, tokens: Tensor, unknown: Tensor, overlap: float) -> Tensor:
        """Fills a canvas window by window.

        Args:
            run: What was asked for.
            tokens: (R, C) int64, whatever where ``unknown``.
            unknown: (R, C) bool.
            overlap: As of ``outpaint``.

        Returns:
            (n, C, H, W) uint8: a picture for each result.
        """
        config = self.transformer.network.config
        editing.check_overlap(overlap)
        filled = []
        for rows in run.parts():
            canvas = Canvas.of(tokens, unknown, count=len(rows), device=self.device)
            seeds = torch.tensor([run.seeds[row] for row in rows])
            for number, window in enumerate(editing.windows(unknown, size=config.grid, overlap=overlap)):
                first = editing.first_step(window.unknown, num_steps=run.decoding.num_steps)
                known = canvas.window(window, mask_token_id=config.mask_token_id)
                # each window has noise of its own, or they would repeat one another
                own = seeds if number == 0 else random_bits("window", seed=seeds, index=number)[:, 0]
                of_window = run.with_seeds(rows, own.tolist())
                start = None if bool(window.unknown.all()) else known
                for step in self._decode(of_window, range(len(rows)), tokens=start, first_step=first):
                    on_canvas = canvas.step(window, step)
                    if run.callback is not None:
                        run.callback(on_canvas)
                canvas.keep(window, step)
            filled.append(self.tokenizer.decode(canvas.tokens.flatten(1), grid=(unknown.shape[0], unknown.shape[1])))
        return torch.cat(filled)

    def _images(self, steps: Iterator[DecodingStep], callback: StepCallback | None) -> Tensor:
        """What the last of the steps shows: (B, C, H, W) uint8 on the CPU."""
        for step in steps:
            if callback is not None:
                callback(step)
        return self.tokenizer.decode(step.tokens)

    def _encode(self, images: Tensor, batch_size: int) -> Tensor:
        """(n, C, H, W) uint8 -> tokens (n, N) int64 on the CPU."""
        network = self.tokenizer.network
        like = next(network.parameters())
        with torch.no_grad():
            tokens = [
                network.encode(to_unit_range(images[part]).to(like)).cpu()
                for part in slices(len(images), min(batch_size, images_at_once(*images.shape[-2:])))
            ]
        return torch.cat(tokens)

    def _encode_within(self, pixels: Tensor, added: editing.Margins) -> Tensor:
        """An image that is to be gone on with: (C, H, W) uint8 -> tokens (h, w) int64 on the CPU.

        Where it goes on, its last pixels are repeated before it is encoded: the tokens at its border are then those of
        a place in the middle of a picture. With a border of nothing beside them, what is decoded next to them turns out
        too bright or too dark.
        """
        config = self.tokenizer.network.config
        factor = config.downsampling_factor
        around = added.at_most(self.tokenizer.image_size // 2 // factor * factor)
        repeated = around.padded(pixels.float(), size=1, mode="replicate").to(pixels.dtype)
        tokens = self._encode(repeated[None], 1)
        rows, columns = config.grid((repeated.shape[-2], repeated.shape[-1]))
        grid = rearrange(tokens, "1 (h w) -> h w", h=rows)
        left, right, up, down = (side // factor for side in around.sides)
        return grid[up : rows - down, left : columns - right]
