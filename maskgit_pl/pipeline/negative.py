"""The negative model of autoguidance: a weaker transformer of the same tokens, from which guidance moves away.

It is usually an early checkpoint of the same run, or a smaller model. ``Caches`` holds what is kept of the weights of
any transformer to decode faster. ``Generator`` uses both.

Source: Karras et al., arXiv:2406.02507.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias, Union, cast

import torch

from maskgit_pl.decoding import ConditionalModel, ConditionalNetwork, FirstStepLogits
from maskgit_pl.networks.kernels import WeightWatch, free_packed
from maskgit_pl.networks.weights import tensors_digest
from maskgit_pl.pipeline.fine_tuning import PretrainedTransformer
from maskgit_pl.pipeline.pretrained import load_transformer
from maskgit_pl.pipeline.sharing import find_transformer

__all__ = [
    "Caches",
    "NegativeModel",
    "NegativeModelLike",
]

NegativeModelLike: TypeAlias = Union[Path, str, PretrainedTransformer, "_Pipeline", "NegativeModel"]


@dataclass(frozen=True)
class NegativeModel:
    """A weaker transformer of the same tokens, from which guidance moves away.

    Args:
        transformer: The transformer. Its size and backbone may differ from those of the model that generates.
        folder: Transformer folder that it was read from; None if it came from memory.
        pipeline_caches: Caches of the pipeline that it belongs to; None if there is none.
    """

    transformer: PretrainedTransformer
    folder: Path | None = None
    pipeline_caches: Caches | None = None

    @classmethod
    def of(cls, given: NegativeModelLike) -> NegativeModel:
        """Returns the negative model of a folder, a repository of the Hub, a pipeline or a transformer.

        Raises:
            FileNotFoundError: if there is no such folder.
            TypeError: if it is something else.
            ValueError: if a file is damaged.
        """
        if isinstance(given, NegativeModel):
            return given
        if isinstance(given, str | Path):
            folder = find_transformer(given)
            return cls(load_transformer(folder), folder)
        transformer = getattr(given, "transformer", given)
        if not isinstance(transformer, PretrainedTransformer):
            raise TypeError(
                "negative_model must be a folder, a repository of the Hub, a MaskGIT or a PretrainedTransformer, got "
                f"{type(given).__name__}"
            )
        return cls(transformer, pipeline_caches=getattr(given, "caches", None))

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.transformer.network.parameters()).device

    @cached_property
    def digest(self) -> str:
        """The SHA-256 in hex of the weights, which identifies the model in plans and ledgers."""
        return tensors_digest(self.transformer.network.state_dict().items())

    @cached_property
    def caches(self) -> Caches:
        """The packed weights, and the logits of the first step."""
        return self.pipeline_caches or Caches(self.transformer)

    def check(self, model: PretrainedTransformer) -> None:
        """Checks that both models predict the same tokens of the same classes, in any order.

        Raises:
            ValueError: if they do not. The message names the difference.
        """
        own, other = model.network.config, self.transformer.network.config
        if model.mask_schedule is None or self.transformer.mask_schedule is None:
            which = "model that generates" if model.mask_schedule is None else "negative model"
            raise ValueError(
                f"negative_model must be used with bidirectional attention in both models, but the {which} is "
                "autoregressive; leave negative_model out, or choose other runs"
            )
        if self.transformer.tokenizer_fingerprint != model.tokenizer_fingerprint:
            raise ValueError(
                "negative_model must be trained on the tokens of the same tokenizer, whose fingerprint is "
                f"{model.tokenizer_fingerprint[:12]}, got {self.transformer.tokenizer_fingerprint[:12]}; choose "
                "another checkpoint of the same run, or a run with the same tokenizer"
            )
        for name in ("codebook_size", "grid"):
            if getattr(other, name) != getattr(own, name):
                raise ValueError(
                    f"negative_model must have {name} {getattr(own, name)}, as the model that generates, got "
                    f"{getattr(other, name)}; choose another checkpoint of the same run"
                )
        if other.condition_dim not in (0, own.condition_dim):
            raise ValueError(
                f"negative_model must be trained without vectors, or with vectors of {own.condition_dim} values as the "
                f"model that generates, got {other.condition_dim}; choose another checkpoint of the same run"
            )
        if self.transformer.class_names != model.class_names:
            raise ValueError(
                f"negative_model must have the classes {list(model.class_names[:10])} of the model that generates, got "
                f"{list(self.transformer.class_names[:10])}; choose a run with the same data"
            )

    def check_labels(self, labels: list[int]) -> None:
        """Checks that the network knows all labels, of which the null label may be missing.

        Raises:
            ValueError: if it has no null class, and a label is the null label.
        """
        config = self.transformer.network.config
        if config.null_label is None and max(labels) >= config.num_classes:
            raise ValueError(
                'negative_model must have a null class for results of "no class", but it was trained with '
                "class_dropout 0; name classes, or choose another negative_model"
            )

    def check_device(self, device: torch.device) -> None:
        """Checks that the network is on a device.

        Raises:
            ValueError: if it is not.
        """
        if self.device != device:
            raise ValueError(
                f"negative_model must be on {device}, the device of the model that generates, got {self.device}; move "
                "it with .to(), or name its folder"
            )

    def conditional_model(self) -> ConditionalModel[ConditionalNetwork]:
        """Returns the network with its ids and caches, for a predictor."""
        network, first_step = self.transformer.network, self.caches.first_step
        made = ConditionalModel.from_network(network, self.device, first_step_logits=first_step)
        return cast("ConditionalModel[ConditionalNetwork]", made)

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> None:
        """Moves and casts the network in place."""
        self.transformer.network.to(device=device, dtype=dtype)
        self.caches.clear()


class Caches:
    """The packed weights of a transformer, and the logits of the first step of each class.

    Args:
        transformer: The transformer.

    Attributes:
        first_step: Logits of the first step. An autoregressive model does not use them.
    """

    def __init__(self, transformer: PretrainedTransformer) -> None:
        config = transformer.network.config
        self._network = transformer.network
        self._watch = WeightWatch(self._network)
        self.first_step = FirstStepLogits(
            cast("ConditionalNetwork", transformer.network),
            num_tokens=config.num_tokens,
            mask_token_id=config.mask_token_id,
        )

    def clear(self) -> None:
        """Removes everything."""
        self._watch = WeightWatch(self._network)  # the old one keeps the memory of the old weights
        free_packed(self._network)
        self.first_step.clear()

    def follow_weights(self) -> None:
        """Removes everything if the weights may have changed since the last call; see ``networks.kernels``."""
        if self._watch.has_changed():
            free_packed(self._network)
            self.first_step.clear()


class _Pipeline(Protocol):
    """A pipeline such as ``MaskGIT``, whose transformer is used."""

    @property
    def transformer(self) -> PretrainedTransformer:
        """The transformer."""
