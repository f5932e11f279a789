"""``Caches``: all that a pipeline keeps of the weights of a transformer to decode faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from maskgit_pl.decoding import FirstStepLogits
from maskgit_pl.networks.kernels import free_packed
from maskgit_pl.networks.weight_changes import WeightWatch

if TYPE_CHECKING:
    from maskgit_pl.decoding import ConditionalNetwork
    from maskgit_pl.pipeline.networks import PretrainedTransformer

__all__ = ["Caches"]


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
        """Removes everything if the weights may have changed since the last call; see ``networks.weight_changes``."""
        if self._watch.has_changed():
            free_packed(self._network)
            self.first_step.clear()
