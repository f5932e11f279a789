"""The table of GPUs: peak rates and memory."""

import pytest

from maskgit_pl.training.gpus import GPUS, find_gpu


@pytest.mark.parametrize(("name", "key"), [
    ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA L40S", "l40s"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("NVIDIA L40", None),
    ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
])  # fmt: skip
def test_a_card_is_found_by_its_name_and_cards_of_other_rates_are_not(name, key):
    assert find_gpu(name) is GPUS.get(key)
