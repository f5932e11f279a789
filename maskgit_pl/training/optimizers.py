"""The optimizers and learning rates of both stages, their parameter groups, and the averaged weights.

A recipe names an optimizer by ``model.optimizer.algorithm``, such as ``lion``. The default is AdamW of torch. The
others are timm's, which is imported when one of them is named. Registered are algorithms with decoupled weight decay
that resume bit-exactly: none that draws random numbers or needs a second backward pass.

The exponential moving average (EMA) of the weights is a frozen copy of the network. It is a submodule, so that it is
sharded, moved and saved with the rest of the LightningModule. Validation, sample pictures and exports use it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from maskgit_pl.checks import MAY_CHANGE, check_choice, check_integer, check_number
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.text import shorten

Decay = Literal["constant", "cosine", "linear"]

_Network = TypeVar("_Network", bound=nn.Module)

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OptimizerSpec(ABC):
    """The base of registered optimizers: a frozen dataclass of the values in a recipe, which builds the optimizer.

    A step must be a function of the gradients, the state dict and the learning rate of each group, so that a resumed
    run is bit-exact: no random numbers, and no state outside of ``state_dict()``. A parameter without a gradient must
    stay as it is. The state of a parameter has its dtype: torch converts it when it loads a state dict.

    Attributes:
        elementwise: True if the step of a value depends on nothing but the gradients and the state at its
            place. FSDP2, which gives each rank some rows of a matrix, needs this.
        other_options: Options of the parameter group that does not decay: embeddings, positions, norms and biases.
    """

    elementwise: ClassVar[bool] = False
    other_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @abstractmethod
    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
        """Builds the optimizer.

        Args:
            groups: Parameter groups with the weight decay of each; see ``parameter_groups``.
            config: Learning rate, of which the peak is the rate of the new optimizer, and betas.
        """


optimizers: Registry[OptimizerSpec] = Registry("optimizer", "maskgit_pl.optimizers", check=derives_from(OptimizerSpec))


@optimizers.register("adamw")
@dataclass(frozen=True)
class AdamWSpec(OptimizerSpec):
    """The fused AdamW of torch, with the betas of the recipe. Source: arXiv:1711.05101."""

    elementwise: ClassVar[bool] = True

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
        return AdamW(groups, lr=config.learning_rate.peak, betas=config.betas, fused=True)


@optimizers.register("lion")
@dataclass(frozen=True)
class LionSpec(OptimizerSpec):
    """Lion, the sign of a momentum: one moment, and a peak of about a tenth of AdamW's. Source: arXiv:2302.06675."""

    elementwise: ClassVar[bool] = True

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
        from timm.optim.lion import Lion  # takes a second

        return Lion(groups, lr=config.learning_rate.peak, betas=config.betas)


@optimizers.register("muon")
@dataclass(frozen=True)
class MuonSpec(OptimizerSpec):
    """Muon, orthogonal steps of Linear and Conv weights; AdamW with the recipe's betas for all others.

    Source: github.com/KellerJordan/Muon; scaled as in arXiv:2502.16982.
    """

    other_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_fallback": True})

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
        from timm.optim.muon import Muon

        rate = config.learning_rate.peak
        return Muon(groups, lr=rate, betas=config.betas, momentum=0.95, nesterov=False, ns_steps=5)


