"""The common configuration of both models of stage 2, and its checks against decoding settings and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

from maskgit_pl.checks import check_choice, check_number, check_seed
from maskgit_pl.data.batches import Batch, check_batch
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.image_format import height_width
from maskgit_pl.networks.backbone import BackboneConfig, Vocabulary
from maskgit_pl.pipeline.networks import PretrainedTokenizer
from maskgit_pl.training.compile_and_checkpointing import ActivationCheckpointing, Compiled
from maskgit_pl.training.optimizers import OptimizerConfig

__all__ = ["LossVocabulary", "TokenModelConfig", "check_decoding", "check_samples", "check_tokenizer"]

LossVocabulary = Literal["codes", "all"]


@dataclass(frozen=True)
class TokenModelConfig:
    """The common fields of both models' configurations, which document them."""

    network: BackboneConfig
    optimizer: OptimizerConfig
    tokenizer: str
    _: KW_ONLY
    label_smoothing: float = 0.1
    loss_vocabulary: LossVocabulary = "all"
    ema_decay: float = 0.999
    flip_probability: float = 0.0
    seed: int = 0
    activation_checkpointing: ActivationCheckpointing = "none"
    compiled: Compiled = "none"

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, "[0, 1)")
        check_choice("loss_vocabulary", self.loss_vocabulary, get_args(LossVocabulary))
        check_number("ema_decay", self.ema_decay, "[0, 1)")
        check_number("flip_probability", self.flip_probability, "[0, 1]")
        check_seed("seed", self.seed)
        check_choice("activation_checkpointing", self.activation_checkpointing, get_args(ActivationCheckpointing))
        check_choice("compiled", self.compiled, get_args(Compiled))

    @property
    def loss_columns(self) -> Vocabulary:
        """The columns of the logits of the loss: ``loss_vocabulary``, or those of the token groups if there are any."""
        return self.network.loss_columns(self.loss_vocabulary)


def check_decoding(decoding: DecodingConfig, network: BackboneConfig, *, is_autoregressive: bool) -> None:
    """Checks that a network supports decoding settings.

    Raises:
        ValueError: if there are more steps than tokens, a name is unknown, an autoregressive model does not support a
            setting, or guidance is set without a null class.
    """
    try:
        decoding.check(network.num_tokens, is_autoregressive=is_autoregressive)
    except ValueError as error:
        raise ValueError(f"decoding: {error}") from error
    if any(decoding.scales()) and network.null_label is None:
        raise ValueError(
            f"decoding.guidance must have scale 0 for a network without a null class, got {decoding.guidance!r} with "
            "class_dropout 0; set model.network.class_dropout above 0 or model.decoding.guidance to constant"
        )


def check_tokenizer(config: BackboneConfig, tokenizer: PretrainedTokenizer) -> None:
    """Checks that a transformer has the codebook size and the grid of a tokenizer.

    Raises:
        ValueError: if it does not. The message has both values and the recipe key.
    """
    pairs = (
        ("codebook_size", config.codebook_size, tokenizer.network.config.codebook_size),
        ("grid", config.grid, tokenizer.grid),
    )
    for name, wanted, has in pairs:
        if wanted != has:
            raise ValueError(
                f"model.network.{name} must be {has}, that of the tokenizer, got {wanted}; leave the key out, or name "
                "another tokenizer"
            )


def check_samples(batch: Batch, config: BackboneConfig, tokenizer: Callable[[], PretrainedTokenizer]) -> None:
    """Checks that the samples of a batch are those of a transformer.

    Labels are checked because the rows of the embedding before and after those of the classes are codes, the null class
    and the mask token.

    Args:
        batch: The batch that the Trainer passes.
        config: Sizes of the transformer.
        tokenizer: Returns the tokenizer of images.

    Raises:
        TypeError: if the batch comes from no data module of ``maskgit_pl.data``.
        ValueError: if the samples have another shape, or a label is no class of the transformer.
    """
    if isinstance(batch, Batch) and batch.content.ndim == 4:
        found = tokenizer()
        check_batch(batch, shape=(found.network.config.in_channels, *height_width(found.image_size)))
    else:
        check_batch(batch, shape=(config.num_tokens,))
    wrong = batch.labels[(batch.labels < 0) | (batch.labels >= config.num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels of the data must be in [0, {config.num_classes}), the classes of the model, got {int(wrong[0])}; "
            "number the classes from 0, and build the model with num_classes of the data"
        )
