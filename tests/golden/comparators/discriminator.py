"""Compares the discriminator: logits, losses, and the gradients at the images and of the R1 penalty."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from comparators.comparison import TOLERANCE, Comparison, gradients, inputs, present
from comparators.folder import Folder
from comparators.losses import adversarial_losses
from comparators.tokenizer import nhwc, to_images
from maskgit_pl.checks import ImageSize
from maskgit_pl.importers.released import parameters
from maskgit_pl.networks.discriminators import Discriminator, DiscriminatorConfig, Pooling
from maskgit_pl.tokenizer.adversarial import r1_penalty

_POOLINGS: dict[str, Pooling] = {"blur": "blur", "avgpool": "average"}
_GRADIENTS_OF: str = "blur"  # the variant whose R1 penalty has recorded gradients


def widths(arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Returns the channels at each resolution, from the image's down."""
    shortcuts = []
    for number in count():
        if f"ResBlock_{number}/Conv_1/kernel" not in arrays:
            break
        shortcuts.append(arrays[f"ResBlock_{number}/Conv_1/kernel"].shape[-1])
    return (arrays["Conv_0/kernel"].shape[-1], *shortcuts)


def weights(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Converts the released code's parameters, or gradients, to our state dict."""
    last = arrays["Conv_1/kernel"].shape[-1]
    made = {}
    for path, array in arrays.items():
        *owner, kind = path.split("/")
        tensor = torch.from_numpy(np.array(array))
        if path == "Dense_0/kernel":  # rows of an (h, w, c) flattening; ours is (c, h, w)
            edge = round((len(array) / last) ** 0.5)
            tensor = rearrange(tensor, "(h w c) out -> out (c h w)", h=edge, w=edge)
        elif kind == "kernel":
            pattern = "h w i o -> o i h w" if array.ndim == 4 else "i o -> o i"
            tensor = rearrange(tensor, pattern)
        made[f"{_our_name(owner)}.{'weight' if kind == 'kernel' else 'bias'}"] = tensor
    return made


def _our_name(owner: list[str]) -> str:
    top = {"Conv_0": "stem", "Conv_1": "conv", "Dense_0": "hidden", "Dense_1": "head"}
    if len(owner) == 1:
        return top[owner[0]]
    inner = {"Conv_0": "conv1", "Conv_1": "shortcut", "Conv_2": "conv2"}
    return f"blocks.{owner[0].removeprefix('ResBlock_')}.{inner[owner[1]]}"


@dataclass(frozen=True)
class _Recorded(DiscriminatorConfig):
    """The sizes of a recorded network, which is smaller than the released one."""

    channels: tuple[int, ...] = ()

    def widths(self, image_size: ImageSize) -> tuple[int, ...]:
        return self.channels


def network_from(arrays: Mapping[str, np.ndarray], *, image_size: int, pooling: Pooling) -> Discriminator:
    """Returns the network with a checkpoint's parameters."""
    config = _Recorded(pooling=pooling, channels=widths(arrays))
    network = Discriminator(config, in_channels=arrays["Conv_0/kernel"].shape[2], image_size=image_size)
    network.load_state_dict(weights(arrays))
    return network


def compare_discriminator(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``discriminator.npz`` and the R1 penalty's gradients beside it."""
    arrays = folder.arrays(file)
    stem = file.removesuffix(".npz")
    checkpoint = parameters(folder.tree(f"{stem}_checkpoint.msgpack"))
    yield from inputs(file, arrays, ["images", "fake_images"])
    for prefix, pooling in _POOLINGS.items():
        if f"{prefix}_logits" in arrays:
            network = network_from(checkpoint, image_size=arrays["images"].shape[1], pooling=pooling)
            yield from _compare_variant(folder, file, network, prefix)


def _compare_variant(folder: Folder, file: str, network: Discriminator, prefix: str) -> Iterator[Comparison]:
    arrays = {name.removeprefix(f"{prefix}_"): array for name, array in folder.arrays(file).items()}
    images = to_images(arrays["images"]).requires_grad_()
    logits, fake_logits = network(images), network(to_images(arrays["fake_images"]))
    (gradient,) = torch.autograd.grad(logits.sum(), images, retain_graph=True)
    made = {"logits": logits, "fake_logits": fake_logits, "input_gradient": nhwc(gradient)}
    made |= adversarial_losses(logits, fake_logits)
    penalties = {}
    for name in arrays:
        if match := re.fullmatch(r"r1_penalty_cost([\d.]+)", name):
            penalties[name] = float(match[1]) * r1_penalty(logits, images)
    ours = {f"{prefix}_{name}": value for name, value in {**made, **penalties}.items()}
    yield from present(file, ours, folder.arrays(file))
    tree = file.replace(".npz", "_r1_grads.msgpack")
    if prefix == _GRADIENTS_OF and tree in folder:
        (penalty,) = penalties.values()
        names, values = zip(*network.named_parameters(), strict=True)
        # The penalty does not depend on the last bias, nor on others that move no slope.
        slopes = torch.autograd.grad(penalty, values, materialize_grads=True)
        yield from gradients(
            tree, folder.tree(tree), dict(zip(names, slopes, strict=True)), weights, tolerance=TOLERANCE
        )
