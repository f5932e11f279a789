"""Measures a training step of stage 1: ours, a plain one as in taming-transformers, and one with diffusers' VQModel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from measuring import DTYPES, Contender, Precision, autocast, build_parser, compare, count_work, list_precisions, start
from peers import VQMODEL, list_available
from torch import Tensor, nn
from torch.optim import AdamW
from torchvision.models import vgg

from maskgit_pl.data import Batch
from maskgit_pl.networks.classifiers import FrozenNetwork
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig, VQGANOutput, to_unit_range
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.tokenizer.losses import LossInputs, TokenizerLoss
from maskgit_pl.tokenizer.module import Tokenizer, TokenizerConfig
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig

# Source: configs/imagenet_vqgan.yaml of CompVis/taming-transformers (0.8: discriminator_weight).
_RATE, _BETAS, _ADVERSARIAL_WEIGHT, _PERCEPTUAL_WEIGHT, _COMMITMENT = 4.5e-6, (0.5, 0.9), 0.8, 1.0, 0.25
_VGG_STAGES = (0, 4, 9, 16, 23, 30)  # first layers of the five stages that LPIPS compares, and the end


@dataclass(frozen=True)
class Task:
    """The sizes of the networks and the batch: taming's f16 tokenizer with half its channels, on small images."""

    batch: int = 2
    image_size: int = 128
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_groups: int = 32
    codebook_size: int = 1024
    code_dim: int = 256
    discriminator: float = 0.25  # of the released channels
    has_perceptual: bool = True

    @property
    def network(self) -> VQGANConfig:
        return VQGANConfig(
            3, self.base_channels, self.channel_multipliers, self.num_res_blocks, num_groups=self.num_groups,
            codebook_size=self.codebook_size, code_dim=self.code_dim, layout="taming",
            attention_levels=(len(self.channel_multipliers) - 1,), latent_channels=self.code_dim,
            quantizer={"name": "gradient", "commitment": _COMMITMENT, "entropy_weight": 0.0},
        )  # fmt: skip

    @property
    def tokenizer(self) -> TokenizerConfig:
        return TokenizerConfig(
            self.network,
            self.image_size,
            OptimizerConfig(LearningRate(_RATE), _BETAS, weight_decay=0.0),
            losses=("l1",),
            adversarial=AdversarialConfig(
                DiscriminatorConfig(self.discriminator),
                loss="hinge",
                weight=_ADVERSARIAL_WEIGHT,
                weight_rule="adaptive",
                r1_weight=0.0,
            ),
        )

    def describe(self) -> str:
        """Returns the sizes in words."""
        return f"{self.image_size} px, batch {self.batch}, channels {self.network.widths}"

    def data(self) -> Batch:
        """Returns the batch that every contender trains on in every round."""
        chance = torch.Generator().manual_seed(0)
        sizes = (self.batch, 3, self.image_size, self.image_size)
        images = torch.randint(256, sizes, generator=chance, dtype=torch.uint8)
        index = torch.arange(self.batch)
        return Batch(images, torch.zeros_like(index), index, torch.zeros_like(index), index, index >= 0)


class RandomVGG(FrozenNetwork):
    """The distance LPIPS with random weights: its speed and memory are those of the trained one."""

    def __init__(self) -> None:
        super().__init__()
        layers = vgg.make_layers(vgg.cfgs["D"])
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # keeps the scale of the features over the depth
        self.stages = nn.ModuleList(layers[first:last] for first, last in pairwise(_VGG_STAGES))
        self.freeze()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the distances (B,) of images from targets, (B, 3, H, W) float in [0, 1] each."""
        pairs = zip(self._features(images), self._features(targets), strict=True)
        return torch.stack([(x - y).square().mean((2, 3)).sum(1) for x, y in pairs]).sum(0)

    def _features(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the features of each stage, normalised over the channels, (B, C, h, w) float32."""
        x = 2 * images - 1
        for stage in self.stages:
            x = stage(x)
            yield F.normalize(x.float(), dim=1)


@dataclass(frozen=True)
class _Perceptual(TokenizerLoss):
    """A stand-in for ``PerceptualConfig``, whose network must have a registered name."""

    weight: float = _PERCEPTUAL_WEIGHT

    def __call__(self, inputs: LossInputs, network: nn.Module) -> Tensor:
        distances: Tensor = network(inputs.reconstruction, inputs.images)
        return distances.mean()


@dataclass
class _Strategy:
    """A stand-in for the Trainer's strategy."""

    _lightning_optimizers: list[LightningOptimizer]

    def backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any], **_: Any) -> Any:
        return optimizer.step(closure)


def _trainer(optimizers: list[torch.optim.Optimizer]) -> SimpleNamespace:
    """Returns a stand-in for the Trainer with the attributes that the module reads."""
    strategy = _Strategy([LightningOptimizer(optimizer) for optimizer in optimizers])
    for optimizer in strategy._lightning_optimizers:
        optimizer._strategy = strategy  # type: ignore[assignment]  # stands in for the strategy
    return SimpleNamespace(
        optimizers=optimizers, strategy=strategy, global_step=1, max_steps=1_000_000, log_every_n_steps=1_000_001,
        world_size=1, callbacks=[],
    )  # fmt: skip


class Ours:
    """Our step: ``Tokenizer.training_step`` as the Trainer calls it."""

    def __init__(self, task: Task, precision: Precision) -> None:
        self.batch, self.precision = task.data(), precision
        self.module = build_tokenizer(task)
        self.trainer = _trainer(self.module.configure_optimizers())  # the module has only a weak reference to it
        self.module.trainer = self.trainer  # type: ignore[assignment]  # stands in for the Trainer

    def __call__(self) -> None:
        """Trains one step of both networks."""
        with autocast(self.precision, self.module.device.type):
            self.module.training_step(self.batch, 0)
        self.trainer.global_step += 1


