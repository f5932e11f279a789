"""Measures a training step of stage 1: ours, a plain one as in taming-transformers, and one with diffusers' VQModel.

    python benchmarks/stage1_step.py --threads 1 --repeats 5 --json stage1_step.json

benchmarks/README.md describes the contenders and the columns of the table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from measuring import (
    CLOCKS,
    MatrixProduct,
    Stopwatch,
    format_table,
    interleave,
    measure_peak_memory,
    read_cpu_name,
    run_in_fresh_process,
)
from stage2_step import is_bfloat16_slow
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from maskgit_pl.data import Batch
from maskgit_pl.distributed import describe_environment
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.feature_networks import FrozenNetwork
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig, VQGANOutput
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.training.tokenizer_losses import (
    AdversarialConfig,
    LossInputs,
    MemoryFormat,
    TokenizerConfig,
    TokenizerLoss,
)

Precision = Literal["fp32", "bf16"]
Weights = dict[str, Tensor]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER = "diffusers VQModel"
# Source: configs/imagenet_vqgan.yaml of CompVis/taming-transformers (0.8: discriminator_weight).
_RATE, _BETAS, _ADVERSARIAL_WEIGHT, _PERCEPTUAL_WEIGHT, _COMMITMENT = 4.5e-6, (0.5, 0.9), 0.8, 1.0, 0.25
_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG-16, as in LPIPS


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
    memory_format: MemoryFormat = "contiguous"

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
            reconstruction_loss="l1",
            adversarial=AdversarialConfig(
                DiscriminatorConfig(self.discriminator),
                loss="hinge",
                weight=_ADVERSARIAL_WEIGHT,
                weight_rule="adaptive",
                r1_weight=0.0,
            ),
            memory_format=self.memory_format,
        )

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
        self.stages = nn.ModuleList()
        width = 3
        for widths in _VGG_WIDTHS:
            sizes = pairwise((width, *widths))
            layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
            self.stages.append(nn.Sequential(*([nn.MaxPool2d(2)] if len(self.stages) else []), *layers))
            width = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # keeps the scale of the features over the depth
        self.freeze()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the distances (B,) of images from targets, (B, 3, H, W) float in [0, 1] each."""
        pairs = zip(self._features(images), self._features(targets), strict=True)
        return torch.stack([(one - other).square().mean((2, 3)).sum(1) for one, other in pairs]).sum(0)

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

    def __call__(self, given: LossInputs, network: nn.Module) -> Tensor:
        distances: Tensor = network(given.reconstruction, given.images)
        return distances.mean()


class Contender(Protocol):
    """A training step that can be timed."""

    def __call__(self, watch: Stopwatch) -> None:
        """Trains one step of both networks, and marks its end."""

    def gradients(self) -> Weights:
        """Returns the gradients of both networks by name, without an optimizer step."""
        ...


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

    def __call__(self, watch: Stopwatch) -> None:
        with _autocast(self.precision, self.module.device.type):
            self.module.training_step(self.batch, 0)
        self.trainer.global_step += 1
        watch.mark("step")

    def gradients(self) -> Weights:
        self.module.zero_grad()
        with _autocast(self.precision):
            self.module.replay_step(self.batch, step=1)
        assert self.module.discriminator is not None
        found = _gradients(self.module.network, self.module.discriminator)
        self.module.zero_grad()
        return found


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
        self.optimizers = [AdamW(each.parameters(), _RATE, betas=_BETAS, weight_decay=0.0) for each in self._networks]

    @property
    def _networks(self) -> tuple[nn.Module, nn.Module]:
        return self.network, self.discriminator

    def __call__(self, watch: Stopwatch) -> None:
        for part, optimizer in zip((self.train_generator, self.train_discriminator), self.optimizers, strict=True):
            part()
            optimizer.step()
            optimizer.zero_grad()
        watch.mark("step")

    def gradients(self) -> Weights:
        self.train_generator()
        self.train_discriminator()
        found = _gradients(*self._networks)
        for network in self._networks:
            network.zero_grad()
        return found

    def train_generator(self) -> None:
        """Adds the gradients of the generator."""
        with _frozen(self.discriminator), _autocast(self.precision):
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
        with _frozen(self.network), _autocast(self.precision):
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


def _gradients(network: nn.Module, discriminator: nn.Module) -> Weights:
    named = [*network.named_parameters(prefix="network"), *discriminator.named_parameters(prefix="discriminator")]
    return {name: weight.grad.detach().clone() for name, weight in named if weight.grad is not None}


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


