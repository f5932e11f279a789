"""``Generator``: images of classes from a tokenizer and a transformer. ``MaskGIT`` also edits, and is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor
from typing_extensions import Self

from maskgit_pl.decoding import (
    ConditionalModel,
    DecodingConfig,
    DecodingStep,
    FirstStepLogits,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.devices import check_device
from maskgit_pl.networks.autoregressive import AutoregressiveTransformer
from maskgit_pl.networks.int8 import Int8Linear
from maskgit_pl.pipeline.classes import Classes
from maskgit_pl.pipeline.options import (
    GenerateOptions,
    Images,
    OutputType,
    Seeds,
    StepCallback,
    as_output,
    check_output_type,
    read_options,
)
from maskgit_pl.pipeline.outline import Outline
from maskgit_pl.pipeline.requests import Request
from maskgit_pl.pretrained import PretrainedTokenizer, PretrainedTransformer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from maskgit_pl.decoding import ConditionalNetwork

__all__ = ["Generator"]


class Generator:
    """Generates images of classes.

    Args:
        tokenizer: Decodes tokens to images.
        transformer: Predicts the tokens of a class.
        decoding: Way of decoding in place of the transformer's own.

    Raises:
        ValueError: if the transformer was trained on the tokens of another tokenizer.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        transformer: PretrainedTransformer,
        *,
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
        self._decoding = decoding
        config = transformer.network.config
        self._first_step = FirstStepLogits(
            cast("ConditionalNetwork", transformer.network),  # an autoregressive model does not use it
            num_tokens=config.num_tokens,
            mask_token_id=config.mask_token_id,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; class i is ``class_names[i]``."""
        return self.transformer.class_names

    @property
    def decoding(self) -> DecodingConfig:
        """The way images are decoded unless a call says otherwise."""
        return self._decoding or self.transformer.decoding

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.transformer.network.parameters()).device

    @property
    def outline(self) -> Outline:
        """The facts of the model by which a request is checked: classes, sizes and decoding."""
        config, tokenizer = self.transformer.network.config, self.tokenizer
        return Outline(
            self.class_names,
            config.null_label,
            config.num_tokens,
            isinstance(self.transformer.network, AutoregressiveTransformer),
            self.decoding,
            tokenizer.image_size,
            tokenizer.network.config.downsampling_factor,
            tokenizer.network.config.in_channels,
        )

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> Self:
        """Moves both networks, and casts them if a ``dtype`` is given.

        Args:
            device: Such as ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: Such as ``torch.bfloat16``; None keeps the type.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: if there is no such device here, or the transformer is in int8.
        """
        if str(device) != "cpu" or dtype is not None:
            self._check_not_int8("moved or cast")
        device = check_device(device)
        for network in (self.tokenizer.network, self.transformer.network):
            network.to(device=device, dtype=dtype)
        self._first_step.clear()
        return self

    @overload
    def generate(self, classes: Classes, *, output_type: Literal["pt"], **options: Any) -> Tensor: ...

    @overload
    def generate(self, classes: Classes, *, output_type: Literal["np"], **options: Any) -> npt.NDArray[np.uint8]: ...

    @overload
    def generate(self, classes: Classes, *, output_type: Literal["pil"] = ..., **options: Any) -> list[Image.Image]: ...

    def generate(self, classes: Classes, *, output_type: OutputType = "pil", **options: Any) -> Images:
        """Generates one image for each class.

        An image depends only on its class, its seed and the settings, not on the batch that it is decoded in. An
        autoregressive model draws one token a step; it takes guidance and how codes are sampled, and refuses settings
        that say in which order or how many at a time.

        Args:
            classes: Indices in [0, number of classes) or names, in a list or a single one; None in a list is "no
                class", if the model was trained with it.
            output_type: ``"pil"``: grey or RGB pictures; ``"pt"``: (n, C, H, W) uint8 on the CPU; ``"np"``:
                (n, H, W, C) uint8.
            options: ``seed``, ``batch_size``, ``callback`` and others of ``GenerateOptions``; ``decoding``, a whole
                ``DecodingConfig``; and settings that replace parts of it: ``num_steps`` and all other fields of
                ``DecodingConfig``, ``guidance_scale``, ``choice_temperature``.

        Raises:
            ValueError: if a class is unknown or a number is out of range.
            TypeError: if a class is neither a number nor a name, an option is unknown, or a schedule does not take a
                setting.
        """
        check_output_type(output_type)
        read, decoding = read_options(GenerateOptions, options, self.decoding)
        request = self._request(classes, read, decoding)
        parts = [self._images(self._decode(request, rows), request.callback) for rows in request.batches()]
        return as_output(output_type, torch.cat(parts))

    def steps(self, classes: Classes, *, seed: Seeds = 0, **options: Any) -> Iterator[DecodingStep]:
        """Yields the decoding steps of one batch, for pictures of them; arguments as of ``generate``.

        ``pipe.tokenizer.decode(step.tokens)`` is the image at a step.
        """
        read, decoding = read_options(GenerateOptions, {"seed": seed, **options}, self.decoding)
        request = self._request(classes, read, decoding)
        return self._decode(request, range(len(request.labels)))

    def class_ids(self, classes: Classes) -> list[int]:
        """Returns the labels of classes given by index or by name; None is "no class"; errors as of ``generate``."""
        return self.outline.class_ids(classes)

    def decoding_with(self, **settings: Any) -> DecodingConfig:
        """Returns the model's own way of decoding with some settings replaced; names as of ``generate``.

        Raises:
            TypeError: if there is no such setting.
            ValueError: if a value is out of range.
        """
        return self.outline.decoding_with(**settings)

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Refuses, before time is spent, a way of decoding that the model cannot follow.

        Guidance without a null class is not refused: with negative classes there is no need of it.

        Raises:
            TypeError: if a part does not take its arguments.
            ValueError: if a name is unknown, a number is out of range, there are more steps than tokens, or an
                autoregressive model cannot follow.
        """
        self.outline.check_decoding(decoding)
        num_tokens, schedule = self.transformer.network.config.num_tokens, self.transformer.mask_schedule
        if schedule is not None:
            decoding.build_decoder(schedule).plan([num_tokens], num_tokens)  # a plug-in may refuse its counts

    def _check_not_int8(self, what: str) -> None:
        if any(isinstance(module, Int8Linear) for module in self.transformer.network.modules()):
            raise ValueError(f"pipeline in int8: it cannot be {what}; take the one that quantize() was called on")

    def _request(self, classes: Classes, options: GenerateOptions, decoding: DecodingConfig) -> Request:
        return Request.of(classes, options, decoding, class_ids=self.class_ids)

    def _decode(
        self, request: Request, rows: Sequence[int], *, tokens: Tensor | None = None, first_step: int = 0
    ) -> Iterator[DecodingStep]:
        """Decodes some of the results; ``tokens`` (len(rows), N) int64 to start from."""
        network, part = self.transformer.network, request.part(rows)
        scales, negative_labels = part.decoding.scales(), part.negative_labels
        if isinstance(network, AutoregressiveTransformer):
            assert tokens is None
            return decode_autoregressive(
                ConditionalModel.from_network(network, self.device),
                part.labels,
                part.seeds,
                decoder=part.decoding.build_autoregressive_decoder(network.config.num_tokens),
                scales=scales,
                negative_labels=negative_labels,
            )
        model = ConditionalModel.from_network(
            network,
            self.device,
            first_step_logits=self._first_step,
            context_cache=part.decoding.context_cache,
        )
        return decode_classes(
            model,
            part.labels,
            part.seeds,
            decoder=part.decoding.build_decoder(self.transformer.mask_schedule),
            scales=scales,
            negative_labels=negative_labels,
            tokens=tokens,
            first_step=first_step,
        )

    def _images(self, steps: Iterator[DecodingStep], callback: StepCallback | None) -> Tensor:
        """Returns the images of the last step: (B, C, H, W) uint8 on the CPU."""
        for step in steps:
            if callback is not None:
                callback(step)
        return self.tokenizer.decode(step.tokens)
