"""The configurations of the models of stage 2, the group ``model`` of a recipe. Imports no Lightning.

``mvtm.MaskedTokenModel`` and ``autoregressive.AutoregressiveModel`` are built from them, and a distillation from
``distillation.DistillationConfig``.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from maskgit_pl.checks import MAY_CHANGE, check_choice, check_folder, check_integer, check_number, check_seed
from maskgit_pl.decoding.config import AutoregressiveDecoding, DecodingConfig, set_specs
from maskgit_pl.decoding.corruption import Corruption, corruptions
from maskgit_pl.masking import MaskSampler, mask_positions, mask_ratios
from maskgit_pl.networks.backbone import BackboneConfig, Vocabulary, read_config_values
from maskgit_pl.networks.blocks import ActivationCheckpointing, Compiled
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.optimizers import OptimizerConfig
from maskgit_pl.transformer.losses import Objective, objectives

LossVocabulary = Literal["codes", "all"]


@dataclass(frozen=True)
class TokenModelConfig:
    """The fields that both models' configurations share.

    Args:
        network: Configuration of the backbone.
        optimizer: The optimizer and its learning rate.
        tokenizer: Path of the pretrained tokenizer folder; None for tokens of another tokenizer.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        loss_vocabulary: Columns of the softmax of the loss: ``codes``, or ``all`` rows of the token
            embedding. With token groups it is ``codes``: the softmax of each group.
        ema_decay: Decay of the averaged weights, which are sampled, evaluated and exported, in [0, 1); with 0 they
            are those of the last step.
        flip_probability: Probability of a horizontal flip, in [0, 1]; only for images that are encoded on the fly.
        seed: Seed of masks, class dropout, flips and dropout, in [0, 2**32).
        activation_checkpointing: ``blocks`` saves memory by computing the blocks again in the backward pass.
        compiled: ``blocks`` compiles the blocks of the trained network with ``torch.compile``.
    """

    network: Annotated[BackboneConfig, BeforeValidator(read_config_values)]
    optimizer: OptimizerConfig
    tokenizer: str | None = field(metadata=MAY_CHANGE)  # a path; the content of the folder is compared instead
    _: KW_ONLY
    label_smoothing: float = 0.1
    loss_vocabulary: LossVocabulary = "all"
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = field(default=0, metadata=MAY_CHANGE)  # that of data is compared instead
    activation_checkpointing: ActivationCheckpointing = field(default="none", metadata=MAY_CHANGE)
    compiled: Compiled = field(default="none", metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            object.__setattr__(self, "tokenizer", check_folder("tokenizer", self.tokenizer))  # a Path is no plain value
        check_number("label_smoothing", self.label_smoothing, "[0, 1)")
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)

    @property
    def loss_columns(self) -> Vocabulary:
        """The columns of the logits of the loss: ``loss_vocabulary``, or those of the token groups if there are any."""
        return self.network.loss_columns(self.loss_vocabulary)


@dataclass(frozen=True)
class MaskedTokenConfig(TokenModelConfig):
    """The configuration of ``MaskedTokenModel``: that of ``TokenModelConfig``, with bidirectional attention, and masks.

    Args:
        global_batch: Samples per step over all ranks and micro-batches. The mask ratios of a global batch are
            stratified; see ``MaskSampler``.
        mask_schedule: Name or mapping of a registered mask schedule, for training and decoding; this and the
            following parts may be objects of registered classes, too.
        mask_ratio: Name or mapping of a registered distribution of the mask ratio in training.
        mask_positions: Name or mapping of a registered rule for the positions that are masked in training.
        corruption: Name or mapping of a registered corruption, what the network sees of the tokens in training.
        objective: Name or mapping of a registered objective, the loss of the training.
        decoding: Decoding settings for sample images, and of the exported model.

    Raises:
        ValueError: if a number is out of range, a name is unknown, there are more decoding steps than tokens, or
            guidance is set without a null class.
    """

    _: KW_ONLY
    global_batch: int = field(metadata=MAY_CHANGE)  # that of data is compared instead
    mask_schedule: str | dict[str, Any] = "cosine"
    mask_ratio: str | dict[str, Any] = "schedule"
    mask_positions: str | dict[str, Any] = "uniform"
    corruption: str | dict[str, Any] = "mask"
    objective: str | dict[str, Any] = "masked_cross_entropy"
    decoding: DecodingConfig = field(default=DecodingConfig(), metadata=MAY_CHANGE)  # only of pictures and exports

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("network.attention", self.network.attention, ("bidirectional",))
        set_specs(
            self,
            mask_schedule=mask_schedules,
            mask_ratio=mask_ratios,
            mask_positions=mask_positions,
            corruption=corruptions,
            objective=objectives,
        )
        check_integer("global_batch", self.global_batch, "[1, 4294967296]")
        _ = self.sampler, self.built_corruption, self.built_objective  # raises if a part is unknown or wrong
        check_decoding(self.decoding, self.network, is_autoregressive=False)

    @cached_property
    def sampler(self) -> MaskSampler:
        """The sampler of the masks. Its schedule is the one that decoding follows."""
        return MaskSampler(
            mask_schedules.build(self.mask_schedule),
            self.seed,
            mask_ratios.build(self.mask_ratio),
            mask_positions.build(self.mask_positions),
        )

    @cached_property
    def built_corruption(self) -> Corruption:
        """The corruption that ``corruption`` names."""
        return corruptions.build(self.corruption)

    @cached_property
    def built_objective(self) -> Objective:
        """The objective that ``objective`` names."""
        return objectives.build(self.objective)


@dataclass(frozen=True)
class AutoregressiveConfig(TokenModelConfig):
    """The configuration of ``AutoregressiveModel``: that of ``TokenModelConfig``, with causal attention.

    Args:
        decoding: Decoding settings for sample images, and of the exported model.

    Raises:
        ValueError: if a number is out of range, a name is unknown, or guidance is set without a null class.
    """

    _: KW_ONLY
    decoding: AutoregressiveDecoding = field(default=AutoregressiveDecoding(), metadata=MAY_CHANGE)  # as in ``mvtm``

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("network.attention", self.network.attention, ("causal",))
        if self.network.condition_dim:
            raise ValueError(
                f"network.condition_dim must be 0 with causal attention, got {self.network.condition_dim}: its "
                "sampling takes no vectors; use bidirectional attention"
            )
        check_decoding(self.decoding.to_config(self.network.num_tokens), self.network, is_autoregressive=True)


def check_decoding(decoding: DecodingConfig, network: BackboneConfig, *, is_autoregressive: bool) -> None:
    """Checks that a network supports decoding settings: names, numbers, and guidance only with a null class."""
    try:
        decoding.check(network.num_tokens, is_autoregressive=is_autoregressive)
    except ValueError as error:
        raise ValueError(f"decoding: {error}") from error
    if any(decoding.scales()) and network.null_label is None:
        raise ValueError(
            f"decoding.guidance must have scale 0 for a network without a null class, got {decoding.guidance!r} with "
            "class_dropout 0; set model.network.class_dropout above 0 or model.decoding.guidance to constant"
        )