_CONTENDERS: dict[str, Callable[[Task, Precision], Contender]] = {
    "ours": Ours, "plain": build_plain, PEER: build_peer,
}  # fmt: skip


def build(name: str, task: Task, precision: Precision) -> Contender:
    """Builds a contender; ours and the plain one start from the same weights."""
    torch.manual_seed(0)
    return _CONTENDERS[name](task, precision)


def compare_gradients(task: Task, precision: Precision) -> tuple[float, dict[str, int]]:
    """Compares our gradients with those of the plain step.

    The discriminator's gradients are compared before a step of the generator, so that the weights are equal.

    Returns:
        The largest relative difference over all weights, and the FLOPs of each of the two steps.
    """
    found: dict[str, Weights] = {}
    flops: dict[str, int] = {}
    for name in ("ours", "plain"):
        step = build(name, task, precision)
        with count_flops() as counter:
            found[name] = step.gradients()
        flops[name] = counter.flops
    ours, plain = found["ours"], found["plain"]
    if ours.keys() != plain.keys():
        raise RuntimeError(f"both steps must train the same weights, got {sorted(ours.keys() ^ plain.keys())} in one")
    # A gradient that is 0 except for rounding, such as that of a key's bias, is compared to the largest one.
    scale = 1e-3 * max(float(gradient.norm()) for gradient in plain.values())
    differences = [float((ours[name] - plain[name]).norm()) / max(float(plain[name].norm()), scale) for name in plain]
    return max(differences), flops


def count_peer(task: Task) -> int:
    """Returns the FLOPs of a step with the network of diffusers, which do not depend on the precision."""
    step = build(PEER, task, "fp32")
    with count_flops() as counter:
        step.gradients()
    return counter.flops


def measure_memory(name: str, task: Task, precision: Precision, threads: int) -> int | None:
    """Returns the peak memory of two steps in bytes; the second one has optimizer state. Call it in a fresh process."""
    torch.set_num_threads(threads)

    def run() -> None:
        step = build(name, task, precision)
        for _ in range(2):
            step(Stopwatch())

    return measure_peak_memory(run)


class FlopCounter(TorchDispatchMode):
    """A dispatch mode that sums FLOPs by torch's formulas; ``FlopCounterMode`` fails in ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Calls ``func``, and counts its FLOPs if it is a matrix product or a convolution."""
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=made))
        return made


@contextmanager
def count_flops() -> Iterator[FlopCounter]:
    """Counts the FLOPs of matrix products and convolutions, including attention and backward."""
    # On CPU, torch has a formula only for the products of the MATH kernel of attention.
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


@dataclass(frozen=True)
class Measured:
    """The measurements of one contender in one precision.

    Args:
        precision: Precision of the forward passes.
        name: Name of the contender.
        flops: FLOPs of the matrix products and convolutions of a step.
        memory: Peak memory in bytes; None if the system does not report it.
        seconds: Seconds of each round.
        peak: Best rate of a matrix product in this precision over all rounds, in FLOP/s.
        reference: Seconds of the plain step in the same precision, in the same rounds.
        reference_fp32: Seconds of the plain step in fp32, in the same rounds.
    """

    precision: Precision
    name: str
    flops: int
    memory: int | None
    seconds: list[float]
    peak: float
    reference: list[float]
    reference_fp32: list[float]

    def ratio(self, reference: list[float]) -> float:
        """Returns the median over the rounds of the time divided by that of a reference in the same round."""
        return median(its / other for its, other in zip(self.seconds, reference, strict=True))

    def row(self) -> dict[str, str]:
        """Returns the row of the table."""
        middle, best = median(self.seconds), min(self.seconds)
        shares = [f"{100 * self.flops / seconds / self.peak:.0f}" for seconds in (middle, best)]
        return {
            "": self.precision,
            "step": self.name,
            "s median": f"{middle:.3g}",
            "s best": f"{best:.3g}",
            "time / plain": f"{self.ratio(self.reference):.2f}",
            "time / plain fp32": f"{self.ratio(self.reference_fp32):.2f}",
            "memory GB": "-" if self.memory is None else f"{self.memory / 1e9:.2f}",
            "GFLOP": f"{self.flops / 1e9:.3g}",
            "% of peak: median (best)": f"{shares[0]} ({shares[1]})",
        }


Key = tuple[Precision, str]


