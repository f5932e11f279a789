"""The decoding settings in plain values, as recipes, pretrained folders and ``decoding.json`` store them.

Used by the pipeline, the command line and both training stages. torch is imported only to build a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import (
    check_integer,
    check_number,
    plain_list,
    plain_number,
)
from maskgit_pl.decoding.guidance import check_guidance, guidance_scales, guidance_schedules
from maskgit_pl.decoding.sampling import CodeSampling, Temperature
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.registry import Registry
from maskgit_pl.schedules import MaskSchedule, mask_schedules

if TYPE_CHECKING:
    from maskgit_pl.decoding.autoregressive import AutoregressiveDecoder
    from maskgit_pl.decoding.corruption import Corruption
    from maskgit_pl.decoding.decoder import ParallelDecoder

_MOST_STEPS = 2**16  # the tokens of the largest grid
# The settings that an autoregressive model does not have: it masks nothing, and its order is fixed.
_ONLY_PARALLEL = ("token_selector", "mask_schedule", "tokens_per_step", "random_start")


@dataclass(frozen=True)
class DecodingConfig:
    """The decoding settings of a model in plain values.

    Args:
        num_steps: T, number of decoding steps, in [1, 65536].
        token_selector: Name or mapping of a registered token selector, or an object of its class; None for an
            autoregressive model, which draws tokens in raster order.
        guidance: Name, mapping or object of a registered guidance schedule.
        sampling_temperature: Temperature of the logits, >= 0: a number, or two for the first and the last step.
        top_k: Number of most likely codes to draw from, >= 1; None draws from all.
        tokens_per_step: Number of tokens that each step decides, in place of the mask schedule: T integers.
        mask_schedule: Name, mapping or object of a mask schedule to decode with; None uses that of the training.
        random_start: Probability that the network sees a random code in place of a mask token in the first step, in
            [0, 1]. Models that are distilled to few steps need it (``distillation``).
    """

    num_steps: int = 8
    token_selector: str | dict[str, Any] | None = "confidence"
    guidance: str | dict[str, Any] = "constant"
    sampling_temperature: Temperature = 1.0
    top_k: int | None = None
    tokens_per_step: tuple[int, ...] | None = None
    mask_schedule: str | dict[str, Any] | None = None
    random_start: float = 0.0

    def __post_init__(self) -> None:
        set_specs(self, token_selector=token_selectors, guidance=guidance_schedules, mask_schedule=mask_schedules)
        for name in ("num_steps", "sampling_temperature", "top_k", "random_start", "tokens_per_step"):
            pair = plain_list(getattr(self, name))
            plain = plain_number(getattr(self, name)) if pair is None else tuple(pair)  # JSON has no tuples
            object.__setattr__(self, name, plain)
        check_integer("num_steps", self.num_steps, f"[1, {_MOST_STEPS}]")
        check_number("random_start", self.random_start, "[0, 1]")

    @property
    def is_autoregressive(self) -> bool:
        """Returns True for the settings of an autoregressive model."""
        return self.token_selector is None

    def build_decoder(
        self, mask_schedule: MaskSchedule | None, corruption: Corruption | None = None
    ) -> ParallelDecoder:
        """Builds the decoder that follows ``mask_schedule``, or the schedule that these settings name.

        ``corruption`` is that of the training if it is part of decoding, too.

        Raises:
            ValueError: if a name is unknown, a number is out of range, or ``token_selector`` is None.
        """
        if self.token_selector is None:
            raise ValueError(
                "token_selector must be a name or a mapping for parallel decoding, got None (autoregressive decoding); "
                f"known: {', '.join(token_selectors.names())}"
            )
        from maskgit_pl.decoding.decoder import ParallelDecoder

        schedule = mask_schedule if self.mask_schedule is None else mask_schedules.build(self.mask_schedule)
        assert schedule is not None  # of an autoregressive model
        return ParallelDecoder(
            schedule,
            token_selectors.build(self.token_selector),
            num_steps=self.num_steps,
            sampling=self._build_sampling(),
            tokens_per_step=self.tokens_per_step,
            random_start=self.random_start,
            corruption=corruption,
        )

    def build_autoregressive_decoder(self, num_tokens: int) -> AutoregressiveDecoder:
        """Builds the decoder of an autoregressive model.

        Args:
            num_tokens: N, tokens per image.

        Raises:
            ValueError: if an autoregressive model does not support a setting, or a number is out of range.
        """
        for name in _ONLY_PARALLEL:
            if getattr(self, name):
                raise ValueError(
                    f"{name} must not be set for an autoregressive model, which draws one token per step in raster "
                    f"order, got {getattr(self, name)!r}; leave it out, or use a model with bidirectional attention"
                )
        if self.num_steps != num_tokens:
            raise ValueError(
                f"num_steps must be {num_tokens} for an autoregressive model, one step per token, got "
                f"{self.num_steps}; leave it out, or use a model with bidirectional attention"
            )
        from maskgit_pl.decoding.autoregressive import AutoregressiveDecoder

        return AutoregressiveDecoder(num_tokens, self._build_sampling())

    def check(self, num_tokens: int, *, is_autoregressive: bool, has_negative_class: bool = True) -> None:
        """Checks that a model supports the settings, by building the decoder.

        Args:
            num_tokens: N, tokens per image.
            is_autoregressive: True if the model draws one token per step.
            has_negative_class: True if guidance has a class to push images away from.

        Raises:
            TypeError: if a part does not take its arguments.
            ValueError: if a name is unknown, a number is out of range, an autoregressive model does not
                support a setting, or guidance has no class to push images away from.
        """
        if is_autoregressive:
            self.build_autoregressive_decoder(num_tokens)
        else:
            # The schedule of the training is not known here; every schedule has counts for N tokens.
            self.build_decoder(mask_schedules.build("cosine")).plan([num_tokens], num_tokens)
        check_guidance(self.scales(), has_negative_class=has_negative_class)

    def _build_sampling(self) -> CodeSampling:
        return CodeSampling(self.sampling_temperature, self.top_k)

    def scales(self) -> tuple[float, ...]:
        """Returns the guidance scale of each step."""
        return guidance_scales(guidance_schedules.build(self.guidance), self.num_steps)


@dataclass(frozen=True)
class AutoregressiveDecoding:
    """The decoding settings of an autoregressive model in plain values, as its recipe holds them.

    Args:
        guidance: Name or mapping of a registered guidance schedule.
        sampling_temperature: Temperature of the logits, >= 0: a number, or two for the first and the last token.
        top_k: Number of most likely codes to draw from, >= 1; None draws from all.
    """

    guidance: str | dict[str, Any] = "constant"
    sampling_temperature: Temperature = 1.0
    top_k: int | None = None

    def to_config(self, num_tokens: int) -> DecodingConfig:
        """Returns the settings for images of ``num_tokens`` tokens, in the form that a pretrained folder stores."""
        return DecodingConfig(num_tokens, None, **vars(self))


def set_specs(config: object, **registries: Registry[Any]) -> None:
    """Replaces the parts of a frozen configuration by their specs, plain values from which a registry builds them.

    Args:
        config: Dataclass whose field is a name, a mapping, an object of a registered class, or None.
        registries: Registry of the names of each field.
    """
    for name, registry in registries.items():
        if getattr(config, name) is not None:
            object.__setattr__(config, name, registry.spec(getattr(config, name)))
