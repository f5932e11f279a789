""""""

import pytest
import torch
from torch import nn

from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.training.learning_rates import LearningRate
from maskgit_pl.training.optimizers import OptimizerConfig, build_optimizer, frozen_copy, parameter_groups, update_ema


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


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def moved(source: nn.Module) -> None:
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)


def test_a_frozen_copy_is_equal_apart_and_needs_no_gradient():
    source = network()
    ema = frozen_copy(source)
    for kept, new in zip(ema.parameters(), source.parameters(), strict=True):
        assert torch.equal(kept, new)
        assert kept.data_ptr() != new.data_ptr()
        assert not kept.requires_grad
        assert new.requires_grad


def test_a_frozen_copy_stays_in_evaluation_mode_where_its_owner_trains():
    owner = nn.ModuleDict({"network": network()})
    owner["ema"] = frozen_copy(owner["network"])
    owner.train()
    assert owner["network"][2].training
    assert not any(module.training for module in owner["ema"].modules())
    assert owner["ema"].train() is owner["ema"]


@pytest.mark.parametrize(
    ("decay", "step", "effective"),
    [(0.999, 0, 0.1), (0.999, 1, 2 / 11), (0.999, 90, 0.91), (0.999, 10**6, 0.999), (0.5, 90, 0.5), (0.0, 5, 0.0)],
)
def test_the_average_moves_by_the_formula_with_its_ramp(decay, step, effective):
    source = network()
    ema = frozen_copy(source)
    before = [parameter.clone() for parameter in ema.parameters()]
    moved(source)
    update_ema(ema, source, decay=decay, step=step)
    for old, kept, new in zip(before, ema.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(kept, effective * old + (1 - effective) * new.detach())


def test_the_source_is_left_as_it_is_and_no_gradient_flows():
    source = network()
    ema = frozen_copy(source)
    moved(source)
    before = [parameter.detach().clone() for parameter in source.parameters()]
    update_ema(ema, source, decay=0.9, step=3)
    for old, new in zip(before, source.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_buffers_are_copied_and_not_averaged():
    source = network()
    ema = frozen_copy(source)
    source.train()(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(ema[1].running_mean, source[1].running_mean)
    update_ema(ema, source, decay=0.9, step=3)
    assert torch.equal(ema[1].running_mean, source[1].running_mean)
    assert ema[1].num_batches_tracked == 1


def test_repeated_updates_reach_a_source_that_stands_still():
    source = network()
    ema = frozen_copy(source)
    moved(source)
    for step in range(200):
        update_ema(ema, source, decay=0.9, step=step)
    for kept, new in zip(ema.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(kept, new.detach(), rtol=0, atol=1e-5)