def measure(
    task: Task,
    flops: Mapping[Key, int],
    *,
    memory: Mapping[Key, int | None],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    product_size: int = 2048,
) -> list[Measured]:
    """Times contenders of all precisions in turn, and the machine's peaks in the same rounds.

    Args:
        task: Sizes.
        flops: FLOPs of each contender, by precision and name; ``plain`` in fp32 must be one of them.
        memory: Peak memory of contenders in bytes.
        repeats: Number of rounds.
        clock: Clock of all times.
        product_size: Rows of the matrix product that measures a peak.
    """
    # All contenders stay in memory, so that a round can run them in turn.
    steps = {key: build(key[1], task, key[0]) for key in flops}
    for step in steps.values():
        step(Stopwatch())  # warm-up
    products = {precision: MatrixProduct(_DTYPES[precision], product_size) for precision, _ in flops}
    for product in products.values():
        product.rate(repeats=1)
    timed: dict[str, Callable[[Stopwatch], object]] = {f"product {p}": product for p, product in products.items()}
    timed |= {" ".join(key): step for key, step in steps.items()}
    watches = interleave(timed, repeats=repeats, clock=clock)
    seconds = {name: [watch.total for watch in each] for name, each in watches.items()}
    return [
        Measured(
            precision, name, flops[precision, name], memory.get((precision, name)), seconds[f"{precision} {name}"],
            products[precision].flops / min(seconds[f"product {precision}"]),
            seconds[f"{precision} plain"], seconds["fp32 plain"],
        )
        for precision, name in flops
    ]  # fmt: skip


def list_installed() -> list[str]:
    """Returns the contenders whose packages are installed."""
    return [name for name in _CONTENDERS if name != PEER or importlib.util.find_spec("diffusers") is not None]


def _autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Returns the autocast context of Lightning's 32-true or bf16-mixed."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _positive(text: str) -> int:
    """Parses a flag's value as an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=Task.batch, help="batch size (%(default)s)")
    parser.add_argument("--image-size", type=_positive, default=Task.image_size, help="side in pixels (%(default)s)")
    parser.add_argument("--base-channels", type=_positive, default=Task.base_channels, help="width (%(default)s)")
    parser.add_argument("--repeats", type=_positive, default=5, help="number of rounds (%(default)s)")
    parser.add_argument("--no-perceptual", action="store_true", help="leave out the perceptual loss")
    parser.add_argument("--channels-last", action="store_true", help="memory format of our step and the plain one")
    parser.add_argument(
        "--precision", choices=list(_DTYPES), help="fp32: leave bf16 out; bf16: measure it even where it is slow"
    )
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory, in processes of their own")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: if other programs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    arguments = _arguments(argv)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    task = Task(
        arguments.batch_size, arguments.image_size, arguments.base_channels,
        has_perceptual=not arguments.no_perceptual,
        memory_format="channels_last" if arguments.channels_last else "contiguous",
    )  # fmt: skip
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(
        f"{task.image_size} px, batch {task.batch}, channels {task.network.widths}, perceptual network "
        f"{'VGG-16' if task.has_perceptual else 'none'}, {task.memory_format}, {arguments.clock} time"
    )
    names = list_installed()
    if PEER not in names:
        print(f"{PEER} is not installed and is left out; to install it: python -m pip install -e '.[benchmarks]'")
    precisions: list[Precision] = ["fp32", "bf16"]
    if arguments.precision == "fp32":
        precisions.remove("bf16")
    elif arguments.precision is None and is_bfloat16_slow():
        print("bf16 is left out: this CPU has no bfloat16 instructions (--precision bf16 measures it anyway)")
        precisions.remove("bf16")
    flops: dict[Key, int] = {}
    differences: dict[Precision, float] = {}
    for precision in precisions:
        differences[precision], counted = compare_gradients(task, precision)
        print(
            f"{precision}: the gradients of ours and plain differ by at most {differences[precision]:.1e} of their norm"
        )
        flops |= {(precision, name): counted[name] if name in counted else count_peer(task) for name in names}
    memory = {
        key: run_in_fresh_process(measure_memory, key[1], task, key[0], arguments.threads)
        for key in (flops if arguments.memory else ())
    }
    measured = measure(task, flops, memory=memory, repeats=arguments.repeats, clock=CLOCKS[arguments.clock])
    for precision in precisions:
        peak = next(one.peak for one in measured if one.precision == precision)
        print(f"{precision} matrix-product peak: {peak / 1e9:.1f} GFLOP/s")
    print("\n" + format_table([one.row() for one in measured]))
    if arguments.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "gradient_differences": differences,
            "measured": [asdict(one) for one in measured],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
