"""The registry of optimizers, the parameter groups of both stages, and the averaged weights.

A recipe names an optimizer by ``model.optimizer.algorithm``: ``lion``, or ``{name: sgd, momentum: 0.95}``. The default
is AdamW. ``timm_optimizers`` registers the others.

The exponential moving average (EMA) of the weights of a network is a frozen copy of the network. The copy is a
submodule, so that it is sharded, moved and saved with the rest of the LightningModule. Validation, sample pictures and
exports use it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.registry import Registry, derives_from, describe
from maskgit_pl.training.learning_rates import LearningRate

__all__ = [
    "AdamWKind",
    "AdamWSpec",
    "OptimizerConfig",
    "OptimizerSpec",
    "build_optimizer",
    "check_sharding",
    "frozen_copy",
    "optimizers",
    "parameter_groups",
    "state_values",
    "update_ema",
]

AdamWKind = Literal["fused", "foreach", "for-loop"]
"""Implementations of AdamW in torch: one kernel for everything, one kernel per operation, or one per parameter."""

_Network = TypeVar("_Network", bound=nn.Module)

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OptimizerSpec:
    """The base of registered optimizers: a frozen dataclass of the values in a recipe, which builds the optimizer.

    A step must be a function of the gradients, the state dict and the learning rate of each group, so that a resumed
    run is bit-exact: no random numbers, and no state outside of ``state_dict()``. A parameter without a gradient must
    stay as it is. The state of a parameter has its dtype: torch converts it when it loads a state dict.

    Attributes:
        elementwise: True if the step of a value depends on nothing but the gradients and the state at its place. FSDP2,
            which gives each rank some rows of a matrix, needs this.
        other_options: Options of the parameter group that does not decay: embeddings, positions, norms and biases.
    """

    elementwise: ClassVar[bool] = False
    other_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
        """Builds the optimizer.

        Args:
            groups: Parameter groups with the weight decay of each; see ``parameter_groups``.
            config: Learning rate, of which the peak is the rate of the new optimizer, and betas.
        """
        raise NotImplementedError(f"{type(self).__name__} must define create(groups, config)")


optimizers: Registry[OptimizerSpec] = Registry(
    "optimizer",
    "maskgit_pl.optimizers",
    check=derives_from(OptimizerSpec),
    modules=("maskgit_pl.training.timm_optimizers",),
)


@optimizers.register("adamw")
@dataclass(frozen=True)
class AdamWSpec(OptimizerSpec):
    """AdamW of torch, with the betas and the implementation of the recipe. Source: arXiv:1711.05101."""

    elementwise: ClassVar[bool] = True

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> AdamW:
        """Builds AdamW. It keeps its implementation when it loads a state that another one wrote."""
        fused, foreach = config.adamw == "fused", config.adamw == "foreach"
        optimizer = AdamW(groups, lr=config.learning_rate.peak, betas=config.betas, fused=fused, foreach=foreach)
        optimizer.register_load_state_dict_pre_hook(_keep_kind)
        return optimizer


@dataclass(frozen=True)
class OptimizerConfig:
    """The configuration of an optimizer and its learning rate.

    Args:
        learning_rate: Peak, warm-up and decay.
        betas: Decay rates of the first and the second moment, each in [0, 1), of algorithms that have these two.
        weight_decay: Weight decay of Linear and Conv weights, in [0, 10]; see ``parameter_groups``.
        adamw: Implementation of the step of AdamW. All implementations compute the same up to rounding.
        algorithm: Name or mapping of a registered optimizer.

    Raises:
        ValueError: if a number is out of range, or the algorithm or its implementation is unknown.
    """

    learning_rate: LearningRate
    betas: tuple[float, float]
    weight_decay: float
    adamw: AdamWKind = "fused"
    algorithm: str | Mapping[str, Any] = "adamw"

    def __post_init__(self) -> None:
        for beta in self.betas:
            check_number("betas", beta, "[0, 1)")
        check_number("weight_decay", self.weight_decay, "[0, 10]")
        check_choice("adamw", self.adamw, get_args(AdamWKind))
        _ = self.spec  # raises if it is unknown

    @cached_property
    def spec(self) -> OptimizerSpec:
        """The registered optimizer that ``algorithm`` names."""
        return optimizers.build(self.algorithm)


def parameter_groups(module: nn.Module, weight_decay: float, *, prefix: str = "") -> list[dict[str, Any]]:
    """Divides the trained parameters into weights of Linear and Conv layers, which decay, and all others.

    Embeddings, tied tables, positions, codebooks, norms and biases are in the second group. Frozen parameters are in
    neither group. Each parameter keeps its name, which identifies its optimizer state in a checkpoint.

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
        groups: The two groups of ``parameter_groups``. A frozen network may leave one empty, which torch refuses.
        config: Algorithm, betas and peak.
    """
    decayed, others = groups
    filled = [group for group in (decayed, {**others, **config.spec.other_options}) if group["params"]]
    return config.spec.create(filled, config)


def check_sharding(config: OptimizerConfig, strategy: str) -> None:
    """Checks that a strategy of the Trainer supports an optimizer.

    Raises:
        ValueError: if FSDP2 is set for an optimizer whose step needs whole matrices.
    """
    if strategy == "fsdp" and not config.spec.elementwise:
        raise ValueError(
            f"trainer.strategy must be 'ddp' or 'auto' with model.optimizer.algorithm {describe(config.algorithm)!r}, "
            "whose step needs whole matrices, got 'fsdp'; use --cluster ddp, or another algorithm"
        )


def state_values(config: OptimizerConfig) -> float:
    """Measures the values that an optimizer keeps for each value of a weight matrix, such as 2.0 for AdamW.

    A step on a 256 x 256 matrix shows it. Statistics of rows and columns are a smaller part in larger matrices.
    """
    weight = nn.Parameter(torch.ones(256, 256))
    none: list[tuple[str, nn.Parameter]] = []
    groups = [{"params": [("weight", weight)], "weight_decay": 0.0}, {"params": none, "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, config)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, Tensor))
    return round(kept / weight.numel(), 2)


def frozen_copy(network: _Network) -> _Network:
    """Returns a deep copy that requires no gradients and stays in evaluation mode."""
    duplicate = copy.deepcopy(network).requires_grad_(requires_grad=False).eval()
    duplicate.train = lambda mode=True: duplicate  # type: ignore[method-assign]  # Lightning calls train() on every submodule
    return duplicate


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, *, decay: float, step: int) -> None:
    """Updates the moving average in place.

        ema <- d ema + (1 - d) source,  d = min(decay, (1 + step) / (10 + step))

    Buffers are copied. Sharded parameters are updated shard by shard, without communication.

    Args:
        ema: The average, made by ``frozen_copy`` from ``source``.
        source: The trained network.
        decay: Upper bound of d, in [0, 1).
        step: Number of steps before this one, >= 0. The ramp lets early averages forget the initial weights.
    """
    _reshard(ema)
    weight = 1 - min(decay, (1 + step) / (10 + step))
    # lerp: ema + (1 - d) (source - ema), in one kernel for many tensors.
    averaged = [_local(parameter) for parameter in ema.parameters()]
    torch._foreach_lerp_(averaged, [_local(parameter) for parameter in source.parameters()], weight)
    for kept, new in zip(ema.buffers(), source.buffers(), strict=True):
        kept.copy_(new)


def _keep_kind(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict in which the groups have the implementation of ``optimizer``."""
    kind = {name: optimizer.param_groups[0][name] for name in ("fused", "foreach")}
    return {**state, "param_groups": [{**group, **kind} for group in state["param_groups"]]}


def _reshard(network: nn.Module) -> None:
    """Frees gathered parameters: FSDP2 keeps those of the root after a forward pass without a backward pass."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