@dataclass(frozen=True)
class LearningRate:
    """A learning rate: linear warm-up to a peak, then a schedule.

    The learning rate belongs to one global batch. Devices and micro-batches divide the global batch, so the
    rate is not rescaled by their number. With another ``data.global_batch``, choose another peak.

    Args:
        peak: Maximum learning rate, > 0.
        warmup_steps: Steps of the linear warm-up, >= 0.
        decay: ``constant``, ``cosine`` (arXiv:1608.03983, without restarts) or ``linear``.
        final_fraction: Lowest learning rate of the schedule as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: if a number is out of range or the decay is unknown.
    """

    peak: float
    warmup_steps: int = field(default=0, metadata=MAY_CHANGE)
    decay: Decay = field(default="constant", metadata=MAY_CHANGE)
    final_fraction: float = field(default=0.0, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        check_number("peak", self.peak, "(0, inf)")
        check_integer("warmup_steps", self.warmup_steps, "[0, 9e18]")
        check_choice("decay", self.decay, get_args(Decay))
        check_number("final_fraction", self.final_fraction, "[0, 1]")

    def factor(self, step: int, max_steps: int) -> float:
        """Computes the multiplier of the peak, in [0, 1].

        With w warm-up steps, fraction f = ``final_fraction``, and p = (step - w) / (max_steps - w), at most 1:

            (step + 1) / w                      while step < w
            1                                   then, if constant
            f + (1 - f) (1 + cos(pi p)) / 2     then, if cosine
            f + (1 - f) (1 - p)                 then, if linear

        Args:
            step: Number of steps before this one, >= 0.
            max_steps: Steps of the whole run.

        Raises:
            ValueError: if the rate decays and ``max_steps`` is below 1.
        """
        if self.decay != "constant" and max_steps < 1:
            raise ValueError(f"learning_rate.decay {self.decay!r}: trainer.max_steps must be >= 1, got {max_steps}")
        # Step 0 already has a rate above 0.
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        factor = (1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress
        return 1.0 if factor == 1 else self.final_fraction + (1 - self.final_fraction) * factor


@dataclass(frozen=True)
class OptimizerConfig:
    """The configuration of an optimizer and its learning rate. The defaults are those of the paper's transformer.

    Args:
        learning_rate: Peak, warm-up and decay.
        betas: Decay rates of the first and the second moment, each in [0, 1), of algorithms that have these two.
        weight_decay: Weight decay of Linear and Conv weights, in [0, 10]; see ``parameter_groups``.
        algorithm: Name or mapping of a registered optimizer.

    Raises:
        ValueError: if a number is out of range, the learning rate is a number, or the algorithm is unknown.
    """

    learning_rate: LearningRate
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.045
    algorithm: str | Mapping[str, Any] = "adamw"

    def __post_init__(self) -> None:
        if not isinstance(self.learning_rate, LearningRate):
            rate = shorten(self.learning_rate)
            raise ValueError(f"learning_rate must be a LearningRate, got {rate}; give its peak as LearningRate(peak)")
        for beta in self.betas:
            check_number("betas", beta, "[0, 1)")
        check_number("weight_decay", self.weight_decay, "[0, 10]")
        _ = self.spec  # raises if it is unknown

    @cached_property
    def spec(self) -> OptimizerSpec:
        """The registered optimizer that ``algorithm`` names."""
        return optimizers.build(self.algorithm)


def parameter_groups(module: nn.Module, weight_decay: float, *, prefix: str = "") -> list[dict[str, Any]]:
    """Divides the trained parameters into weights of Linear and Conv layers, which decay, and all others.

    Embeddings, tied tables, positions, codebooks, norms and biases are in the second group. Frozen parameters
    are in neither group. Each parameter keeps its name, which identifies its optimizer state in a checkpoint.

    Args:
        module: The trained network.
        weight_decay: Weight decay of the first group.
        prefix: Prefix of the parameter names in the LightningModule, such as ``"transformer."``.

    Returns:
        Two parameter groups for ``torch.optim``.

    Source: the released configuration of MaskGIT, which decays kernels only.
    """
    # By identity: a tied weight belongs to one group, under its first name.
    decayed = {id(part.weight) for part in module.modules() if isinstance(part, _DECAYED)}
    trained = [(f"{prefix}{name}", p) for name, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [(name, p) for name, p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [(name, p) for name, p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """Builds an optimizer, with the peak as its learning rate.

    Args:
        groups: The two groups of ``parameter_groups`` of each network. A network with a rate of its own has it in the
            key ``lr``. A frozen network may leave a group empty, which torch refuses.
        config: Algorithm, betas and peak.
    """
    others = [{**group, **config.spec.other_options} for group in groups[1::2]]
    filled = [group for group in (*groups[::2], *others) if group["params"]]
    return config.spec.create(filled, config)


def state_values(config: OptimizerConfig) -> float:
    """Measures the values that an optimizer keeps per value of a 256 x 256 matrix, such as 2.0 for AdamW."""
    weight = nn.Parameter(torch.ones(256, 256))
    weight.grad = torch.ones_like(weight)
    groups = [{"params": [("weight", weight)], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, config)
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    return round(kept / weight.numel(), 2)


def freeze(network: _Network) -> _Network:
    """Freezes a network, or a part of one, in place: its weights take no gradients, and it stays in evaluation mode.

    An optimizer must be built later, and must leave out frozen parameters.
    """
    network.requires_grad_(requires_grad=False).eval()
    network.train = lambda mode=True: network  # type: ignore[method-assign]  # Lightning calls train() on every submodule
    return network


def frozen_copy(network: _Network) -> _Network:
    """Returns a deep copy that requires no gradients and stays in evaluation mode."""
    return freeze(copy.deepcopy(network))


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, *, decay: float, step: int) -> None:
    """Updates the moving average in place, with Adam's correction of its bias.

        ema <- ema + w (source - ema),  w = (1 - decay) / (1 - decay^(step + 1))

    So the average has the weights of every step so far, each as a power of ``decay`` in its age, and nothing of the
    initial weights. Buffers are copied. Sharded parameters are updated shard by shard, without communication.

    Args:
        ema: The average, made by ``frozen_copy`` from ``source``.
        source: The trained network.
        decay: In [0, 1); the average spans about 1 / (1 - decay) steps.
        step: Number of steps before this one, >= 0.

    Source: Kingma and Ba, arXiv:1412.6980, section 3.
    """
    from torch.distributed.fsdp import FSDPModule  # takes a second

    for module in ema.modules():
        if isinstance(module, FSDPModule):  # it keeps the gathered parameters of the root after a forward pass
            module.reshard()
    weight = (1 - decay) / (1 - decay ** (step + 1))
    # In one kernel for many tensors.
    averaged = [_local(parameter) for parameter in ema.parameters()]
    torch._foreach_lerp_(averaged, [_local(parameter) for parameter in source.parameters()], weight)
    for kept, new in zip(ema.buffers(), source.buffers(), strict=True):
        kept.copy_(new)


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor  # takes a second

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