class Plain:
    """The step of taming-transformers: each optimizer has its own forward pass of the generator.

    1. Generator: reconstruct; the adaptive weight differentiates both losses to the last layer, the sum once more.
    2. Discriminator: reconstruct again with the new weights; judge the images and the reconstructions.

    In each part, the weights of the other network take no gradients (Lightning's ``toggle_optimizer``).

    Args:
        network: The generator; returns a reconstruction and the loss of its quantizer.
        last_layer: Weight of its last layer.
        task: Sizes and batch.
        precision: Precision of the forward passes.

    Source: ``VQModel.training_step`` and ``VQLPIPSWithDiscriminator`` of CompVis/taming-transformers.
    """

    def __init__(self, network: nn.Module, last_layer: nn.Parameter, task: Task, precision: Precision) -> None:
        ours = build_tokenizer(task)
        assert ours.discriminator is not None
        self.network, self.last_layer, self.precision = network, last_layer, precision
        self.discriminator, self.perceptual = ours.discriminator, ours.loss_terms.networks.get("perceptual")
        self.images = to_unit_range(task.data().content)
        self.networks = network, self.discriminator
        weights = [each.parameters() for each in self.networks]
        self.optimizers = [AdamW(each, _RATE, _BETAS, weight_decay=0.0, fused=True) for each in weights]

    def __call__(self) -> None:
        """Trains one step of both networks."""
        for part, optimizer in zip((self.train_generator, self.train_discriminator), self.optimizers, strict=True):
            part()
            optimizer.step()
            optimizer.zero_grad()

    def train_generator(self) -> None:
        """Adds the gradients of the generator."""
        with _frozen(self.discriminator), autocast(self.precision):
            reconstruction, quantizer_loss = self._reconstruct()
            similarity = (reconstruction.float() - self.images).abs().mean()
            if self.perceptual is not None:
                similarity = similarity + _PERCEPTUAL_WEIGHT * self.perceptual(reconstruction, self.images).mean()
            adversarial = -self.discriminator(reconstruction).float().mean()
            norms = [
                torch.autograd.grad(loss, self.last_layer, retain_graph=True)[0].norm()
                for loss in (similarity, adversarial)
            ]
            weight = _ADVERSARIAL_WEIGHT * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
            loss = similarity + weight * adversarial + quantizer_loss
        loss.backward()

    def train_discriminator(self) -> None:
        """Adds the gradients of the discriminator."""
        with _frozen(self.network), autocast(self.precision):
            reconstruction, _ = self._reconstruct()
            real, fake = (self.discriminator(x.detach()).float() for x in (self.images, reconstruction))
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        loss.backward()

    def _reconstruct(self) -> tuple[Tensor, Tensor]:
        output = self.network(self.images)
        if isinstance(output, VQGANOutput):
            return output.reconstruction, output.quantized.loss
        return output.sample, output.commit_loss  # diffusers


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Lets the weights of a network take no gradients."""
    network.requires_grad_(requires_grad=False)
    yield
    network.requires_grad_(requires_grad=True)


def build_tokenizer(task: Task) -> Tokenizer:
    """Returns our module with the weights that every contender starts from."""
    torch.manual_seed(0)
    module = Tokenizer(task.tokenizer)
    if task.has_perceptual:
        # Not by name: a registered network would stay registered.
        module.loss_terms.terms["perceptual"] = _Perceptual()
        module.loss_terms.networks["perceptual"] = RandomVGG()
    return module


def build_plain(task: Task, precision: Precision) -> Plain:
    """Returns the plain step with the networks and the initial weights of ``Ours``."""
    network: VQGAN = copy.deepcopy(build_tokenizer(task).network)
    return Plain(network, network.decoder.head.weight, task, precision)


def build_diffusers(task: Task) -> nn.Module:
    """Returns the VQModel of diffusers of the same sizes; its attention is in the middle only."""
    from diffusers import VQModel

    levels = len(task.channel_multipliers)
    network: nn.Module = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=task.network.widths,
        layers_per_block=task.num_res_blocks,
        latent_channels=task.code_dim,
        num_vq_embeddings=task.codebook_size,
        norm_num_groups=task.num_groups,
        vq_embed_dim=task.code_dim,
    )
    return network


def build_peer(task: Task, precision: Precision) -> Plain:
    """Returns the plain step with the network of diffusers."""
    network: Any = build_diffusers(task)
    return Plain(network, network.decoder.conv_out.weight, task, precision)


STEPS: dict[str, Callable[[Task, Precision], Ours | Plain]] = {"ours": Ours, "plain": build_plain, VQMODEL: build_peer}


def build(name: str, task: Task, precision: Precision) -> Ours | Plain:
    """Builds a training step; ours and the plain one start from the same weights."""
    torch.manual_seed(0)
    return STEPS[name](task, precision)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = start(build_parser(__doc__, batch_size=Task.batch, image_size=Task.image_size), argv)
    task = Task(arguments.batch_size, arguments.image_size)
    print(task.describe())
    names, contenders = list_available(list(STEPS)), []
    for precision in list_precisions():
        for name in names:
            step = build(name, task, precision)
            contenders.append(Contender(precision, name, step, work=count_work(step), dtype=DTYPES[precision]))
    compare(arguments, contenders)


if __name__ == "__main__":
    main()
