import pytest
import torch
from torch import nn

from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.training.learning_rates import LearningRate
from maskgit_pl.training.optimizers import OptimizerConfig, build_optimizer, parameter_groups


class Model(nn.Module):
    """A network with one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.GroupNorm(1, 2)
        self.table = nn.Embedding(3, 2)
        self.codebook = nn.Parameter(torch.zeros(3, 2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(group: dict[str, object]) -> list[str]:
    return [name for name, _ in group["params"]]


def test_only_linear_and_conv_weights_decay():
    decayed, rest = parameter_groups(Model(), 0.045)
    assert names(decayed) == ["linear.weight", "conv.weight"]
    assert decayed["weight_decay"] == 0.045
    assert names(rest) == ["codebook", "linear.bias", "conv.bias", "norm.weight", "norm.bias", "table.weight"]
    assert rest["weight_decay"] == 0.0


def test_names_carry_the_prefix_and_belong_to_their_parameters():
    model = Model()
    trained = dict(model.named_parameters(prefix="transformer"))
    for group in parameter_groups(model, 0.1, prefix="transformer."):
        for name, parameter in group["params"]:
            assert parameter is trained[name]


def test_the_transformers_tied_table_positions_norms_and_biases_do_not_decay():
    model = MaskedTransformer(TransformerConfig(16, 3, (2, 2), 8, 2, 2, 16))
    decayed, rest = parameter_groups(model, 0.045)
    kernels = ("qkv", "proj", "fc1", "fc2")
    expected = [f"blocks.{block}.{kernel}.weight" for block in (0, 1) for kernel in kernels]
    assert sorted(names(decayed)) == sorted([*expected, "head_dense.weight"])
    assert {"token_embedding.weight", "position_embedding.weight", "head_bias", "embedding_norm.weight"} <= set(
        names(rest)
    )
    assert len(names(decayed)) + len(names(rest)) == len(list(model.parameters()))


def test_an_optimizer_takes_the_groups_and_decays_the_kernels_alone():
    model = Model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("linear.weight", "conv.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["linear.weight", "conv.weight"]


def steps(kind: str, state: dict | None = None) -> tuple[Model, torch.optim.AdamW]:
    """Runs three steps with gradients that depend on the step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optimizer(
        parameter_groups(model, 0.1), OptimizerConfig(LearningRate(0.1), (0.9, 0.96), 0.1, kind)
    )
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step - 0.1)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", ["foreach", "for-loop"])
def test_every_kind_of_adamw_steps_as_the_fused_one(kind):
    (fused, _), (other, _) = steps("fused"), steps(kind)
    for left, right in zip(fused.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("saved", ["fused", "for-loop"])
def test_an_optimizer_goes_on_with_another_kinds_state_and_keeps_its_own_kind(kind, saved):
    state = steps(saved)[1].state_dict()
    _, optimizer = steps(kind, state)
    assert {(group["fused"], group["foreach"]) for group in optimizer.param_groups} == {
        (kind == "fused", kind == "foreach")
    }
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 6


def test_another_kind_of_adamw_is_refused_with_those_that_are_known():
    with pytest.raises(
        ValueError, match="adamw must be one of fused, foreach, for-loop, got 'fuse'; did you mean 'fused'"
    ):
        OptimizerConfig(LearningRate(0.1), (0.9, 0.96), 0.1, "fuse")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"^betas must be a number in \[0, 1\), got 1.0"),
        ({"betas": (-0.1, 0.9)}, r"^betas must be a number in \[0, 1\), got -0.1"),
        ({"weight_decay": -1.0}, r"^weight_decay must be a number in \[0, 10\], got -1.0"),
    ],
    ids=str,
)
def test_a_number_of_the_optimizer_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": LearningRate(0.1), "betas": (0.9, 0.96), "weight_decay": 0.0, **changes})


def test_adamw_has_the_peak_and_the_betas_of_the_recipe():
    (group,) = build_optimizer(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": []}],
        OptimizerConfig(LearningRate(0.3), (0.8, 0.9), 0.0),
    ).param_groups
    assert (group["lr"], group["betas"]) == (0.3, (0.8, 0.9))
