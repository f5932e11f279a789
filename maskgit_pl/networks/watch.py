"""Changes of weights, after which nothing that was computed from them may be used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# All entries of a tensor of at most 4096 are compared, else every 509th: the number is prime, so they lie in different
# columns. For the released size this takes 0.3 % of the time of one image on a CPU; all entries take 1.2 to 2.4 %.
_SMALL_WEIGHT, _STRIDE = 4096, 509


class WeightWatch:
    """Detects changes of the weights of a network, so that nothing computed from old weights is used after them.

    torch counts operations in place, such as those of ``load_state_dict``. It does not count fused optimizers, nor
    writes to ``weight.data`` or to the memory of a weight through NumPy. The changes are therefore found in three ways:

    1. ``Tensor._version`` counts operations in place.
    2. A hook counts the steps of all optimizers of the process.
    3. A sample of the weights is compared with their earlier values, which finds the writes that nothing
       counts. Only writes to few entries can stay unnoticed.

    ``FastLinear`` uses 1 and 2 at every call, a pipeline all three at every call of its methods.

    Args:
        network: The network. Its parameters and buffers are compared.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._marks: list[tuple[int, tuple[int, int]]] = []
        self._parts: list[Tensor] = []  # views of the weights
        self._sample = torch.empty(0)
        self.has_changed()

    def has_changed(self) -> bool:
        """Returns True if the weights may have changed since the last call, at first since the watch was made."""
        weights = [*self._network.parameters(), *self._network.buffers()]
        marks = [(weight.data_ptr(), count_changes(weight)) for weight in weights]
        is_counted = marks != self._marks
        if is_counted:
            self._marks, self._parts = marks, [_view_sample(weight) for weight in weights]
        sample, before = torch.cat(self._parts), self._sample
        self._sample = sample
        return is_counted or not torch.equal(sample, before)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, which have other memory."""
        return self.__dict__ | {"_marks": [], "_parts": [], "_sample": torch.empty(0)}


def _view_sample(weight: Tensor) -> Tensor:
    """Returns the compared entries of a weight: a view, if the weight is contiguous."""
    return weight.detach().reshape(-1)[:: _STRIDE if weight.numel() > _SMALL_WEIGHT else 1]


def count_changes(weight: Tensor) -> tuple[int, int]:
    """Returns two numbers that differ after an optimizer step and after an operation in place on a weight."""
    # torch does not count the changes of tensors that were made in inference mode.
    return _Steps.count, 0 if weight.is_inference() else weight._version


class _Steps:
    """The number of steps of all optimizers of the process."""

    count = 0


def _count_step(*_: object) -> None:
    _Steps.count += 1


register_optimizer_step_post_hook(_count_step)
