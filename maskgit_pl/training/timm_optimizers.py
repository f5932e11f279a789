"""Optimizers of timm by name: one adapter for all of them, which imports timm when an optimizer is built.

Registered are algorithms with decoupled weight decay that resume bit-exactly. Left out: those that draw random numbers
(kron), need a second backward pass (adahessian) or another package (bnb, apex), and the variants "cautious" and
"corrected weight decay".
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import field, fields, make_dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch.optim import Optimizer

from maskgit_pl.checks import check_number
from maskgit_pl.training.optimizers import OptimizerConfig, OptimizerSpec, optimizers

__all__ = ["TimmOptimizer"]


class _Option(NamedTuple):
    """An option of an algorithm: its default, and the interval of its values; None for true or false."""

    default: float | bool | tuple[float, ...]
    interval: str | None = None


class TimmOptimizer(OptimizerSpec):
    """The base of the registered optimizers of timm. Their fields are the options of the algorithm.

    Attributes:
        timm_name: Name in ``timm.optim.create_optimizer_v2``.
        has_betas: True if the algorithm takes the two betas of the recipe.
        intervals: Interval of each option that is a number.
        fixed: Arguments that are not options.
    """

    timm_name: ClassVar[str]
    has_betas: ClassVar[bool]
    intervals: ClassVar[Mapping[str, str]]
    fixed: ClassVar[Mapping[str, Any]]

    def __post_init__(self) -> None:
        for name, interval in self.intervals.items():
            value = getattr(self, name)
            for each in value if isinstance(value, list | tuple) else (value,):
                check_number(name, each, interval)
        if getattr(self, "nesterov", False) and self.momentum == 0:  # type: ignore[attr-defined]  # both go together
            raise ValueError("momentum must be above 0 with nesterov, got 0; set nesterov: false, or a momentum")

    def create(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
        from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # its public name; takes a second

        options: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]  # its subclasses are dataclasses
        if self.has_betas:
            options["betas"] = config.betas
        made: Optimizer = create_optimizer_v2(
            groups, self.timm_name, lr=config.learning_rate.peak, weight_decay=0.0, **options, **self.fixed
        )
        _keep_idle_steps(made)
        return made


def _keep_idle_steps(optimizer: Optimizer) -> None:
    """Lets a step without gradients change nothing: Adan and LAMB count it in their parameter groups."""
    before: list[Any] = []

    def remember(*_: Any) -> None:
        before[:] = [deepcopy(group.get("step")) for group in optimizer.param_groups]  # a number or a tensor

    def restore(*_: Any) -> None:
        # After the step, whose closure computes the gradients.
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            return
        for group, step in zip(optimizer.param_groups, before, strict=True):
            if step is None:
                group.pop("step", None)
            else:
                group["step"] = step

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(restore)


def _register(
    name: str,
    timm_name: str,
    text: str,
    *,
    elementwise: bool = True,
    has_betas: bool = True,
    fixed: Mapping[str, Any] = MappingProxyType({}),
    other_options: Mapping[str, Any] = MappingProxyType({}),
    **options: _Option,
) -> None:
    """Registers a frozen dataclass with the options of an algorithm as its fields.

    Args:
        name: Name in recipes.
        timm_name: Name in timm.
        text: The docstring: what it is, and its source.
        elementwise: See ``OptimizerSpec``.
        has_betas: See ``TimmOptimizer``.
        fixed: See ``TimmOptimizer``.
        other_options: See ``OptimizerSpec``.
        options: Options of the recipe.
    """
    annotations = {key: tuple[float, float, float] if key == "betas" else type(o.default) for key, o in options.items()}
    intervals = {key: option.interval for key, option in options.items() if option.interval is not None}
    attributes = {
        "timm_name": timm_name, "has_betas": has_betas, "intervals": intervals, "fixed": fixed,
        "elementwise": elementwise, "other_options": other_options, "__doc__": text, "__module__": __name__,
    }  # fmt: skip
    own = [(key, annotations[key], field(default=option.default)) for key, option in options.items()]
    made = make_dataclass(f"Timm{name.title()}", own, bases=(TimmOptimizer,), frozen=True, namespace=attributes)
    optimizers.register(name)(made)


_EPS, _DECAY = "(0, 1]", "[0, 1)"

_register(
    "adafactor",
    "adafactor",
    "Adafactor without momentum: second moments of rows and columns, at the learning rate of the recipe. "
    "Source: arXiv:1804.04235.",
    elementwise=False,
    has_betas=False,
    fixed={"scale_parameter": False},
    clip_threshold=_Option(1.0, "(0, 1000000]"),
)
_register(
    "adan",
    "adanw",
    "Adan, with Nesterov momentum and three betas of its own. Source: arXiv:2208.06677.",
    has_betas=False,
    betas=_Option((0.98, 0.92, 0.99), _DECAY),
    eps=_Option(1e-8, _EPS),
)
_register(
    "adopt",
    "adoptw",
    "ADOPT, an Adam that converges with any second beta. Source: arXiv:2411.02853.",
    eps=_Option(1e-6, _EPS),
)
_register(
    "lamb",
    "lambw",
    "LAMB, an Adam with a trust ratio for each tensor. Source: arXiv:1904.00962.",
    elementwise=False,
    fixed={"max_grad_norm": None, "always_adapt": True},  # the stages clip; a weight decay of 0 is no special case
    eps=_Option(1e-6, _EPS),
)
_register(
    "laprop",
    "laprop",
    "LaProp, momentum of normalized gradients. Source: arXiv:2002.04839.",
    eps=_Option(1e-15, _EPS),
)
_register(
    "lion",
    "lion",
    "Lion, the sign of a momentum: one moment, and a peak of about a tenth of AdamW's. Source: arXiv:2302.06675.",
)
_register(
    "mars",
    "mars",
    "MARS, an AdamW with variance reduction. Source: arXiv:2411.10438.",
    elementwise=False,
    eps=_Option(1e-8, _EPS),
    gamma=_Option(0.025, "[0, 1]"),
)
_register(
    "muon",
    "muon",
    "Muon, orthogonal steps of Linear and Conv weights; AdamW with the recipe's betas for all others. "
    "Source: github.com/KellerJordan/Muon; scaled as in arXiv:2502.16982.",
    elementwise=False,
    other_options={"use_fallback": True},
    momentum=_Option(0.95, _DECAY),
    nesterov=_Option(False),  # noqa: FBT003
    ns_steps=_Option(5, "[1, 20]"),
)
_register(
    "nadamw",
    "nadamw",
    "NAdam with decoupled weight decay. Source: Dozat, 2016, Incorporating Nesterov momentum into Adam.",
    eps=_Option(1e-8, _EPS),
)
_register(
    "radam",
    "radamw",
    "RAdam, an Adam that rectifies its first steps. Source: arXiv:1908.03265.",
    eps=_Option(1e-8, _EPS),
)
_register(
    "rmsprop",
    "rmsproptfw",
    "RMSprop as in TensorFlow: eps inside of the root, and a second moment that starts at 1. Source: timm.",
    has_betas=False,
    alpha=_Option(0.9, _DECAY),
    momentum=_Option(0.0, _DECAY),
    eps=_Option(1e-10, _EPS),
)
_register(
    "sgd",
    "sgdw",
    "SGD with momentum and decoupled weight decay. Source: arXiv:1711.05101.",
    has_betas=False,
    momentum=_Option(0.9, _DECAY),
    nesterov=_Option(True),  # noqa: FBT003
)
