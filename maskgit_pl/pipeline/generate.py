"""``Generator``: generates images of classes with a tokenizer and a transformer. The base class of ``Editor``."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self, TypeAlias, Unpack, overload

import torch
from torch import Tensor

from maskgit_pl.checks import pixels_text
from maskgit_pl.decoding import (
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.decoding.predictors import VectorPool, check_condition_vectors
from maskgit_pl.distributed import check_device
from maskgit_pl.networks.backbone import AutoregressiveBackbone
from maskgit_pl.networks.kernels import set_packing
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, PretrainedTransformer
from maskgit_pl.pipeline.negative import Caches, NegativeModel, NegativeModelLike
from maskgit_pl.pipeline.options import (
    Classes,
    DecodingKeywords,
    GenerateKeywords,
    GenerateOptions,
    Images,
    OutputType,
    StepCallback,
    as_output,
    check_output_type,
    read_options,
)
from maskgit_pl.pipeline.outline import Outline
from maskgit_pl.pipeline.requests import Request

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

__all__ = ["Generator", "StepsOfImages", "finish"]

StepsOfImages: TypeAlias = collections.abc.Generator[DecodingStep, None, Tensor]
"""Decoding steps, and the images (n, C, H, W) uint8 as the value that the generator returns."""


class Generator:
    """Generates images of classes.

    Args:
        tokenizer: Decodes tokens to images.
        transformer: Predicts the tokens of a class.
        decoding: Decoding settings; by default those that were exported with the transformer.
        negative_model: Default of the option ``negative_model``; see ``GenerateOptions``.
        pack_weights: True keeps a second copy of the transformer's weights, packed for faster matrix products on a CPU;
            see ``networks.kernels``.

    Attributes:
        caches: Packed weights, and the logits of the first step. They follow changes of the weights.
        vector_pool: Vectors of images that are given none; None requires them. See ``decoding.predictors.VectorPool``.

    Raises:
        ValueError: if the transformer was trained on the tokens of another tokenizer, or the negative model predicts
            other tokens.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        transformer: PretrainedTransformer,
        *,
        decoding: DecodingConfig | None = None,
        negative_model: NegativeModelLike | None = None,
        pack_weights: bool = True,
    ) -> None:
        # The same codes mean other patches in another tokenizer: the images would be noise without an error.
        if transformer.tokenizer_fingerprint != tokenizer.fingerprint:
            raise ValueError(
                "transformer must be used with the tokenizer that it was trained with, whose fingerprint is "
                f"{transformer.tokenizer_fingerprint[:12]}, got {tokenizer.fingerprint[:12]}; load that tokenizer, or "
                "train the transformer on this one"
            )
        grid = transformer.network.config.grid
        if tokenizer.grid != grid:
            raise ValueError(
                f"image_size of the tokenizer must give the transformer's grid of {grid[0]} x {grid[1]} tokens, got "
                f"{pixels_text(tokenizer.image_size)} pixels with a grid of {tokenizer.grid[0]} x {tokenizer.grid[1]}"
            )
        self.tokenizer = tokenizer
        self.transformer = transformer
        self._pack_weights = pack_weights
        set_packing(transformer.network, enabled=pack_weights)
        self._decoding = decoding
        self.vector_pool: VectorPool | None = None
        self.caches = Caches(transformer)
        self._negative_model = None if negative_model is None else self._open_negative(negative_model)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their indices."""
        return self.transformer.class_names

    @property
    def decoding(self) -> DecodingConfig:
        """The default decoding settings of ``generate`` and the editing methods."""
        return self._decoding or self.transformer.decoding

    @property
    def negative_model(self) -> NegativeModel | None:
        """The default negative model of guidance; None for guidance by classes."""
        return self._negative_model

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.transformer.network.parameters()).device

    @property
    def outline(self) -> Outline:
        """The classes, sizes and default settings of the model, by which a request is checked."""
        config, tokenizer = self.transformer.network.config, self.tokenizer
        return Outline(
            self.class_names,
            config.null_label,
            config.num_tokens,
            isinstance(self.transformer.network, AutoregressiveBackbone),
            self.decoding,
            tokenizer.image_size,
            tokenizer.network.config.downsampling_factor,
            tokenizer.network.config.in_channels,
            config.condition_dim,
        )

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Self:
        """Moves both networks, and casts them if a ``dtype`` is given.

        Args:
            device: Device such as ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: Type of the weights such as ``torch.bfloat16``; None keeps it.

        Returns:
            The pipeline itself, for chaining.

        Raises:
            ValueError: if the device is not available.
        """
        device = check_device(device)
        for network in (self.tokenizer.network, self.transformer.network):
            network.to(device=device, dtype=dtype)
        if self._negative_model is not None:
            self._negative_model.to(device, dtype=dtype)
        # The packed weights and the logits of the first step belong to the old device and dtype.
        self.caches.clear()
        return self

    def clear_caches(self) -> None:
        """Removes all that was computed from the weights: packed weights, and the logits of the first step.

        Training, ``load_state_dict`` and other changes of the weights need no call: every method finds them. Call it
        after writing a few entries through ``weight.data`` or NumPy, which torch does not count.
        """
        self.caches.clear()
        if self._negative_model is not None:
            self._negative_model.caches.clear()

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

        An image depends on its class, its seed and the settings only, not on the batch that it is decoded in. An
        autoregressive model draws one token per step. It takes guidance, ``sampling_temperature``, ``top_k`` and
        ``top_p``, and refuses settings of parallel decoding.

        Args:
            classes: Indices in [0, number of classes) or names, as a list or a single one. None in a list is "no
                class", if the model was trained with it.
            output_type: ``"pil"`` for PIL images (L or RGB), ``"pt"`` for (n, C, H, W) uint8 on the CPU,
                ``"np"`` for (n, H, W, C) uint8.
            options: Fields of ``GenerateOptions`` such as ``seed``, ``batch_size`` and ``negative_model``;
                ``decoding``, a ``DecodingConfig``; and single settings that override it: its fields such as
                ``num_steps``, ``guidance_scale`` and ``choice_temperature``.

        Returns:
            n images in the form of ``output_type``.

        Raises:
            FileNotFoundError: if ``negative_model`` names no model.
            ValueError: if a class is unknown, a number is out of range, or ``negative_model`` predicts other tokens.
            TypeError: if a class is neither an index nor a name, an option is unknown, or a plug-in does not take an
                argument.
        """
        check_output_type(output_type)
        read, decoding = read_options(GenerateOptions, options, self.decoding)
        request = self._request(classes, read, decoding)
        # Each batch: (B, N) tokens of its last step -> (B, C, H, W) pixels.
        parts = [finish(self._images(self._decode(request, rows)), request.callback) for rows in request.batches()]
        return as_output(output_type, torch.cat(parts))

    def steps(self, classes: Classes, **options: Unpack[GenerateKeywords]) -> Iterator[DecodingStep]:
        """Yields the decoding steps of one batch. See ``generate`` for the arguments.

        ``pipe.tokenizer.decode(step.tokens)`` gives the images at a step.
        """
        read, decoding = read_options(GenerateOptions, options, self.decoding)
        request = self._request(classes, read, decoding)
        return self._decode(request, range(len(request.labels)))

    def class_ids(self, classes: Classes) -> list[int]:
        """Returns the labels of classes given by index or by name. None is "no class". See ``generate`` for errors."""
        return self.outline.class_ids(classes)

    def decoding_with(self, **settings: Unpack[DecodingKeywords]) -> DecodingConfig:
        """Returns the default decoding settings with some of them replaced. See ``generate`` for their names.

        Raises:
            TypeError: if a setting is unknown.
            ValueError: if a value is out of range.
        """
        return self.outline.decoding_with(**settings)

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Checks that the model can use decoding settings.

        Guidance of a model without a null class passes, because it works with negative classes.

        Raises:
            TypeError: if a plug-in does not take an argument.
            ValueError: if a name is unknown, a number is out of range, there are more steps than tokens, or a setting
                of parallel decoding is given to an autoregressive model.
        """
        self.outline.check_decoding(decoding)
        # The outline has no mask schedule: the schedule of the training is checked here.
        num_tokens, schedule = self.transformer.network.config.num_tokens, self.transformer.mask_schedule
        if schedule is not None:
            decoding.build_decoder(schedule).plan([num_tokens], num_tokens)  # the counts of a plug-in may be wrong

    def _request(self, classes: Classes, options: GenerateOptions, decoding: DecodingConfig) -> Request:
        request = Request.of(classes, options, decoding, class_ids=self.class_ids)
        negative = (
            self._negative_model if options.negative_model is None else self._open_negative(options.negative_model)
        )
        self.caches.follow_weights()
        if negative is not None:
            negative.check_labels(request.negative_labels or request.labels)
            negative.caches.follow_weights()
        config, vectors = self.transformer.network.config, options.vectors
        if vectors is None and self.vector_pool is not None:
            vectors = self.vector_pool.draw(request.labels, request.seeds)
        vectors = check_condition_vectors(
            vectors,
            request.labels,
            condition_dim=config.condition_dim,
            null_label=config.null_label,
        )
        return replace(request, negative_model=negative, vectors=vectors)

    def _open_negative(self, given: NegativeModelLike) -> NegativeModel:
        """Returns the negative model, checked and on the device of the pipeline."""
        negative = NegativeModel.of(given)
        negative.check(self.transformer)
        if negative.folder is not None and negative is not given:  # read here, so that no one else uses it
            weight = next(self.transformer.network.parameters())
            negative.to(weight.device, dtype=weight.dtype)
            set_packing(negative.transformer.network, enabled=self._pack_weights)
        negative.check_device(self.device)
        return negative

    def _decode(
        self, request: Request, rows: Sequence[int], *, tokens: Tensor | None = None, first_step: int = 0
    ) -> Iterator[DecodingStep]:
        """Yields the decoding steps of some results.

        Args:
            request: Labels, seeds and decoding settings of all results.
            rows: Indices of the B results to decode.
            tokens: (B, N) int64 to start from; None starts from masked tokens only.
            first_step: First step in [0, T).
        """
        network, part = self.transformer.network, request.part(rows)
        scales, negative_labels = part.decoding.scales(), part.negative_labels
        if isinstance(network, AutoregressiveBackbone):
            assert tokens is None
            return decode_autoregressive(
                ConditionalModel.from_network(network, self.device),
                part.labels,
                part.seeds,
                decoder=part.decoding.build_autoregressive_decoder(network.config.num_tokens),
                scales=scales,
                negative_labels=negative_labels,
            )
        # The first step of a class without context is the same for all seeds, so its logits are cached.
        model = ConditionalModel.from_network(network, self.device, first_step_logits=self.caches.first_step)
        if part.negative_model is not None:
            model = replace(model, negative=part.negative_model.conditional_model())
        return decode_classes(
            model.bind(None if part.vectors is None else part.vectors.to(self.device)),
            part.labels,
            part.seeds,
            decoder=part.decoding.build_decoder(self.transformer.mask_schedule),
            scales=scales,
            negative_labels=negative_labels,
            tokens=tokens,
            first_step=first_step,
        )

    def _images(self, steps: Iterator[DecodingStep]) -> StepsOfImages:
        """Yields decoding steps, and returns the images of the last one, (B, C, H, W) uint8 on the CPU."""
        for step in steps:
            yield step
        return self.tokenizer.decode(step.tokens)


def finish(steps: StepsOfImages, callback: StepCallback | None) -> Tensor:
    """Runs all decoding steps, calls ``callback`` after each, and returns the images."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            images: Tensor = end.value
            return images
        if callback is not None:
            callback(step)
