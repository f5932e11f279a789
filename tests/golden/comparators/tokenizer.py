"""Compares the VQGAN: features, codes, images, losses and their gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from comparators.comparison import Comparison, gradients, inputs, present
from comparators.folder import Folder
from comparators.losses import reconstruction_loss
from comparators.transformer import recorded_outputs
from maskgit_pl.importers.released import parameters, tokenizer_config, tokenizer_weights
from maskgit_pl.networks.codebooks import GradientQuantizerSpec
from maskgit_pl.networks.quantizers import QuantizerOutput, entropy_loss
from maskgit_pl.networks.vqgan import VQGAN, Activation, Downsample, Encoder, ResidualBlock

_GRADIENT_TOLERANCE = 1e-3  # of the largest gradient: distances are divided by a small entropy temperature


def network_from(
    arrays: dict[str, np.ndarray],
    *,
    activation: Activation = "swish",
    quantizer: GradientQuantizerSpec = GradientQuantizerSpec(),  # noqa: B008  # frozen
) -> VQGAN:
    """The network of a checkpoint's parameters."""
    spec = {"name": "gradient", **asdict(quantizer)}
    config = replace(tokenizer_config(arrays, activation=activation), quantizer=spec)
    with torch.device("meta"):
        network = VQGAN(config)
    network.load_state_dict(tokenizer_weights(arrays, config), assign=True)
    return network


def to_images(array: np.ndarray) -> Tensor:
    """Converts a (B, H, W, C) array to a (B, C, H, W) tensor."""
    return rearrange(torch.from_numpy(array), "b h w c -> b c h w")


def nhwc(x: Tensor) -> Tensor:
    """Converts (B, C, H, W) to (B, H, W, C)."""
    return rearrange(x, "b c h w -> b h w c")


