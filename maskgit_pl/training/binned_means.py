"""Mean loss and accuracy of groups of predicted tokens, such as those of rows with a similar mask ratio.

``training.token_model.TokenModel`` logs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NUM_BINS", "BinnedMeans"]

NUM_BINS = 4
"""The number of groups of predicted tokens whose losses are logged separately."""


class BinnedMeans:
    """Sums over the predicted tokens of this rank since the last reading, by group.

    Args:
        binned_by: The quantity that the groups are ranges of, in the names of logged values.
    """

    def __init__(self, binned_by: str) -> None:
        self.binned_by = binned_by
        self._sums: Tensor | None = None  # (bins + 1, 3) of predicted tokens: count, summed loss, summed hits

    def add(self, bins: Tensor, token_loss: Tensor, hits: Tensor) -> None:
        """Adds predicted tokens.

        Args:
            bins: (M,) int64 in [0, 4], the group of each token; tokens with 4 are not counted.
            token_loss: (M,) float, the loss of each token.
            hits: (M,) float, 1 where the prediction is right.
        """
        values = torch.stack([torch.ones_like(hits), token_loss.detach(), hits], dim=1)  # (M, 3)
        # Made on the device: a copy from the host would wait. Each call has sums of its own: in float32, single values
        # that are added to a sum of millions are rounded.
        sums = torch.zeros(NUM_BINS + 1, 3, device=values.device).index_add(0, bins, values)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, loss: Tensor) -> dict[str, float]:
        """Returns the loss of a step with the means of all groups that have tokens, and starts new sums.

        Call it after ``add``.

        Args:
            loss: Scalar loss of the step.
        """
        # One copy to the host for all values: each copy waits for the device.
        assert self._sums is not None
        value, *sums = torch.cat([loss.reshape(1), self._sums[:NUM_BINS].flatten()]).tolist()
        self._sums = None
        bins = list(zip(sums[::3], sums[1::3], sums[2::3], strict=True))
        accuracy = sum(hits for *_, hits in bins) / sum(count for count, *_ in bins)
        metrics = {"train/loss": value, "train/accuracy": accuracy}
        for number, (count, summed_loss, hits) in enumerate(bins):
            if count:
                name = f"{self.binned_by}-{number / NUM_BINS:.2f}-{(number + 1) / NUM_BINS:.2f}"
                metrics[f"train/loss/{name}"] = summed_loss / count
                metrics[f"train/accuracy/{name}"] = hits / count
        return metrics
