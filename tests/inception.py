"""Writes a weight file of InceptionV3 with random weights, for tests of feature networks."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from maskgit_pl.networks.features import Inception


def save_inception(file: Path) -> tuple[Path, str]:
    """Writes random weights whose features differ between images; returns the file and its SHA-256."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Inception()
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
        nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()