def compare_vqvae(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``vqvae*.npz`` and the gradients beside it."""
    arrays = folder.arrays(file)
    network = _load(folder, file)
    yield from inputs(file, arrays, ["images", "random_indices"])
    for made, note in _stages(network, arrays):
        yield from present(file, made, arrays, note=note)
    if "total_loss" in arrays:
        yield from _compare_training(folder, file, network)


def _load(folder: Folder, file: str) -> VQGAN:
    """The imported network, with the manifest's numbers of the quantizer.

    A checkpoint does not tell its activation, so that one is taken whose encoder comes nearest to the recorded output.
    """
    checkpoint = file.replace(".npz", "_checkpoint.msgpack")
    weights, arrays = parameters(folder.tree(checkpoint)), folder.arrays(file)
    sizes = folder.config["vq"]
    spec = GradientQuantizerSpec(
        commitment=sizes["commitment_cost"],
        entropy_weight=sizes["entropy_loss_ratio"],
        entropy_temperature=sizes["entropy_temperature"],
        entropy_kind=sizes["entropy_loss_type"],
    )
    networks = [network_from(weights, activation=activation, quantizer=spec) for activation in get_args(Activation)]
    images, recorded = to_images(arrays["images"]), to_images(arrays["encoder_output"])
    with torch.no_grad():
        return min(networks, key=lambda network: float((network.encoder(images) - recorded).abs().max()))


@torch.no_grad()
def _stages(network: VQGAN, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Yields all arrays but those of training, from the images and from recorded inputs, with a note on which."""
    assert isinstance(network.encoder, Encoder)
    with recorded_outputs(_modules(network.encoder)) as inside:
        features = network.encoder(to_images(arrays["images"]))
    yield {name: nhwc(output) for name, output in inside.items()}, ""
    # A distance sums 2 x times the features' error over a code's numbers, so distances need the recorded features.
    yield {"encoder_output": nhwc(features), "indices": coded(network, features, arrays)["indices"]}, "from the images"
    yield coded(network, to_images(arrays["encoder_output"]), arrays), "from the recorded encoder output"
    for name in ("indices", "random_indices"):
        if name in arrays:
            yield _decoded(network, torch.from_numpy(arrays[name]).long(), name), ""
    if "distances" in arrays:
        yield _from_distances(torch.from_numpy(arrays["distances"]), arrays), "from the recorded distances"


def _modules(encoder: Encoder) -> dict[str, nn.Module]:
    """The encoder's parts under the names that flax numbers them by."""
    blocks = [block for block in encoder.blocks if isinstance(block, ResidualBlock)]
    halvings = [block for block in encoder.blocks if isinstance(block, Downsample)]
    convolutions = [encoder.stem, *halvings, encoder.head]
    return {
        "enc_GroupNorm_0": encoder.norm,
        **{f"enc_ResBlock_{number}": block for number, block in enumerate(blocks)},
        **{f"enc_Conv_{number}": convolution for number, convolution in enumerate(convolutions)},
    }


def coded(network: VQGAN, features: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Returns the arrays that follow from features (B, D, h, w), by their recorded names."""
    distances = network.quantizer.distances(rearrange(features, "b d h w -> (b h w) d"))
    indices = rearrange(network.quantizer.nearest(features), "b (h w) -> b h w", h=features.shape[-2])
    return {"distances": distances, "indices": indices, **_from_distances(distances, arrays)}


def _from_distances(distances: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    two = distances.topk(2, largest=False).values
    made = {"nearest_gap": two[:, 1] - two[:, 0]}
    for name in arrays:
        if match := re.fullmatch(r"entropy_(softmax|argmax)_T([\d.e-]+)", name):
            made[name] = entropy_loss(-distances, temperature=float(match[2]), kind=match[1])  # type: ignore[arg-type]  # a name of the recording
    return made


def _decoded(network: VQGAN, indices: Tensor, name: str) -> dict[str, Tensor]:
    """Returns the codes and images of recorded indices (B, h, w)."""
    grid = (indices.shape[1], indices.shape[2])
    made = {f"decoded_from_{name}": nhwc(network.decode(indices.flatten(1), grid))}
    return {**made, "quantized": network.quantizer.lookup(indices)} if name == "indices" else made


def _compare_training(folder: Folder, file: str, network: VQGAN) -> Iterator[Comparison]:
    """Computes the losses of a training step, and the gradient of their sum."""
    arrays = folder.arrays(file)
    images = to_images(arrays["images"])
    reconstruction, quantized, _ = network(images)
    loss = reconstruction_loss(reconstruction, images, kind="l2") + quantized.loss
    made = {
        "train_quantized": nhwc(quantized.quantized),
        "train_decoded": nhwc(reconstruction),
        "quantizer_loss": quantized.loss,
        "reconstruction_l1": reconstruction_loss(reconstruction, images, kind="l1"),
        "reconstruction_l2": reconstruction_loss(reconstruction, images, kind="l2"),
        "total_loss": loss,
        **_parts(network, quantized.features),
    }
    yield from present(file, made, arrays)
    tree = file.replace(".npz", "_grads.msgpack")
    if tree in folder:
        recorded = folder.tree(tree)
        names, values = zip(*network.named_parameters(), strict=True)
        ours = dict(zip(names, torch.autograd.grad(loss, values), strict=True))
        tolerance = _GRADIENT_TOLERANCE * max(float(np.abs(array).max()) for array in recorded.values())
        to_ours = lambda arrays: tokenizer_weights(arrays, network.config)  # noqa: E731  # one expression, named for the reader
        yield from gradients(tree, recorded, ours, to_ours, tolerance=tolerance)


def _parts(network: VQGAN, features: Tensor) -> dict[str, Tensor]:
    """The quantizer's three losses, each from a quantizer that has the others switched off."""
    spec, config = network.quantizer.spec, network.config
    assert isinstance(spec, GradientQuantizerSpec)

    def loss(*, commitment: float, entropy_weight: float) -> Tensor:
        part = replace(spec, commitment=commitment, entropy_weight=entropy_weight)
        quantizer = part.create(codebook_size=config.codebook_size, code_dim=config.code_dim)
        quantizer.load_state_dict(network.quantizer.state_dict())
        output: QuantizerOutput = quantizer(features)
        return output.loss

    codebook = loss(commitment=0.0, entropy_weight=0.0)
    return {
        "q_latent_loss": codebook,
        "e_latent_loss": loss(commitment=spec.commitment, entropy_weight=0.0) - codebook,
        "entropy_loss": loss(commitment=0.0, entropy_weight=spec.entropy_weight) - codebook,
    }
