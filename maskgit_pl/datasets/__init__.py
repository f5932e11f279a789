"""Public data sets that ``maskgit data fetch`` downloads, checks and opens as sources of samples.

A new one is a subclass of ``Dataset`` in a file of its own, listed in ``DATASETS``. Imports no torch.
"""

from maskgit_pl.datasets.base import Dataset
from maskgit_pl.datasets.blue_marble import BlueMarble
from maskgit_pl.datasets.fashion_mnist import FashionMNIST

__all__ = ["DATASETS", "Dataset"]

DATASETS: dict[str, Dataset] = {each.name: each for each in (FashionMNIST(), BlueMarble())}
"""The data sets by name."""
